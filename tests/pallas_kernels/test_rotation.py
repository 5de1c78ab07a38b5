"""A rotation changes no product and no length, and leaves nothing that stands out."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotation import block_size, hadamard, rotate, rotate_rows


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("num_in, size", [(576, 64), (1536, 64), (96, 32), (20, 4), (7, 1)])
def test_products_and_lengths_stay_and_twice_is_nothing(num_in, size):
    assert block_size(num_in) == size
    x, w = random(5, num_in), random(3, num_in)
    turned = np.asarray(rotate(jnp.asarray(x)))
    np.testing.assert_allclose(turned, rotate_rows(x), atol=1e-6)
    exact = [each.astype(np.float64) for each in (turned, rotate_rows(w), x, w)]  # products of float32 are off by more
    np.testing.assert_allclose(exact[0] @ exact[1].T, exact[2] @ exact[3].T, atol=1e-4)
    np.testing.assert_allclose(rotate(jnp.asarray(turned)), x, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
    assert size == 1 or np.abs(turned - x).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_one_large_element_is_shared_by_its_block_alone(dtype):
    x = jnp.zeros((1, 256), dtype).at[0, 70].set(800)
    turned = np.asarray(rotate(x))
    assert turned.dtype == np.float32
    np.testing.assert_array_equal(np.abs(turned[0]), np.where(np.arange(256) // 64 == 1, 100, 0))


def test_hadamard_matrices_are_their_own_inverse():
    for size in (1, 2, 16, 64):
        signs = hadamard(size)
        assert set(np.unique(signs)) <= {-1, 1} and np.array_equal(signs, signs.T)
        np.testing.assert_array_equal(signs @ signs, size * np.eye(size))


def test_a_row_of_weights_is_turned_alike_wherever_it_stands():
    rows = np.random.default_rng(0).normal(size=(50, 192)).astype(np.float32)
    turned = rotate_rows(rows)
    for start, stop in [(0, 1), (3, 4), (5, 20), (49, 50)]:
        np.testing.assert_array_equal(rotate_rows(rows[start:stop]), turned[start:stop])
    np.testing.assert_array_equal(rotate_rows(rows[:, 64:128]), turned[:, 64:128])
