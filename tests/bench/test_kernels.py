"""Floors of kernels count what each chip moves, times are of kernels alone, and schedules of what TPU compilers say."""

import dataclasses
import functools
import os
import subprocess
import sys

import absent_gpu
import absent_tpu
import jax
import jax.numpy as jnp
import kernel_cases
import kernel_timing
import numpy as np
import pytest
from kernel_cases import CASES, SHOWN

from runtime.footprint import Footprint, executed, instructions
from tests.bench import kernels

TINY = {
    "attention, decode": kernel_cases.Attention(2, 64, 1, N=4, K=2, H=32, B=16),
    "attention, chunk": kernel_cases.Attention(2, 64, 8, N=4, K=2, H=32, B=16),
    "int4": kernel_cases.Int4Matmul(8, 128, 256),
    "experts": kernel_cases.GroupedMatmul(8, 4, 2, 128, 256),
    "latent": kernel_cases.LatentAttention(2, 64, 1, N=4, R=32, H=16, B=16),
    "scan, decode": kernel_cases.SelectiveScan(2, 1, 64, 16),
    "scan, chunk": kernel_cases.SelectiveScan(2, 16, 64, 16),
}


@pytest.mark.parametrize("chip, width", [("v6e", 128), ("h100", 64)])
def test_floors_count_pages_as_the_chip_pads_them(chip, width):
    case, chip = CASES["heads of 64, decode"], SHOWN[chip]
    keys_and_values = case.rows * (case.length + 1) * 2 * case.K * width * 2
    queries_and_answers = 2 * case.rows * case.N * case.H * 2
    assert case.floor(chip) == pytest.approx((keys_and_values + queries_and_answers) / chip.bandwidth)


def test_what_must_move_and_be_computed():
    """By hand, of the shapes that are published."""
    fp8, int8 = (CASES[f"8B decode {name}, 64 x 8k"] for name in ("fp8", "int8"))
    queries_and_answers = 2 * 64 * 32 * 128 * 2
    assert fp8.bytes("gpu") == fp8.bytes("tpu") == 64 * 8193 * 16 * 128 + queries_and_answers
    assert int8.bytes("tpu") == 64 * 8193 * 16 * 128 * 132 / 128 + queries_and_answers  # scales behind a page's tokens
    assert int8.bytes("gpu") == 64 * 8193 * 17 * 128 + queries_and_answers  # one vector more, of scales
    matmul, x = CASES["int4 gate and up of 8B, 64"], 64 * 2
    weights = 2 * 14336 * (4096 / 2 + 2 * 2 * 4096 / 32)
    assert (matmul.bytes("tpu"), matmul.flops) == (weights + x * (4096 + 14336), 2 * 64 * 2 * 14336 * 4096)
    experts, rows = CASES["experts of Mixtral-8x7B, 64"], 64 * 2
    assert experts.bytes("tpu") == 2 * 8 * 14336 * 4096 + 64 * 2 * 4096 + rows * 4 * 14336
    few = kernel_cases.GroupedMatmul(2, 8, 2, 4096, 14336)  # four of eight experts have a token
    assert few.bytes("tpu") == 2 * 4 * 14336 * 4096 + 2 * 2 * 4096 + 4 * 4 * 14336
    latent, width = CASES["latent decode, 64 x 2k"], {"tpu": 640, "gpu": 576}
    for platform, wide in width.items():
        assert latent.bytes(platform) == 2 * 64 * (2049 * wide + 16 * (512 + 64 + 512))
    scan = CASES["scan of Mamba-2.8B, 64 decodes"]
    states, parameters = 2 * 4 * 64 * 16 * 5120, 4 * (16 * 5120 + 5120)
    assert scan.bytes("tpu") == states + parameters + 2 * 64 * (3 * 5120 + 2 * 16)


@pytest.mark.parametrize("name", TINY)
def test_a_timed_program_does_what_as_many_calls_do(name):
    """What each call writes is there for the next, and every set of arrays has its turns."""
    case, num_turns = TINY[name], 3
    sets, expected = ([case.arrays("cpu") for _ in range(2)] for _ in range(2))
    step = jax.jit(case.function)
    for _ in range(num_turns):
        for arrays in expected:
            results = step(*arrays)
            for index, array in zip(case.written, results[1:] if case.written else (), strict=True):
                arrays[index] = array
    after = kernel_timing.repeated(case.function, case.written, num_turns, sets)
    for arrays, wanted in zip(after, expected, strict=True):
        for array, other in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("name", ["int4", "experts", "latent"])
def test_no_product_of_a_timed_program_leaves_the_loop(name, monkeypatch):
    monkeypatch.setattr("pallas_kernels.cpu.is_available", lambda: False)
    case, num_turns = TINY[name], 1000
    program = kernel_timing.repeated.lower(case.function, case.written, 1, [case.shapes("cpu")]).compile()
    products = [line for line in executed(program.as_text(), num_turns) if line.op in ("dot", "ragged-dot")]
    assert products and {line.times for line in products} <= {num_turns, num_turns * num_turns}


