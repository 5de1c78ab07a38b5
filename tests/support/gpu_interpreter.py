"""The Hopper kernel of ragged paged attention in Mosaic's GPU interpreter, held to the reference.

The interpreter keeps clocks for copies and threads, reports races and fills fresh memory with NaN.
"""

import functools

import exact_attention
import jax.numpy as jnp
from exact_attention import SCALE, compiled_reference
from jax.experimental.pallas import mosaic_gpu as plgpu
from quick_compile import quick_jit

from pallas_kernels.ragged_paged_attention import cache_shape, gpu, gpu_plan

SPLITS = 2
INTERPRET = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def program(**static):
    """The kernel with these static options, to be called with a batch's arrays and the other options."""
    return quick_jit(functools.partial(gpu.attend, scale=SCALE, splits=SPLITS, interpret=INTERPRET, **static))


compiled = functools.cache(program)
# Of int8 pages with a scale for each key and value, where `gpu.cache_shape` has none.
scaled_shape = functools.partial(cache_shape, platform="gpu", dtype="int8")


def reset():
    """A kernel that raised leaves the interpreter's memory behind; no public name clears it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def assert_same(got, args, *, soft_cap=None, times=2, **options):
    """Answers and cache are right; answers of padding tokens are zeros."""
    expected = compiled_reference(soft_cap)(*args, **options)
    q, cache = args[0], args[3]
    is_taken = q.dtype.name in gpu_plan.QUERIES.get(cache.dtype.name, ())
    weights = gpu_plan.widened(cache.dtype) if is_taken else q.dtype
    rounded = exact_attention.Rounded(weights=weights, answers=q.dtype, splits=SPLITS)
    exact_attention.assert_same(
        got,
        expected,
        args,
        rounded=rounded,
        padding=jnp.zeros_like(q),
        times=times,
        scale=SCALE,
        soft_cap=soft_cap,
        **options,
    )
