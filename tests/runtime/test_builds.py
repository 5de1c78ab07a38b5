"""Published models compile for hosts that are not here: they fit, keep pages in place, and gather no weight."""

import sys

import absent_gpu
import absent_tpu
import pytest
from published import FAST, GPU, TPU, measured, wrong_collectives

from runtime.errors import ConfigError
from runtime.footprint import Array, Instruction
from tests.bench import builds


def cases(listed, mark, missing):
    """Builds that run where their compiler is."""
    marks = [mark, pytest.mark.skipif(bool(missing), reason=str(missing))]
    return [pytest.param(build, marks=marks, id=str(build)) for build in listed]


ON_TPU = cases(TPU + FAST, pytest.mark.tpu, absent_tpu.prepare())
ON_GPU = cases(GPU, pytest.mark.gpu, absent_gpu.prepare())


@pytest.mark.parametrize("build", ON_TPU + ON_GPU)
def test_steps_fit_and_copy_neither_pages_nor_weights(build, tmp_path):
    for step in measured(build, tmp_path):
        step.check()


def test_a_table_that_lacks_a_build_says_so_and_fails(monkeypatch, capsys):
    def no_compiler(*args):
        raise ConfigError("libtpu is not installed")

    monkeypatch.setattr(builds, "measured", no_compiler)
    monkeypatch.setattr(sys, "argv", ["builds", "--only", "v5p"])
    assert builds.main() == 1
    said = capsys.readouterr()
    assert "Qwen3-32B on v5p-8 is not compiled: libtpu is not installed" in said.out
    assert "1 of 1 builds were not compiled: Qwen3-32B on v5p-8" in said.err
    monkeypatch.setattr(sys, "argv", ["builds", "--only", "v99"])
    assert builds.main() == 1 and "v99" in capsys.readouterr().err
    monkeypatch.setattr(builds, "measured", lambda *args: ())
    monkeypatch.setattr(sys, "argv", ["builds", "--only", "v5p"])
    assert builds.main() == 0


def one(op, dtype, shape, times=1):
    return Instruction(op, (Array(dtype, shape, True),), times)


USUAL = [
    one("all-reduce", "bf16", (64, 4096), 65),
    one("all-reduce", "f32", (64,), 3),
    one("all-gather", "s32", (2, 32, 20)),
    one("all-gather", "f32", (32, 128256)),
    one("all-to-all", "f32", (2, 32, 64128)),
]


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ([], ""),
        ([one("all-reduce", "bf16", (64, 4096))], "66 sums of hidden states"),
        ([one("all-reduce", "f32", (64,), 32)], "35 times all-reduce"),  # one a layer
        ([one("all-reduce", "f32", (64, 14336))], "sums of more than a few numbers"),
        ([one("all-to-all", "bf16", (64, 2048))], "2 times all-to-all"),
        ([one("all-gather", "s32", (64,), 32)], "34 times all-gather"),
        ([one("all-gather", "bf16", (4096, 4096))], "gathers as large as weights"),
        ([one("all-gather", "f32", (4096, 4096))], "gathers as large as weights"),  # widened
        ([one("all-gather", "f32", (2, 64128, 32))], ""),  # scores
        ([one("all-gather", "f32", (2, 64128, 4096))], "gathers as large as weights"),  # the table, widened
        ([one("all-gather", "s8", (64, 128256))], "gathers as large as weights"),  # a table, not scores
        ([one("reduce-scatter", "bf16", (32, 4096))], "1 times reduce-scatter"),
    ],
)
def test_collectives_that_no_step_should_have_are_named(more, wrong):
    weights = [("bf16", (4096, 3072)), ("bf16", (2048, 2048))]
    found = wrong_collectives([*USUAL, *more], 2, (64, 4096), 128256, 32, weights)
    assert found.startswith(wrong) and bool(found) == bool(wrong)
    assert wrong_collectives(USUAL, 1, (64, 4096), 128256, 32, weights)  # a device alone says nothing
    assert not wrong_collectives([], 1, (64, 4096), 128256, 32, weights)
