"""Weights in panels: where each byte goes, and that it is found again."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, panels


@pytest.mark.parametrize("shape", [(64, 32), (2, 96, 64), (3, 32, 64)], ids=str)
@pytest.mark.parametrize(
    "dtype, width", [(jnp.bfloat16, 2), (jnp.int8, 4), (jnp.int4, 8)], ids=["bf16", "int8", "int4"]
)
def test_a_panel_has_a_word_of_each_row_in_turn(shape, dtype, width):
    kernel = np.random.default_rng(0).integers(-8, 8, shape)
    packed = panels.pack(jnp.asarray(kernel, dtype))
    assert packed.shape == shape and packed.dtype == dtype
    rows, words = kernel.reshape(-1, shape[-1]), np.asarray(packed, np.int64).reshape(-1, panels.num_outs(), width)
    per_row, last = shape[-1] // width, panels.num_outs() - 1
    for panel, word, row in [(0, 0, 0), (0, 1, 5), (len(rows) // panels.num_outs() - 1, per_row - 1, last)]:
        expected = rows[panel * panels.num_outs() + row, word * width : (word + 1) * width]
        np.testing.assert_array_equal(words[panel * per_row + word, row], expected)
    np.testing.assert_array_equal(panels.unpack(packed), kernel)


def test_scales_stand_one_of_each_row_in_turn():
    scale_OJ = jnp.arange(64 * 3, dtype=jnp.float32).reshape(64, 3).astype(jnp.bfloat16)
    packed = panels.pack(scale_OJ, width=1)
    np.testing.assert_array_equal(packed.ravel()[: panels.num_outs()], scale_OJ[: panels.num_outs(), 0])
    np.testing.assert_array_equal(panels.unpack(packed, width=1), scale_OJ)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=["bf16", "int8"])
def test_numpy_and_jax_pack_alike(dtype):
    kernel = jnp.asarray(np.random.default_rng(0).integers(-100, 100, (32 * (panels.AT_ONCE + 3), 64)), dtype)
    place = np.array(kernel)
    panels.pack_in_place(place)
    np.testing.assert_array_equal(place, panels.pack(kernel))


def test_rows_are_found_in_panels():
    kernel = jnp.asarray(np.random.default_rng(0).integers(-100, 100, (96, 64)), jnp.bfloat16)
    indices = jnp.asarray([0, 31, 32, 95, 7, 7])
    np.testing.assert_array_equal(panels.rows(panels.pack(kernel), indices), kernel[indices])


def test_only_what_is_multiplied_so_here_suits(monkeypatch):
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: False)
    monkeypatch.setattr(cpu, "is_available", lambda: True)
    assert panels.suits(64, 96, jnp.bfloat16)
    halves = 3 * panels.num_outs()
    assert not panels.suits(halves, 96, jnp.bfloat16), "two halves of it would be no whole panels"
    assert not panels.suits(64, 48, jnp.bfloat16)
    assert not panels.suits(64, 96, jnp.float32)
    assert panels.suits(64, 96, jnp.int4) and not panels.suits(64, 80, jnp.int4)
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: True)
    assert panels.suits(64, 96, jnp.int4), "XLA has no product of int4"
    assert not panels.suits(64, 96, jnp.bfloat16), "matrix units read weights as they are"
