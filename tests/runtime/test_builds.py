"""Published models compile for TPU hosts that are not here: they fit, keep pages in place, and gather no weight."""

import absent_tpu
import pytest
from published import TPU, measured

pytestmark = pytest.mark.tpu
reason = absent_tpu.prepare()
if reason:
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("build", TPU, ids=str)
def test_steps_fit_and_copy_neither_pages_nor_weights(build, tmp_path):
    for step in measured(build, tmp_path):
        step.check()
