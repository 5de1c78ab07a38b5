"""Published models compile for hosts that are not here: they fit, keep pages in place, and gather no weight."""

import absent_gpu
import absent_tpu
import pytest
from published import GPU, TPU, measured


def cases(builds, mark, missing):
    """Builds that run where their compiler is."""
    marks = [mark, pytest.mark.skipif(bool(missing), reason=str(missing))]
    return [pytest.param(build, marks=marks, id=str(build)) for build in builds]


ON_TPU = cases(TPU, pytest.mark.tpu, absent_tpu.prepare())
ON_GPU = cases(GPU, pytest.mark.gpu, absent_gpu.prepare())


@pytest.mark.parametrize("build", ON_TPU + ON_GPU)
def test_steps_fit_and_copy_neither_pages_nor_weights(build, tmp_path):
    for step in measured(build, tmp_path):
        step.check()
