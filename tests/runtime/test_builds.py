"""Published models compile for hosts that are not here: they fit, keep pages in place, and gather no weight."""

import sys

import absent_gpu
import absent_tpu
import pytest
from published import GPU, TPU, measured

from runtime.errors import ConfigError
from tests.bench import builds


def cases(listed, mark, missing):
    """Builds that run where their compiler is."""
    marks = [mark, pytest.mark.skipif(bool(missing), reason=str(missing))]
    return [pytest.param(build, marks=marks, id=str(build)) for build in listed]


ON_TPU = cases(TPU, pytest.mark.tpu, absent_tpu.prepare())
ON_GPU = cases(GPU, pytest.mark.gpu, absent_gpu.prepare())


@pytest.mark.parametrize("build", ON_TPU + ON_GPU)
def test_steps_fit_and_copy_neither_pages_nor_weights(build, tmp_path):
    for step in measured(build, tmp_path):
        step.check()


def test_a_table_that_lacks_a_build_says_so_and_fails(monkeypatch, capsys):
    def no_compiler(build, folder):
        raise ConfigError("libtpu is not installed")

    monkeypatch.setattr(builds, "measured", no_compiler)
    monkeypatch.setattr(sys, "argv", ["builds", "--only", "v5p"])
    assert builds.main() == 1
    said = capsys.readouterr()
    assert "not compiled: libtpu is not installed" in said.out
    assert "1 of 1 builds were not compiled: Qwen3-32B on v5p-8" in said.err
    monkeypatch.setattr(sys, "argv", ["builds", "--only", "v99"])
    assert builds.main() == 1 and "v99" in capsys.readouterr().err
    monkeypatch.setattr(builds, "measured", lambda build, folder: ())
    monkeypatch.setattr(sys, "argv", ["builds", "--only", "v5p"])
    assert builds.main() == 0
