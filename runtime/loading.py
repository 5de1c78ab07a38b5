"""From a model's folder to everything an engine runs on: plan, weights, compiled steps, state.

Warm starts skip conversion and compilation: converted weights are kept with orbax, compiled steps
by runtime.executables, both under the cache folder and both named by what they were made from.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.load import check_fits
from pallas_kernels import cpu
from runtime import agreement, executables, formats, machine, malloc, weights
from runtime.alternatives import what_fits
from runtime.batch import StepBuffer, StepLayout
from runtime.buckets import Bucket, buckets_for
from runtime.config import EngineConfig, EnginePlan
from runtime.errors import ConfigError, DoesNotFit
from runtime.preparation import Layout, Prepared, mask_words, prepare
from runtime.sampling import Tables, empty_row
from runtime.step_state import StepState
from runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Everything that was made before the first step of one replica.

    Attributes:
        steps: {Bucket: executable}. Call as steps[bucket](weights, state, packed, mask).
        load_history, load_tables: executables that set one slot's state.
        no_mask: {rows: device array}, what a step is given when no row has a mask.
        eos_id, eos_ids: the primary end token, or None, and all that end an answer.
        default_sampling: what generation_config says of fields that a request leaves out, and max_new_tokens.
        usual_tables: one slot's sampling tables where a request asks for nothing unusual.
        new_state: makes state with nothing in it, for a device whose memory was lost in a failed step.
        seconds: {phase: seconds}; of the weights, what they took longer than the steps that were made beside them.
    """

    plan: EnginePlan
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    weights: dict[str, jax.Array]
    steps: dict[Bucket, Callable]
    load_history: Callable
    load_tables: Callable
    no_mask: dict[int, jax.Array]
    eos_id: int | None
    eos_ids: frozenset[int]
    usual_tables: Tables
    default_sampling: dict[str, Any]
    state: StepState
    new_state: Callable[[], StepState]
    seconds: dict[str, float]


def load(
    config: EngineConfig, progress: Progress | None = None, others: agreement.Others | None = None
) -> list[Loaded]:
    """Opens, plans, converts or restores, compiles or restores, and allocates; one Loaded for each replica.

    Args:
        others: the other hosts, where the model is on several.

    Raises:
        ConfigError, ConversionError: with the cause and the remedy.
        DoesNotFit: and with what would.
    """
    progress = progress or (lambda name, done, total: None)
    seconds: dict[str, float] = {}
    # Of a GPU's memory JAX takes 75% unless it is told before it first sees the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    opened = functools.partial(open_checkpoint, overrides=config.hf_overrides, tokenizer=config.tokenizer)
    checkpoint = _timed(seconds, "open", opened, config.model)
    if others is not None:
        _timed(seconds, "join", others.join, agreement.facts(others.place, config, checkpoint))
    here = machine.here()
    if others is not None:
        here = dataclasses.replace(here, memory=others.settle_memory(here.memory))
    try:
        replicas = [prepare(config, checkpoint, here, replica) for replica in range(config.data_parallel_size)]
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}{what_fits(config, checkpoint, here)}") from None
    plan, layout, shapes = replicas[0].plan, replicas[0].layout, replicas[0].shapes
    if others is not None:
        others.compare(agreement.plan_facts(plan))
    check_fits(checkpoint, weights.stored_shapes(checkpoint, layout.config, plan, shapes))
    cache_dir = cache_folder(config)
    tokenizer = checkpoint.tokenizer and Tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_config)
    eos_id, eos_ids = end_tokens(checkpoint, tokenizer)
    usual = empty_row(plan.vocab_size, sorted(eos_ids))
    defaults = default_sampling(config, checkpoint)
    if defaults:
        log.warning(
            "requests that leave them out get generation_config's %s; --generation-config vllm takes no model's word",
            ", ".join(f"{name} {value}" for name, value in defaults.items()),
        )
    everywhere = Layout.together([prepared.layout for prepared in replicas])
    steps = _Steps(replicas, cache_dir and cache_dir / "steps")

    def place():
        of_model = checkpoint, layout.config, everywhere.tensor, shapes, replicas[0].in_panels
        wheres = formats.wheres(everywhere.shardings(shapes), steps.soon_known_layouts())
        return weights.on_devices(*of_model, wheres, plan, cache_dir, progress, *([others.agree] if others else []))

    # Reading and hashing hold no lock of Python's, so the steps are made meanwhile.
    with concurrent.futures.ThreadPoolExecutor(1, "weights") as beside:
        placing = beside.submit(place)
        if plan.platform == "cpu" and cpu.is_available():
            progress("kernels", 0, 1)
            _timed(seconds, "kernels", cpu.register)  # programs from disk refer to them by name
            progress("kernels", 1, 1)
        tables = steps.make(progress, seconds)
        placed = _timed(seconds, "weights", placing.result)
    placed = _timed(seconds, "weights", formats.laid_out, placed, steps.layouts())
    found = []
    for prepared, table in zip(replicas, tables, strict=True):
        new_state = functools.partial(table["new_state"], usual)
        loaded = Loaded(
            plan=plan,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            weights=prepared.layout.own(placed),
            steps={key: program for key, program in table.items() if isinstance(key, Bucket)},
            load_history=table["load_history"],
            load_tables=table["load_tables"],
            no_mask={
                b.num_rows: _zeros((b.num_rows, mask_words(plan)), np.uint32, prepared.layout.whole)
                for b in buckets_for(plan)
            },
            eos_id=eos_id,
            eos_ids=eos_ids,
            usual_tables=usual,
            default_sampling=defaults,
            state=_timed(seconds, "allocate", new_state),
            new_state=new_state,
            seconds=seconds,
        )
        found.append(_timed(seconds, "warm up", _warm_up, loaded))
    gc.collect()
    malloc.trim()
    return found


