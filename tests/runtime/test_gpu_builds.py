"""A published model compiles for H100s that are not here: it fits, keeps pages in place, and gathers no weight."""

import absent_gpu
import pytest
from published import GPU, measured

pytestmark = pytest.mark.gpu
reason = absent_gpu.prepare()
if reason:
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("build", GPU, ids=str)
def test_steps_fit_and_copy_neither_pages_nor_weights(build, tmp_path):
    for step in measured(build, tmp_path):
        step.check()
