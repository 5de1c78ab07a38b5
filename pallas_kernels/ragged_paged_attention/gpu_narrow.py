"""8-bit pages in the GPU's attention kernel: they travel as they are, and become 16 bits where wgmma reads them.

wgmma multiplies numbers of one format, of 16 bits here. Every float8 is a float16 and every int8 a bfloat16, exactly;
both are a conversion or two for a pair of numbers on a Hopper GPU, where float8 to bfloat16 would go through float32.
So of float8 pages queries are float16 too, each divided by a power of two first (`queries`), and softmax weights are.

Scales in the page (see scales.py) come as bytes as well, those of two kv heads at a time, which is the least that TMA
fetches. Mosaic bitcasts no memory, so a number is put together from its four bytes (`put_together`).

Dimension key as in gpu.py.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import scales
from pallas_kernels.ragged_paged_attention.gpu_plan import TILE

SCALE_BYTES = 16  # that are fetched of a token: the scales of two kv heads
TOP = 14  # queries in float16 stay below 2 ** TOP, far from its largest number and from its subnormals


def queries(q_IKRH, dtype):
    """Queries in the kernel's format, and what logits of each are multiplied by to make up for it: float32[I, K, TILE].

    A power of two for each query: nothing is rounded but what is 2 ** 38 times smaller than the query's largest.
    """
    I, K, R, _ = q_IKRH.shape
    exponent_IKR = jnp.zeros((I, K, R), jnp.int32)
    if dtype == jnp.float16:
        q_IKRH = q_IKRH.astype(jnp.float32)
        _, exponent_IKR = jnp.frexp(jnp.max(jnp.abs(q_IKRH), axis=-1))
        # Logits of what is smaller than 2 ** -86 are nothing.
        exponent_IKR = jnp.clip(exponent_IKR - TOP, -100, 120)
        q_IKRH *= power_of_two(-exponent_IKR)[..., None]
    factor_IKR = jnp.pad(power_of_two(exponent_IKR), ((0, 0), (0, 0), (0, TILE - R)), constant_values=1)
    return q_IKRH.astype(dtype), factor_IKR


def power_of_two(n):
    """2 ** n for whole -126 <= n <= 127, exactly: exp2 may be off by a bit."""
    return lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


def fetch_scales(page, inside, head, first_scale, to, barrier):
    """Starts bringing in the scales of some tokens of a page, as bytes. `page` is [B, C, W]."""
    width = page.shape[2]
    first = lax.div(head, 2) * SCALE_BYTES
    here = pl.ds(pl.multiple_of(lax.rem(first, width), SCALE_BYTES), SCALE_BYTES)
    plgpu.copy_gmem_to_smem(page.at[inside, first_scale + lax.div(first, width), here], to, barrier)


def read_scales(bytes_smem, scale_smem, head, begin, end):
    """Puts a block's scales where `of_columns` finds them: of keys, and of values. Outside [begin, end) zeros."""
    for i in (0, 1):
        scale_smem.at[i][...] = put_together(bytes_smem, 2 * lax.rem(head, 2) + i, begin, end)


def of_columns(scale_smem):
    """A block's scales, for what has a column for each of its tokens."""
    scale_U = plgpu.load(scale_smem, layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(scale_U, (TILE, TILE), [1])


def put_together(bytes_smem, number, begin, end):
    """One float32 of each token, the number-th of four: float32[U]. Of tokens outside [begin, end) zero."""
    layout = plgpu.Layout.WGMMA_8BIT
    bytes_UX = plgpu.load(bytes_smem, layout=layout).astype(jnp.int32) & 255
    place_UX = (
        plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (TILE, SCALE_BYTES), 1, layout=layout), layout)
        - number * scales.BYTES
    )
    is_mine_UX = (place_UX >= 0) & (place_UX < scales.BYTES)
    parts_UX = jnp.where(is_mine_UX, bytes_UX << (8 * jnp.where(is_mine_UX, place_UX, 0)), 0)
    token_U = plgpu.layout_cast(
        plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout.reduce(1)), layout.reduce(1)
    )
    scale_U = lax.bitcast_convert_type(parts_UX.sum(axis=1), jnp.float32)
    return jnp.where((token_U >= begin) & (token_U < end), scale_U, jnp.zeros_like(scale_U))


def widen(narrow_smem, wide_smem):
    """A block of keys or values as 16-bit numbers in shared memory."""
    narrow_UH = plgpu.load(narrow_smem, layout=plgpu.Layout.WGMMA_UPCAST_4X)
    wide_smem[...] = narrow_UH.astype(wide_smem.dtype)
    plgpu.commit_smem()
