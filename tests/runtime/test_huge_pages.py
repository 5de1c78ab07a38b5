"""Weights of a CPU move into large pages unchanged."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime import huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def arrays():
    return {
        "odd": jnp.arange(7, dtype=jnp.int8),
        "none": jnp.zeros((0, 3), jnp.float32),
        "one": jnp.float32(3.5),
        "wide": jnp.arange(3 * 2**20, dtype=jnp.float32).astype(jnp.bfloat16).reshape(3, -1),
    }


def test_arrays_keep_their_values_and_the_old_ones_are_gone():
    before, expected = arrays(), {name: np.asarray(array) for name, array in arrays().items()}
    after = huge_pages.gather(before)
    assert list(after) == list(expected)
    for name, array in after.items():
        assert array.dtype == expected[name].dtype and array.sharding == jax.sharding.SingleDeviceSharding(
            jax.devices()[0]
        )
        np.testing.assert_array_equal(array, expected[name])
    assert all(array.is_deleted() for array in before.values())


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no transparent huge pages"
)
def test_arrays_lie_in_large_pages_without_a_copy_of_jax():
    wide = huge_pages.gather(arrays())["wide"]
    address = wide.unsafe_buffer_pointer() + wide.nbytes // 2
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", entry)
        if span and int(span[1], 16) <= address < int(span[2], 16):
            assert int(re.search(r"AnonHugePages:\s+(\d+)", entry)[1]) >= 2048
            return
    raise AssertionError("the array's memory is not this process's")


def test_a_system_without_large_pages_keeps_the_arrays(monkeypatch):
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE")
    before = arrays()
    assert huge_pages.gather(before) == before
