"""The floors of attention kernels count what each chip's pages hold, padding included."""

import pytest

from tests.bench.kernels import CASES, CHIPS


@pytest.mark.parametrize("chip, width", [("v6e", 128), ("H100", 64)])
def test_floors_count_pages_as_the_chip_pads_them(chip, width):
    case, chip = CASES["heads of 64, decode"], CHIPS[chip]
    keys_and_values = case.rows * (case.length + 1) * 2 * case.K * width * 2
    queries_and_answers = 2 * case.rows * case.N * case.H * 2
    assert case.floor(chip) == pytest.approx((keys_and_values + queries_and_answers) / chip.bandwidth)
