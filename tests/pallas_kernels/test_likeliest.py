"""Each row's likeliest token without its scores is the one that the scores give, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, panels
from pallas_kernels.cpu import likeliest as kernel
from pallas_kernels.likeliest import finds, likeliest

S, I, V = 13, 128, 4096  # two tiles of rows; many chunks, which two threads take from both ends

pytestmark = pytest.mark.skipif(
    not cpu.is_available() or not panels.suits(V, I, jnp.bfloat16), reason="needs the kernels for CPUs, in panels"
)


def vocabulary(dtype, seed=0):
    """Vectors of tokens, and their scales."""
    rng = np.random.default_rng(seed)
    if dtype == jnp.int8:
        scale_V = jnp.asarray(rng.uniform(0.5, 2.0, V), jnp.float32)
        return jnp.asarray(rng.integers(-127, 128, (V, I)), jnp.int8), scale_V
    return jnp.asarray(rng.standard_normal((V, I)) * I**-0.5, dtype), None


def states(seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((S, I)), jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="implementation")
def find(x_SI, kernel_VI, scale_V=None, num_rows=None, implementation=None):
    options = {"kernel_scale": scale_V, "in_panels": True, "implementation": implementation}
    return likeliest(x_SI, panels.pack(kernel_VI), num_rows, **options)


@functools.partial(jax.jit, static_argnums=2)
def find_on(x_SI, packed_VI, num_threads):
    return kernel.likeliest(x_SI, packed_VI, None, kernel_scale=None, num_threads=num_threads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("num_rows", [1, 7, S])
def test_finds_what_the_scores_say(dtype, num_rows):
    kernel_VI, scale_V = vocabulary(dtype)
    assert finds(states(), kernel_VI, in_panels=True)
    for got, want in zip(
        find(states(), kernel_VI, scale_V, jnp.int32(num_rows)),
        find(states(), kernel_VI, scale_V, jnp.int32(num_rows), "reference"),
        strict=True,
    ):
        np.testing.assert_array_equal(got[:num_rows], want[:num_rows])


@pytest.mark.parametrize("num_threads", [2, 4])
def test_takes_the_first_of_equals(num_threads):
    """Wherever they stand: in one panel, or in two of those that a thread takes from either end, or in two threads'."""
    size, pool = 32768, cpu.register()
    kernel_VI = jnp.asarray(np.random.default_rng(0).standard_normal((size, I)), jnp.bfloat16) * I**-0.5
    best_S, before = np.asarray(find(states(), kernel_VI)[0]), pool.num_threads
    pool.start(num_threads)
    try:
        for twins in [(5, 6), (0, size - 1), (size - 300, size - 1), (17, 300, 20000), (size // 2 - 1, size // 2 + 64)]:
            twin_VI = kernel_VI.at[jnp.array(twins)].set(2 * kernel_VI[best_S[3]])
            token_S, _, is_finite_S = find_on(states(), panels.pack(twin_VI), num_threads)
            assert token_S[3] == twins[0], twins
            assert is_finite_S.all()
    finally:
        pool.start(before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sees_a_state_that_is_no_number(bad):
    """In the row that has one, and in no other."""
    kernel_VI, _ = vocabulary(jnp.bfloat16)
    _, _, is_finite_S = find(states().at[4, 9].set(bad), kernel_VI)
    np.testing.assert_array_equal(is_finite_S, np.arange(S) != 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 2047, V - 1])
def test_sees_one_score_that_is_no_number(bad, token):
    kernel_VI, _ = vocabulary(jnp.bfloat16)
    _, _, is_finite_S = find(states().at[:, 9].set(1.0), kernel_VI.at[token, 9].set(bad))
    assert not is_finite_S.any()


def test_rows_do_not_depend_on_each_other():
    kernel_VI, _ = vocabulary(jnp.bfloat16)
    alone = [find(states()[row : row + 1], kernel_VI) for row in range(S)]
    for part, together in enumerate(find(states(), kernel_VI)):
        np.testing.assert_array_equal(together, np.concatenate([of[part] for of in alone]))


def test_refuses_what_it_cannot_multiply():
    kernel_VI, scale_V = vocabulary(jnp.int8)
    with pytest.raises(ValueError, match="128 inputs and the kernel 64"):
        likeliest(states(), kernel_VI[:, :64], kernel_scale=scale_V)
    with pytest.raises(ValueError, match="int8, and only it, has one"):
        likeliest(states(), kernel_VI)
    with pytest.raises(ValueError, match="in panels; pack this one"):
        likeliest(states(), kernel_VI, kernel_scale=scale_V, implementation="cpu")
    with pytest.raises(ValueError, match=r"unknown implementation 'gpu'; choose one of \['cpu', 'reference'\]"):
        likeliest(states(), kernel_VI, kernel_scale=scale_V, implementation="gpu")
