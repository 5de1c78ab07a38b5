"""Compiled steps on disk: one entry holds all programs of an engine, named by all that they depend on.

That is the model and the plan, our own source, JAX and the device's compiler, their flags, and the devices; of the host
only where the host is the device. So a host without accelerators can make an entry for one that has them. Each file's
first 32 bytes are the SHA-256 of the rest. `facts.json` says in words what the entry depends on, so that a start that
finds only another can tell what changed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable

from runtime import entries
from runtime.machine import Machine

log = logging.getLogger(__name__)
FACTS = "facts.json"
# Distributions whose version is the compiler's, by platform; a CPU's is in jaxlib.
COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda13-pjrt"}
MAX_SHOWN = 60


def facts_of(of_engine: Mapping[str, str], machine: Machine, devices: Sequence[Any]) -> dict[str, str]:
    """{name: text} of all that programs depend on.

    Args:
        of_engine: what the engine adds: its model and plan.
        devices: those of the machine that the programs run on.
    """
    kind = machine.platform
    flags = os.environ.get("XLA_FLAGS", "").split()
    if kind != "cpu":  # where the compiler runs is not where the program does
        flags = [flag for flag in flags if not flag.startswith(("--xla_force_host", "--xla_cpu"))]
    return {
        **of_engine,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "compiler": _version(COMPILERS.get(kind)),
        "flags": " ".join(flags),
        "options": " ".join(f"{name}={value}" for name, value in machine.compiler_options.items()),
        "libtpu flags": os.environ.get("LIBTPU_INIT_ARGS", "") if kind == "tpu" else "",
        "devices": f"{len(machine.devices)} x {kind}:{machine.devices[0].device_kind}",
        "used": " ".join(_place(device) for device in devices),
        # An accelerator's program is one for all its hosts, as in JAX's own cache, which one writes and all read.
        "host": f"{jax.process_index()} of {jax.process_count()}" if kind == "cpu" else "",
        "processor": _cpu_features() if kind == "cpu" else "",
        "processors": str(_num_cpus()) if kind == "cpu" else "",
        "source": source_digest(),
    }


class KeptSteps:
    """One entry, found or to be made.

    Args:
        parent: folder of all entries.
        facts: see facts_of.
        keys: of the programs; str(key) names a file.
    """

    def __init__(self, parent: Path, facts: Mapping[str, str], keys: Iterable[Hashable]):
        self.facts = dict(facts)
        self.paths = {key: f"{str(key).replace(' ', '-')}.jaxexec" for key in keys}
        digest = hashlib.sha256(json.dumps([self.facts, sorted(self.paths.values())], sort_keys=True).encode())
        self.folder = parent / digest.hexdigest()[:32]

    @property
    def is_complete(self) -> bool:
        """Whether every file is there, and may be looked at: another user's folder holds nothing for this one."""
        return all(os.path.exists(self.folder / name) for name in (FACTS, *self.paths.values()))

    def load(self, key: Hashable, devices: Sequence[Any]):
        """The executable, or None, which is said, where there is none that can be trusted."""
        name = self.paths[key]
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            log.warning("compiled step %s cannot be read (%s); compiling it again", name, error.strerror)
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            log.warning("compiled step %s is damaged; compiling it again", name)
            return None
        try:
            # Without its devices a program of a few of them would end this process.
            return serialize_executable.deserialize_and_load(*pickle.loads(data[32:]), execution_devices=devices)
        except Exception as error:  # the library raises many types for a program it cannot run here
            log.warning("compiled step %s cannot be loaded (%s); compiling it again", name, type(error).__name__)
            return None

    def discard(self) -> None:
        entries.discard(self.folder)

    @contextlib.contextmanager
    def making(self) -> Iterator["Draft"]:
        """A draft to save programs into; it becomes the entry in the end, unless something could not be saved."""
        with contextlib.ExitStack() as stack:
            draft = Draft(self)
            with draft.writing():
                self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                entries.sweep(self.folder.parent)
                draft.work = stack.enter_context(entries.workspace(self.folder))
            yield draft
            if draft.work is None:
                return
            with draft.writing(), contextlib.suppress(FileExistsError):  # another process was quicker, with the same
                (draft.work / FACTS).write_text(json.dumps(self.facts, indent=1, sort_keys=True))
                self.discard()
                entries.rename(draft.work, self.folder)

    def nearest(self) -> str:
        """What differs between what is wanted and the entry of this model that is most like it; "" where none is."""
        others, paths = [], []
        with contextlib.suppress(OSError):
            paths = list(self.folder.parent.glob(f"*/{FACTS}"))
        for path in paths:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                found = json.loads(path.read_text())
                if found.get("model") == self.facts["model"]:
                    others.append([name for name in {**found, **self.facts} if found.get(name) != self.facts.get(name)])
                    others[-1] = [_difference(name, found.get(name), self.facts.get(name)) for name in others[-1]]
        return ", ".join(min(others, key=len)) if others else ""


class Draft:
    """Programs being kept, in the folder `work`; None once one could not be."""

    def __init__(self, steps: KeptSteps):
        self._steps = steps
        self.work: Path | None = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A full or read-only disk costs a warning, never the start."""
        try:
            yield
        except OSError as error:
            log.warning("compiled steps are not kept on disk: %s", error)
            self.work = None

    def save(self, key: Hashable, compiled) -> None:
        if (work := self.work) is None:
            return
        with self.writing():
            body = pickle.dumps(serialize_executable.serialize(compiled))
            with open(work / self._steps.paths[key], "wb") as file:
                file.write(hashlib.sha256(body).digest())
                file.write(body)


def _difference(name, there, here) -> str:
    there, here = (f"{text or 'none'}" for text in (there, here))
    short = len(there) + len(here) <= MAX_SHOWN
    return f"{name} {there} (here {here})" if short else name


def _place(device) -> str:
    """Which of a machine's devices it is, and where it stands among them."""
    where = getattr(device, "coords", None)
    return f"{device.id}" + (f"@{','.join(map(str, where))}" if where is not None else "")


def _version(distribution: str | None) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}" if distribution else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _num_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def source_digest() -> str:
    """Digest of our own source that ends up in a compiled step."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("models", "pallas_kernels", "runtime"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
