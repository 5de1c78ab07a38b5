"""The kernels on kinds of CPU that this machine is not: they compile, and those of AVX2 give right numbers."""

import os
import pathlib
import subprocess
import sys

import llvmlite.binding
import pytest
from quick_compile import QUICK

from pallas_kernels.cpu import vectors

AVX2 = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt"
AVX512 = AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl"
AVX512_BF16 = AVX512 + ",+avx512vnni,+avx512bf16"
ALL = "cpu.compile_share(0); cpu.compile_share(1)"
# LLVM's name of a CPU, its features, what the kernels choose by these, and what is compiled.
KINDS = {
    "avx2": ("haswell", AVX2, (8, False, False, False), "cpu.register()"),
    "avx512": ("skylake-avx512", AVX512, (16, False, False, False), ALL),
    "avx512_bf16": ("znver4", AVX512_BF16, (16, True, True, True), ALL),
    # Its features are those of the kind before, which has all of this one's attention: so the products only.
    "avx512_bf16_of_intel": ("emeraldrapids", AVX512_BF16, (16, True, True, False), "cpu.compile_share(1)"),
}

CHOOSES_BY = ["LANES", "HAS_BYTE_DOT", "HAS_BF16", "MULTIPLIES_PAIRS"]
COMPILE = f"""
from pallas_kernels import cpu
from pallas_kernels.cpu import vectors
{{}}
print(tuple(getattr(vectors, name) for name in {CHOOSES_BY}))
"""
NUMBERS = [pathlib.Path(__file__).with_name(name) for name in ("test_linear.py", "test_cpu_attention.py")]

HERE = {name for name, is_there in llvmlite.binding.get_host_cpu_features().items() if is_there}


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="kinds of x86 are compiled for")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_for_other_kinds_of_cpu(kind):
    _, features, choice, compiles = KINDS[kind]
    if choice == tuple(getattr(vectors, name) for name in CHOOSES_BY):
        pytest.skip("this machine is of that kind: all other tests are of it")
    runs = kind == "avx2" and {word[1:] for word in features.split(",")} <= HERE  # what most laptops have
    # LLVM chooses instructions at any level.
    assert run(kind, "-c", COMPILE.format(compiles), NUMBA_OPT="3" if runs else "0") == f"{choice}\n"
    if runs:
        assert " passed" in run(kind, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, NUMBERS))


def run(kind, *arguments, **environment):
    """The output of a Python process whose kernels are compiled for that kind; the rest, by XLA, in a hurry."""
    name, features, *_ = KINDS[kind]
    of_kind = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    process = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | of_kind | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    return process.stdout
