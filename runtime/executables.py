"""Lowers and compiles every program at start, in threads, or restores them from disk.

The hot path only ever calls what is in the table {key: Compiled}; nothing there can recompile.
`CompileCounter` watches JAX itself, so that a compile anywhere after start-up is counted.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from runtime import formats
from runtime.kept_steps import KeptSteps, facts_of
from runtime.machine import Machine

log = logging.getLogger(__name__)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts compilations in this process, as JAX itself reports them."""

    def __init__(self):
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int):
        if event == COMPILE_EVENT:
            with self._lock:
                self.count += 1


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile: `jitted.lower(*args)`, args being shapes that may say where they are.

    Attributes:
        left_open: the same with the layouts of the first argument, the weights, left to the compiler; see
            runtime.formats. None where they are the usual ones.
        chooses: all that are left open get the weights as this one wants them.
    """

    jitted: Callable
    args: tuple
    left_open: Callable | None = None
    chooses: bool = False

    def following(self, layouts: formats.Layouts) -> "Program":
        """The same for weights that lie so."""
        weights, *rest = self.args
        return Program(self.jitted, (formats.placed(weights, layouts), *rest))


@dataclasses.dataclass(frozen=True)
class Built:
    """What build() made: the table, how many came from disk, and the entry they are kept in; None for none."""

    table: dict
    num_loaded: int
    seconds: float
    folder: Path | None


def build(
    programs: Mapping[Hashable, Program],
    facts: Mapping[str, str],
    machine: Machine,
    devices: Sequence[Any],
    cache_dir: Path | None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    may_restore: bool = True,
    choice: formats.Choice | None = None,
) -> Built:
    """Restores or compiles every program; returns when all are ready.

    Programs whose weights' layouts are open are compiled beside the one that chooses; they nearly always want the same,
    and are compiled again where they do not.

    Args:
        programs: {key: Program}; str(key) names it in the progress bar and on disk.
        facts: {name: text}, all that the programs depend on that this module cannot see: "model" and the plan.
        machine: where the programs will run. For one that is not here they are always compiled, and kept.
        devices: those of the machine that the programs run on.
        cache_dir: folder of entries, see runtime.kept_steps; None keeps nothing.
        progress: called with (name, done, total) as each becomes ready.
        may_restore: False compiles what is kept, too.
        choice: gets the weights' layouts as soon as they are known.
    """
    start = time.monotonic()
    if cache_dir and jax.config.jax_compilation_cache_dir:
        # On CPU a program compiled beside others that came from JAX's cache loses functions when it is serialized.
        log.warning("JAX_COMPILATION_CACHE_DIR is set, so compiled steps are kept there only")
        cache_dir = None
    if machine.platform == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")  # says where the library is that restored kernels call
    kept = KeptSteps(cache_dir, facts_of(facts, machine, devices), programs) if cache_dir else None
    # All or none: what is compiled beside restored programs must not be written, see above.
    restores = may_restore and bool(kept) and machine.is_here and kept.is_complete
    if kept and not restores and (difference := kept.nearest()):
        log.info("compiling; the steps of this model that are kept differ in: %s", difference)
    table, loaded = {}, 0
    choice = choice or formats.Choice()
    in_order = sorted(programs, key=lambda key: not programs[key].chooses)  # so that none waits for what has not begun
    if not any(program.left_open for program in programs.values()):
        choice.set_result({})

    def one(key, draft):
        program = programs[key]
        found = kept.load(key, devices) if kept and restores else None
        if program.chooses:
            with formats.deciding(choice):
                made = found or compiled(program, machine, devices)
                choice.set_result(formats.read_back(made))
        elif program.left_open:
            made = found or compiled(program.following(choice.result()) if choice.done() else program, machine, devices)
            if formats.read_back(made) != choice.result():
                found, made = None, compiled(program.following(choice.result()), machine, devices)
        else:
            made = found or compiled(program, machine, devices)
        if draft:
            draft.save(key, made)
        return made, found is not None

    with kept.making() if kept and not restores else contextlib.nullcontext() as draft:
        # Tracing holds the interpreter's lock and compiling does not: a few threads keep the cores busy.
        with concurrent.futures.ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2))) as pool:
            futures = {pool.submit(one, key, draft): key for key in in_order}
            for future in concurrent.futures.as_completed(futures):
                table[futures[future]], was_loaded = future.result()
                loaded += was_loaded
                progress(str(futures[future]), len(table), len(programs))
    if kept and restores and loaded < len(programs):
        kept.discard()  # the next start compiles and keeps the whole set
    folder = kept.folder if kept and kept.is_complete else None
    return Built(table, loaded, time.monotonic() - start, folder)


def are_kept(
    programs: Mapping[Hashable, Program],
    facts: Mapping[str, str],
    machine: Machine,
    devices: Sequence[Any],
    cache_dir: Path | None,
) -> bool:
    """Whether build() would find all of them on disk."""
    return bool(cache_dir) and KeptSteps(cache_dir, facts_of(facts, machine, devices), programs).is_complete


def compiled(program: Program, machine: Machine, devices: Sequence[Any]):
    """The executable of one program for these devices of a machine."""
    with machine.tracing(devices):
        lowered = (program.left_open or program.jitted).lower(*program.args)
    return lowered.compile({**machine.compiler_options, **machine.options} or None)
