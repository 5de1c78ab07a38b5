"""Arrays are the same however they come to their devices."""

import jax
import numpy as np
import pytest

from converters import place as placing
from converters.place import Made, place

SHAPES = {"w": (6, 5, 4), "v": (7,), "q": (8, 3, 4), "q_scale": (8, 3)}
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def values(name):
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


def work():
    def alone(name):
        return Made((name,), len(SHAPES[name]), lambda box, into: np.copyto(into[name], values(name)[box]))

    def both(box, into):
        into["q"][...], into["q_scale"][...] = values("q")[box], values("q_scale")[box]

    return [alone("w"), alone("v"), Made(("q", "q_scale"), 2, both, step_bytes=16)]


def placed(**options):
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    return place(work(), shapes, dict.fromkeys(SHAPES, HERE), **options)


@pytest.mark.parametrize("by_slabs", [False, True])
@pytest.mark.parametrize("slab_bytes", [1, 64, 10**9])
def test_slabs_make_the_same_arrays(by_slabs, slab_bytes, monkeypatch):
    monkeypatch.setattr(placing, "SLAB_BYTES", slab_bytes)
    found = placed(by_slabs=by_slabs)
    assert list(found) == list(SHAPES)
    for name, array in found.items():
        np.testing.assert_array_equal(array, values(name), err_msg=name)


def test_a_slab_is_never_larger_than_it_may_be(monkeypatch):
    sizes = []
    monkeypatch.setattr(placing, "SLAB_BYTES", 100)
    monkeypatch.setattr(placing._OnDevice, "take", lambda self, inside, room: sizes.append(room.nbytes))
    placed(by_slabs=True)
    assert sizes and max(sizes) <= 100


def test_progress_ends_at_the_total():
    seen = []
    found = placed(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(array.nbytes for array in found.values()),) * 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_an_error_in_one_array_ends_all():
    def fails(box, into):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        place([Made(("v",), 1, fails)], {"v": jax.ShapeDtypeStruct((7,), np.float32)}, {"v": HERE})
