"""The kernels on a kind of CPU that this machine is not: they compile for it, and give the reference's numbers."""

import os
import pathlib
import subprocess
import sys

import llvmlite.binding
import pytest

# What the kernels choose their instructions by. The AVX2 kind runs on every CPU of the AVX512 kind.
AVX2 = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt"
AVX512 = AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni,+avx512bf16"
KINDS = {"avx2": ("haswell", AVX2), "avx512": ("znver4", AVX512)}

COMPILE = """
from pallas_kernels import cpu
from pallas_kernels.cpu import vectors
cpu.register()
cpu.register_int4()
print("lanes", vectors.LANES)
"""
NUMBERS = [pathlib.Path(__file__).with_name(name) for name in ("test_linear.py", "test_cpu_attention.py")]


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="kinds of x86 are compiled for")
def test_kernels_compile_for_another_kind_of_cpu_and_run_where_they_can():
    here = llvmlite.binding.get_host_cpu_features()
    other, lanes = ("avx2", 8) if here.get("avx512bf16") and here.get("avx512vnni") else ("avx512", 16)
    assert run(other, "-c", COMPILE) == f"lanes {lanes}\n"
    if other == "avx2":
        assert " passed" in run(other, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, NUMBERS))


def run(kind, *arguments):
    """The output of a Python process whose kernels are compiled for that kind."""
    name, features = KINDS[kind]
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    return process.stdout
