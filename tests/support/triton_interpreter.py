"""The Triton kernel of ragged paged attention in Pallas's own interpreter, held to the reference."""

import functools

import exact_attention
import jax.numpy as jnp
from exact_attention import SCALE, compiled_reference
from quick_compile import quick_jit

from pallas_kernels.ragged_paged_attention import gpu, gpu_plan

SPLITS = 2


def program(**static):
    """The kernel with these static options, to be called with a batch's arrays and the other options."""
    run = functools.partial(gpu.attend, scale=SCALE, splits=SPLITS, kernel="triton", interpret=True, **static)
    return quick_jit(run)


def assert_same(got, args, *, soft_cap=None, **options):
    """Answers and cache are right; answers of padding tokens are zeros."""
    q, cache = args[0], args[3]
    weights = gpu_plan.widened_for(q.dtype, cache.dtype)
    rounded = exact_attention.Rounded(weights=weights, answers=q.dtype, splits=SPLITS)
    exact_attention.assert_same(
        got, compiled_reference(soft_cap)(*args, **options), args,
        rounded=rounded, padding=jnp.zeros_like(q), scale=SCALE, soft_cap=soft_cap, **options,
    )  # fmt: skip
