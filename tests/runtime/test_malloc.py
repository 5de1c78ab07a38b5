"""Memory that is freed while weights are read goes back to the system; what a step frees is kept for the next one."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import ctypes
from runtime import malloc

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096

def kept(size=8 * 2**20):
    before, address = resident(), libc.malloc(size)
    ctypes.memset(address, 1, size)
    libc.free(address)
    return resident() - before

kept(16 * 2**20)  # from now on the C library takes such blocks for usual ones
print(kept())
with malloc.nothing_large_kept():
    malloc.trim()
    print(kept())
print(kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_large_blocks_are_kept_only_outside():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    before, inside, after = map(int, done.stdout.split())
    assert before > 6 * 2**20 and after > 6 * 2**20 and inside < 2**20, (before, inside, after)
