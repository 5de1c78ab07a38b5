"""Lowers and compiles every bucket at start, in threads, and keeps the results on disk.

The hot path only ever calls what is in the table {key: Compiled}; nothing there can recompile.
`CompileCounter` watches JAX itself, so that a compile anywhere after start-up is counted.

A file on disk is named by a digest of everything that the program depends on: model, plan, bucket,
our own source, JAX, flags, and the CPU's features. Its first 32 bytes are the SHA-256 of the rest.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import pickle
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable

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
    """A function to compile: `jitted.lower(*args)`, args being shapes."""

    jitted: Callable
    args: tuple


@dataclasses.dataclass(frozen=True)
class Built:
    """What build() made: the table, and how many came from disk."""

    table: dict
    num_loaded: int
    seconds: float


def build(
    programs: Mapping[Hashable, Program],
    identity: str,
    cache_dir: Path | None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    devices: Sequence[Any] | None = None,
) -> Built:
    """Loads or compiles every program; returns when all are ready.

    Args:
        programs: {key: Program}; str(key) names it in the progress bar and the digest.
        identity: everything the programs depend on that this module cannot see: model and plan.
        cache_dir: folder of serialized executables; None keeps nothing.
        progress: called with (name, done, total) as each becomes ready.
        devices: that the programs run on; the first of all when None.
    """
    start = time.monotonic()
    if cache_dir and jax.config.jax_compilation_cache_dir:
        # On CPU a program compiled beside others that came from JAX's cache loses functions when it is serialized.
        log.warning("JAX_COMPILATION_CACHE_DIR is set, so compiled steps are kept there only")
        cache_dir = None
    devices = devices or jax.devices()[:1]
    if devices[0].platform == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")  # says where the library is that restored kernels call
    base = "\n".join([identity, toolchain(), source_digest(), str([d.id for d in devices])])
    table, loaded = {}, 0
    paths = {key: cache_dir / f"{_digest(base, str(key))}.jaxexec" for key in programs} if cache_dir else {}
    # All or none: what is compiled beside restored programs must not be written, see above.
    restores = bool(paths) and all(path.exists() for path in paths.values())

    def one(key):
        compiled = _load(paths[key], devices) if restores else None
        if compiled is not None:
            return compiled, True
        program = programs[key]
        compiled = program.jitted.lower(*program.args).compile(compiler_options(devices[0].platform))
        if paths and not restores:
            _save(paths[key], compiled)
        return compiled, False

    # Tracing holds the interpreter's lock and compiling does not: a few threads keep the cores busy.
    with concurrent.futures.ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2))) as pool:
        futures = {pool.submit(one, key): key for key in programs}
        for future in concurrent.futures.as_completed(futures):
            table[futures[future]], was_loaded = future.result()
            loaded += was_loaded
            progress(str(futures[future]), len(table), len(programs))
    if restores and loaded < len(programs):
        for path in paths.values():  # the next start compiles and keeps the whole set
            path.unlink(missing_ok=True)
    return Built(table, loaded, time.monotonic() - start)


def compiler_options(platform: str) -> dict[str, str] | None:
    """What XLA is told about a step for this platform.

    On GPUs a step becomes one CUDA graph, its loops and conditions too: a loop outside of one asks the host in each
    turn, which then cannot prepare the next step while this one runs (8B on an H100: 2 ms of each step).
    """
    if platform != "gpu":
        return None
    kinds = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    return {"xla_gpu_enable_command_buffer": kinds}


def toolchain() -> str:
    """Versions, flags and processor features: what makes a compiled program unfit elsewhere."""
    facts = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "cpu": _cpu_features() if jax.default_backend() == "cpu" else "",
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    return json.dumps(facts, sort_keys=True)


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


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _save(path: Path, compiled) -> None:
    """Writes atomically; a full or read-only disk costs a warning, never the start."""
    try:
        body = pickle.dumps(serialize_executable.serialize(compiled))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(body).digest())
            file.write(body)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("compiled step not kept on disk: %s", error)


def _load(path: Path, devices):
    """The executable at path, or None where there is none that can be trusted."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != checksum:
        log.warning("compiled step %s is damaged; compiling it again", path.name)
        return None
    try:
        # Without its devices a program of a few of them would end this process.
        return serialize_executable.deserialize_and_load(*pickle.loads(body), execution_devices=devices)
    except Exception as error:  # the library raises many types for a program it cannot run here
        log.warning("compiled step %s cannot be loaded (%s); compiling it again", path.name, type(error).__name__)
        return None
