"""Compiles the kernels once a machine: machine code is kept on disk, under a hash of everything it depends on.

Numba alone notices only a change of the file that holds the outermost function. The folder is
$XDG_CACHE_HOME/jax-serving-runtime/kernels (~/.cache/...), or NUMBA_CACHE_DIR where that is set; where none can
be written, the kernels are compiled anew in each process.

What is not on disk is compiled by processes of their own: side by side, for numba compiles one function at a time, and
their compiler's memory, which would be a fifth of a small server's, ends with them.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import jax.ffi
import llvmlite.binding
import numba
from numba.core.registry import cpu_target

from pallas_kernels.cpu import ffi, threads

log = logging.getLogger(__name__)

WHOLE = "whole"  # an empty file beside machine code, once all of it is there
_ADDRESSES = {}  # symbol -> compiled function; kept, since the machine code lives as long as it does


def chunk_function(function, symbol):
    """Compiles `function(argument, chunk, thread)` and gives it a name that handlers find it by."""
    _ADDRESSES[symbol] = compiled = _compile(function, threads.chunk_signature)
    llvmlite.binding.add_symbol(symbol, compiled.address)


def handler(function, target):
    """Compiles `function(frame)` and registers it as an XLA custom-call target of the CPU."""
    _ADDRESSES[target] = compiled = _compile(function, ffi.handler_signature)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(compiled.ctypes), platform="cpu", api_version=1)


def helper_entry():
    """The compiled life of a helper thread."""
    with _cache_folder() as folder:
        options = {"nogil": True, "error_model": "numpy", "cache": folder is not None}
        return numba.njit(numba.types.intp(numba.types.intp, numba.types.intp), **options)(threads.help_out)


def compile_apart(commands: Iterable[str]) -> None:
    """Runs Python commands that compile the kernels, all at once, unless their machine code lies on disk already.

    Processes that start together wait for the first one. What a command could not do is left to this process, which
    then raises the error.
    """
    with _cache_folder() as folder:
        if folder is None or (folder / WHOLE).exists():
            return
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / WHOLE).exists():
                return
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
            running = [
                subprocess.Popen(
                    [sys.executable, "-c", command],
                    env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
                for command in commands
            ]  # fmt: skip
            try:
                said = [process.communicate()[0] for process in running]
            except BaseException:
                for process in running:
                    process.kill()
                raise
            failed = [words for process, words in zip(running, said, strict=True) if process.returncode]
            for words in failed:
                log.warning("a process that compiled kernels failed: %s", words.decode(errors="replace")[-2000:])
            if not failed:
                (folder / WHOLE).touch()


def _compile(function, signature):
    with _cache_folder() as folder:
        return numba.cfunc(signature, cache=folder is not None, error_model="numpy", nogil=True)(function)


@contextlib.contextmanager
def _cache_folder():
    """Points numba at our folder for a moment; yields it, or None where none can be written."""
    before = numba.config.CACHE_DIR
    root = pathlib.Path(before) if before else _cache_home() / "jax-serving-runtime" / "kernels"
    folder = root / _fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    numba.config.CACHE_DIR = str(folder) if writable else before
    try:
        yield folder if writable else None
    finally:
        numba.config.CACHE_DIR = before


def _cache_home() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")


def _fingerprint() -> str:
    """Names the sources, the compilers and the CPU."""
    cpu = cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(
        f"{numba.__version__} {llvmlite.binding.llvm_version_info} {cpu} {numba.config.OPT}".encode()
    )
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
