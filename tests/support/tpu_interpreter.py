"""The TPU kernel of ragged paged attention in the Pallas TPU interpreter, held to the reference.

The interpreter detects races, fills fresh memory with NaN and runs a copy only when somebody waits for it, so that a
forgotten wait gives NaN here instead of the right answer by luck.
"""

import functools

import exact_attention
import jax.numpy as jnp
import numpy as np
from exact_attention import SCALE, compiled_reference
from jax.experimental.pallas import tpu as pltpu
from quick_compile import quick_jit

from pallas_kernels.ragged_paged_attention import tpu, tpu_plan

INTERPRET = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
SMALL = dict(decode_blocks=tpu_plan.Blocks(1, 32, 16), chunk_blocks=tpu_plan.Blocks(16, 32, 16))


def program(**static):
    """The kernel with these static options, to be called with a batch's arrays and the other options."""
    return quick_jit(functools.partial(tpu.attend, scale=SCALE, interpret=INTERPRET, **(SMALL | static)))


compiled = functools.cache(program)
reset = pltpu.reset_tpu_interpret_mode_state  # after a kernel that raised


def assert_same(got, args, *, soft_cap=None, **options):
    """Answers and cache are right; a padding token keeps its query."""
    expected = compiled_reference(soft_cap)(*args, **options)
    q, cache = args[0], args[3]
    weights = np.dtype(np.float32) if cache.dtype == np.float32 else jnp.dtype(jnp.bfloat16)
    rounded = exact_attention.Rounded(weights=weights, answers=q.dtype)
    exact_attention.assert_same(
        got, expected, args, rounded=rounded, padding=q, scale=SCALE, soft_cap=soft_cap, **options
    )
