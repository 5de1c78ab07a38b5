"""Kernels for CPUs: numba-compiled loops that XLA calls in the middle of its programs.

XLA's small operations cost tens of microseconds each on a few cores, and its one-row bfloat16 products run far
below memory speed. The kernels here read weights and pages in place, count only real tokens, and split their
work over threads of their own for about a microsecond a call.

A compiled program refers to its kernels by name. A process that loads programs from disk without tracing them
calls `register` first.
"""

import functools
import importlib.util
import pathlib
import sys


@functools.cache
def is_available() -> bool:
    """Whether the kernels can run here: Linux, a 64-bit machine, and numba installed."""
    return sys.platform == "linux" and sys.maxsize > 2**32 and importlib.util.find_spec("numba") is not None


@functools.cache
def has_matrix_units() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 (AMX): XLA's own products use that, and the kernels do not."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text().split()


@functools.cache
def register():
    """Compiles the kernels, or loads them from disk, makes XLA know them, and starts the threads.

    Returns:
        The pool of threads; `num_threads` and `start` say and change how many work on each kernel. Programs
        traced before a change keep the number they were traced with as their upper limit.
    """
    from pallas_kernels.cpu import build, threads

    build.compile_apart(f"from pallas_kernels import cpu; cpu.compile_share({share})" for share in range(len(_SHARES)))
    pool = threads.Pool(build.helper_entry())  # first: the kernels refer to it
    for define in _SHARES:
        define(build)
    pool.start(threads.available_threads())
    return pool


def compile_share(index: int) -> None:
    """Compiles some of the kernels to the disk, in a process that does nothing else."""
    from pallas_kernels.cpu import build, threads

    threads.Pool(build.helper_entry())
    _SHARES[index](build)


def _define_attention(build) -> None:
    from pallas_kernels.cpu import attention

    build.chunk_function(attention.write, attention.WRITE_CHUNK)
    build.chunk_function(attention.attend, attention.ATTEND_CHUNK)
    build.handler(attention.handle, attention.TARGET)


def _define_others(build) -> None:
    from pallas_kernels.cpu import choosing, experts, likeliest, matmul, untouched

    build.chunk_function(matmul.chunk, matmul.CHUNK)
    build.handler(matmul.handle, matmul.TARGET)
    build.handler(experts.handle, experts.TARGET)
    build.handler(likeliest.handle, likeliest.TARGET)
    build.chunk_function(choosing.chunk, choosing.CHUNK)
    build.handler(choosing.handle, choosing.TARGET)
    build.handler(untouched.handle, untouched.TARGET)


_SHARES = _define_attention, _define_others  # these take about as long to compile


def products() -> str:
    """What the kernels multiply by on this CPU; programs that call them depend on it."""
    from pallas_kernels.cpu import vectors

    return f"{vectors.LANES} lanes, pairs {vectors.MULTIPLIES_PAIRS}, bytes {vectors.HAS_BYTE_DOT}"


def blank(shape, dtype):
    """An array that takes memory only as it is written; for use while tracing, after `register`."""
    from pallas_kernels.cpu import untouched

    return untouched.blank(shape, dtype)
