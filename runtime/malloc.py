"""Memory that the C library keeps for itself after it was freed."""

import contextlib
import ctypes


def trim() -> None:
    """Returns it to the system: after loading, compiling or writing hundreds of MB."""
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
