"""Weights of a CPU are made in large pages, which become the arrays' own memory."""

import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from converters.place import Made, place
from runtime import huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
VALUES = {
    "odd": np.arange(7, dtype=np.int8),
    "none": np.zeros((0, 3), np.float32),
    "one": np.float32(3.5),
    "wide": np.arange(3 * 2**20).astype(ml_dtypes.bfloat16).reshape(3, -1),
    "narrow": np.arange(12).astype(ml_dtypes.int4).reshape(3, 4),
}
SHAPES = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in VALUES.items()}


def placed(rooms):
    def work(name):
        return Made((name,), len(SHAPES[name].shape), lambda box, into: np.copyto(into[name], VALUES[name][box]))

    return place([work(name) for name in SHAPES], SHAPES, dict.fromkeys(SHAPES, HERE), rooms=rooms)


def assert_right(arrays):
    assert list(arrays) == list(SHAPES)
    for name, array in arrays.items():
        assert array.dtype == SHAPES[name].dtype and array.sharding == HERE
        np.testing.assert_array_equal(array, VALUES[name])


def test_arrays_have_their_values_and_lie_where_they_were_made():
    rooms = huge_pages.rooms(SHAPES)
    arrays = placed(rooms)
    assert_right(arrays)
    for name in ("odd", "wide"):
        assert arrays[name].unsafe_buffer_pointer() == rooms[name].ctypes.data
    assert arrays["wide"].unsafe_buffer_pointer() - arrays["odd"].unsafe_buffer_pointer() < 4096


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no transparent huge pages"
)
def test_arrays_lie_in_large_pages():
    wide = placed(huge_pages.rooms(SHAPES))["wide"]
    address = wide.unsafe_buffer_pointer() + wide.nbytes // 2
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", entry)
        if span and int(span[1], 16) <= address < int(span[2], 16):
            assert int(re.search(r"AnonHugePages:\s+(\d+)", entry)[1]) >= 2048
            return
    raise AssertionError("the array's memory is not this process's")


def test_a_system_without_large_pages_makes_the_same_arrays(monkeypatch):
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE")
    assert not huge_pages.rooms(SHAPES)
    assert_right(placed({}))