class _Steps:
    """The programs of all replicas, to be made. Either all are restored or all are compiled, as within one."""

    def __init__(self, replicas: list[Prepared], cache_dir: Path | None):
        self.wanted = [(p.programs, p.facts, p.machine, p.layout.devices, cache_dir) for p in replicas]
        self.are_kept = all(executables.are_kept(*each) for each in self.wanted)
        self.choices = [formats.Choice() for _ in replicas]
        self.are_chosen = any(program.chooses for program in replicas[0].programs.values())

    def make(self, progress: Progress, seconds: dict[str, float]) -> list[dict]:
        """{key: executable} of each replica."""
        start = time.monotonic()
        done, lock = [0] * len(self.wanted), threading.Lock()

        def build(index):
            def progress_of_all(name, own, total):
                with lock:
                    done[index] = own
                    progress(name, sum(done), total * len(done))

            options = {"may_restore": self.are_kept, "choice": self.choices[index]}
            return executables.build(*self.wanted[index], progress=progress_of_all, **options)

        try:
            with concurrent.futures.ThreadPoolExecutor(len(done)) as pool:
                built = list(pool.map(build, range(len(done))))
        finally:
            for choice in self.choices:
                choice.cancel()  # after an error nobody must wait for it
        is_restored = all(each.num_loaded == len(each.table) for each in built)
        seconds["restore steps" if is_restored else "compile"] = time.monotonic() - start
        return [each.table for each in built]

    def layouts(self) -> formats.Layouts:
        """The weights' layouts; waits until they are known."""
        first, *others = (choice.result() for choice in self.choices)
        assert all(other == first for other in others)  # one compiler, one program
        return first

    def soon_known_layouts(self) -> formats.Layouts:
        """The same where they are restored, which takes no time; what takes a compile is not waited for.

        Compilers have chosen the usual layouts for nearly all weights so far, so weights are read to these meanwhile,
        and laid out anew where that was wrong.
        """
        return self.layouts() if self.are_kept and self.are_chosen else {}


def _zeros(shape, dtype, where):
    """Zeros on devices that may be other hosts' too; device_put would compare the values between them."""
    return jax.make_array_from_callback(shape, where, lambda index: np.zeros(shape, dtype)[index])


def end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[int | None, frozenset[int]]:
    """(the primary EOS, all ids that end an answer), from the tokenizer and generation_config."""
    listed = checkpoint.generation_config.get("eos_token_id", checkpoint.hf_config.get("eos_token_id"))
    ids: list[int] = [listed] if isinstance(listed, int) else list(listed or [])
    primary = tokenizer.eos_token_id if tokenizer else None
    if primary is None:
        return (ids[0] if ids else None), frozenset(ids)
    return primary, frozenset([primary, *ids])


SAMPLING_DEFAULTS = {
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "max_new_tokens": None,
}  # fmt: skip  the library's own, which say nothing about the model


def default_sampling(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config's sampling values that differ from the library's own, with the overrides on top."""
    source = config.generation_config
    if source == "auto":
        values = checkpoint.generation_config
    elif source == "vllm":
        values = {}
    else:
        path = Path(source) / "generation_config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--generation-config {source!r}: {path.name} cannot be read ({error})") from None
    own = {name: values[name] for name, usual in SAMPLING_DEFAULTS.items() if values.get(name) not in (None, usual)}
    laid_over = {name: value for name, value in config.override_generation_config.items() if name in SAMPLING_DEFAULTS}
    return {name: value for name, value in (own | laid_over).items() if value is not None}


def cache_folder(config: EngineConfig) -> Path | None:
    """Where converted weights and compiled steps are kept; None keeps nothing."""
    if config.cache_dir == "":
        return None
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-serving-runtime"


def _timed(seconds, phase, function, *args):
    start = time.monotonic()
    result = function(*args)
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - start
    return result


def _warm_up(loaded: Loaded) -> Loaded:
    """Runs every step once with nothing in it, so that no first request pays for a first call."""
    state = loaded.state
    for bucket, run in sorted(loaded.steps.items()):  # in one order on every host
        buffer = StepBuffer(StepLayout.of(bucket, loaded.plan), loaded.plan.max_num_seqs)
        buffer.counts[4] = buffer.advance[0] = 1  # a padding row that runs: a window without any would do nothing
        state, out = run(loaded.weights, state, buffer.packed, loaded.no_mask[bucket.num_rows])
        jax.block_until_ready(out)
    state = loaded.load_history(state, np.int32(0), np.zeros(loaded.plan.max_model_len, np.int32))
    state = loaded.load_tables(state, np.int32(0), loaded.usual_tables)
    return dataclasses.replace(loaded, state=state)