def test_a_time_has_no_dispatch_in_it():
    now = 0.0

    def run(num_turns):
        nonlocal now
        now += 0.02 + 30e-6 * num_turns

    assert kernel_timing.seconds_a_turn(run, runs=5, clock=lambda: now) == pytest.approx(30e-6)


def test_sets_of_arrays_overflow_the_caches_of_a_chip():
    assert kernel_timing.num_sets(64 * 2**20) == 8
    assert kernel_timing.num_sets(200 * 2**20) * 200 * 2**20 > 500 * 2**20
    assert kernel_timing.num_sets(2**32) == 1


def test_every_kernel_is_timed(monkeypatch, capsys):
    """On a CPU, since the table itself asks for an accelerator."""
    monkeypatch.setattr(kernel_timing, "LONG_S", 1e-4)
    monkeypatch.setattr(kernel_timing, "SET_BYTES", 1)
    kernels.timed_rows(TINY, runs=1, platform="cpu")
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["case", "us", "GB/s", "TFLOP/s"]
    assert [row[:34].strip() for row in rows] == list(TINY)
    assert all(np.isfinite(float(row[34:].split()[0])) for row in rows)  # on a busy machine it may be none at all
    with pytest.raises(SystemExit, match="no accelerator"):
        kernels.time_table(TINY, 1)


def on(platform, mark, reason, *names):
    """Cases that run where the platform's compiler is."""
    marks = [mark, pytest.mark.skipif(bool(reason), reason=str(reason))]
    return [pytest.param(platform, name, marks=marks, id=f"{platform} {name}") for name in names]


@pytest.mark.parametrize(
    "platform, name",
    [
        *on("tpu", pytest.mark.tpu, absent_tpu.prepare(), "8B decode, 64 x 1k", *kernel_cases.OTHERS),
        *on("gpu", pytest.mark.gpu, absent_gpu.prepare(), "8B decode, 64 x 1k", "scan of Mamba-2.8B, 64 decodes"),
    ],
)
def test_a_timed_program_copies_no_array(platform, name):
    """A time has nothing in it but the kernel: neither weights nor what is written is brought elsewhere first."""
    case, shapes, num_turns = CASES[name], CASES[name].shapes(platform), 1000
    function, size, sets = case.function, len(shapes), 2

    def program(num_turns, *arrays):
        cut = [list(arrays[i * size : (i + 1) * size]) for i in range(sets)]
        return kernel_timing.repeated(function, case.written, num_turns, cut)

    arguments = [jax.ShapeDtypeStruct((), jnp.int32), *shapes * sets]
    compiled = functools.partial(absent_tpu.compile_for, "v5e") if platform == "tpu" else absent_gpu.compile_for_h100
    executable, _ = compiled(program, arguments, donate=range(1, len(arguments)))
    every, found = instructions(executable.as_text(), num_turns), Footprint.of(executable)
    in_loop = [move for move in dataclasses.replace(found, instructions=every).moves() if move.times >= num_turns]
    assert [move for move in in_loop if move.arrays[0].is_main and move.arrays[0].num_bytes >= 2**20] == []
    assert executable.memory_analysis().alias_size_in_bytes >= sets * sum(kernel_cases.num_bytes(s) for s in shapes)


@pytest.mark.tpu
@pytest.mark.skipif(bool(absent_tpu.prepare()), reason=str(absent_tpu.prepare()))
def test_the_compilers_figures_of_a_kernel_of_each_kind():
    names = "8B decode, 64 x 1k", "heads of 64, decode", "int4 gate and up of 8B, 16", "scan of Mamba-2.8B, 64"
    command = [sys.executable, "-m", "tests.bench.kernels", "--schedule", "v5e", "tpu7x", "--case", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    for chip, table in zip(("v5e", "tpu7x"), done.stdout.split("static schedule. ")[1:], strict=True):
        rows = {
            line[:34].strip() + " " + line[34:].split()[0]: line[34:].split()[1:]
            for line in table.splitlines()
            if line[34:]
        }
        bundles, spills = map(int, rows["8B decode, 64 x 1k ours"][2:4])
        assert 1000 < bundles < 10000 and spills < 1000
        assert (rows["8B decode, 64 x 1k ours"][6] == "-") == (chip == "tpu7x")  # no clock to count bundles by
        assert rows["heads of 64, decode jax"][:4] == ["does", "not", "take", "it:"]
        matmul = rows["int4 gate and up of 8B, 16 int4_matmul_few.1"]
        steps, step, kernel, others, floor = matmul[5:]
        assert int(steps) == 2 * 14336 // 512 * 2 and int(step) < int(matmul[3])
        if chip == "v5e":
            assert float(kernel) == pytest.approx(int(steps) * int(step) / 1.5e9 * 1e6, abs=0.01)
            assert float(rows["scan of Mamba-2.8B, 64 decodes XLA"][8]) > float(floor) / 2 and float(others) > 0
