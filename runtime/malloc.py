"""Memory that the C library keeps for itself after it was freed."""

import contextlib
import ctypes
from collections.abc import Iterator

# Of mallopt(3). Larger blocks than MMAP_BYTES are the system's; of smaller ones TRIM_BYTES may be kept.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MMAP_BYTES, TRIM_BYTES = 32 * 2**20, 64 * 2**20  # as far as glibc raises them by itself once such blocks are freed


def trim() -> None:
    """Returns it to the system: after loading, compiling or writing hundreds of MB."""
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def nothing_large_kept() -> Iterator[None]:
    """Inside, a freed megabyte goes back at once. For many threads that pass buffers through: each would keep some."""
    _set(MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        _set(MMAP_THRESHOLD, MMAP_BYTES)  # a step's own buffers are to be kept from one to the next
        _set(TRIM_THRESHOLD, TRIM_BYTES)


def _set(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
