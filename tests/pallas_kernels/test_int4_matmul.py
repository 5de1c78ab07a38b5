"""The TPU's product with int4 weights, in Pallas's interpreter, against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_matmul


def a_product(T, O, I, G, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.integers(-8, 8, (O, I))
    scale, offset = (jnp.asarray(rng.standard_normal((O, I // G)), jnp.bfloat16) for _ in range(2))
    wide = lambda x: np.asarray(x, np.float64)[..., None]
    exact = (kernel.reshape(O, -1, G) * wide(scale) + wide(offset)).reshape(O, I)
    x_TI = jnp.asarray(rng.standard_normal((T, I)), jnp.bfloat16)
    return (x_TI, jnp.asarray(kernel, jnp.int4), scale, offset), np.asarray(x_TI, np.float64) @ exact.T


# The scales of the few are applied in float32, those of the many make bfloat16 weights.
@pytest.mark.parametrize(
    "T, O, I, G, atol",
    [
        (1, 128, 128, 32, 1e-6),
        (17, 384, 640, 16, 1e-6),
        (64, 128, 256, 64, 1e-6),
        (65, 256, 384, 32, 5e-3),
        (2, 128, 4608, 32, 1e-6),  # 144 groups: scales of the last 16 are fetched as part of 128
        (65, 128, 4608, 32, 5e-3),
    ],
)
def test_matches_numpy(T, O, I, G, atol):
    arguments, want = a_product(T, O, I, G)
    assert int4_matmul.supports(*arguments[:3])
    got = int4_matmul.multiply(*arguments, interpret=True)
    np.testing.assert_allclose(got, want, atol=atol * np.abs(want).max(), rtol=0)


def test_more_tokens_than_one_block_has(monkeypatch):
    monkeypatch.setattr(int4_matmul, "MOST_ROWS", 32)
    monkeypatch.setattr(int4_matmul, "FEW", 16)
    arguments, want = a_product(70, 128, 128, 32)
    got = int4_matmul.multiply(*arguments, interpret=True)
    np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max(), rtol=0)


def test_sums_are_rounded_once():
    """To the nearest bfloat16, however many blocks of inputs they are made of."""
    for T in (3, 70):
        arguments, _ = a_product(T, 128, 2048, 32)
        exact = int4_matmul.multiply(*arguments, interpret=True)
        got = int4_matmul.multiply(*arguments, out_dtype=jnp.bfloat16, interpret=True)
        np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "O, I, G, dtype", [(100, 128, 32, "bfloat16"), (128, 96, 32, "bfloat16"), (128, 128, 32, "float32")]
)
def test_what_does_not_fill_lanes_is_left_to_the_reference(O, I, G, dtype):
    (x_TI, *rest), _ = a_product(4, O, I, G)
    assert not int4_matmul.supports(x_TI.astype(dtype), *rest[:2])


FEW, MANY, MULTIPLY = int4_matmul._few, int4_matmul._many, int4_matmul.multiply
ERRORS = {
    "few: a group takes the scale after its own": (
        3,
        "_few",
        lambda sums, x, kernel, scale, first, Q: FEW(sums, x, kernel, scale, first + 1, Q),
    ),
    "many: a group takes the scale after its own": (
        70,
        "_many",
        lambda sums, x, kernel, scale, first, Q: MANY(sums, x, kernel, scale, first + 1, Q),
    ),
    "few: a row of lanes is left out": (
        3,
        "_few",
        lambda sums, x, *rest: FEW(sums, x[:-1], *rest),
    ),
    "few: a block of inputs is counted twice": (3, "_few", lambda *args: (FEW(*args), FEW(*args))),
    "many: a block of inputs is counted twice": (70, "_many", lambda *args: (MANY(*args), MANY(*args))),
    "offsets are left out": (
        3,
        "multiply",
        lambda x, kernel, scale, offset, **options: MULTIPLY(x, kernel, scale, 0 * offset, **options),
    ),
}


@pytest.mark.parametrize("T, name, fault", ERRORS.values(), ids=ERRORS)
def test_planted_error_is_noticed(monkeypatch, T, name, fault):
    arguments, want = a_product(T, 128, 384, 32)
    monkeypatch.setattr(int4_matmul, name, fault)
    got = int4_matmul.multiply(*arguments, interpret=True)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max(), rtol=0)
