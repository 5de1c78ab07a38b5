"""The Triton kernel of ragged paged attention, for GPUs and formats that the Mosaic kernel does not take.

A block of threads attends one tile of query rows to one split of its keys. It reads keys and values out of their pages
by address, so that a page may have any size; Triton's compiler makes asynchronous copies of these loads and keeps some
blocks of keys in flight. Pages of 8 bits travel as they are and are widened in registers: float8 to float16 by moving
its bits, as GPUs before Ada have no instruction for it.

Source: Dao 2023, arXiv 2307.08691 (a running softmax over blocks of keys); Dao et al. 2023, "Flash-Decoding for
long-context inference" (splits).

Dimension key as in gpu.py, and
    U  cache tokens of a block
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ragged_paged_attention import gpu_narrow, scales
from pallas_kernels.ragged_paged_attention.gpu_plan import num_warps, tokens_of_block, widened_for
from pallas_kernels.ragged_paged_attention.reference import MASKED

MIN_ROWS = 16  # of a product on tensor cores
# A float8_e4m3 moved into a float16's bits is this many times too small: its exponent counts from 7, not from 15.
E4M3_FACTOR = 256.0


def num_rows(wanted: int) -> int:
    """Rows of a tile with so many queries: Triton's blocks are powers of two."""
    return max(MIN_ROWS, pl.next_power_of_2(wanted))


def attend_tiles(
    tiles_I5, pages_SM, sinks_KR, q_IKRH, cache_PBCH, k_scale, v_scale,
    *, group, scale, soft_cap, splits, answers, interpret,
):  # fmt: skip
    """Attends each tile to each split of its keys. Arguments as in gpu_hopper."""
    I, K, R, H = q_IKRH.shape
    wide = widened_for(q_IKRH.dtype, cache_PBCH.dtype)
    q_IKRH, factor_IKR = gpu_narrow.queries(q_IKRH, wide)
    is_e4m3 = cache_PBCH.dtype == jnp.float8_e4m3fn
    narrow_factor = E4M3_FACTOR if is_e4m3 else 1.0
    factor_IKR = factor_IKR[..., :R] * (scale * narrow_factor * (1.0 if k_scale is None else k_scale))
    v_scale_1 = jnp.full((1,), narrow_factor * (1.0 if v_scale is None else v_scale), jnp.float32)
    tile = Tile(
        group=group,
        splits=splits,
        soft_cap=soft_cap,
        block=tokens_of_block(H, wide),
        dtype=cache_PBCH.dtype,
        wide=jnp.dtype(wide),
        first_scale=2 * K if scales.are_in(cache_PBCH, K) else None,
    )
    if cache_PBCH.dtype.itemsize == 1:
        cache_PBCH = lax.bitcast_convert_type(cache_PBCH, jnp.uint8)
    return pl.pallas_call(
        tile.body,
        grid=(I, K, splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 7,
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((I, K, splits, R, H), answers if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((I, K, splits, R), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=num_warps(R, H), num_stages=3),
        interpret=bool(interpret),
        name=f"ragged_paged_attention_{R}_rows",
    )(tiles_I5, pages_SM, sinks_KR, q_IKRH, factor_IKR, v_scale_1, cache_PBCH)


@dataclasses.dataclass(frozen=True)
class Tile:
    """The kernel for one tile, kv head and split; everything static about it.

    Attributes:
        group: G, query heads that share a kv head.
        block: U.
        dtype, wide: of pages, and what is multiplied.
        first_scale: of a token's vectors the first that holds scales; None where pages have none.
    """

    group: int
    splits: int
    soft_cap: float | None
    block: int
    dtype: jnp.dtype
    wide: jnp.dtype
    first_scale: int | None

    def body(self, tiles, pages, sinks, q, factor, v_scale, cache, out, lse):
        """Attends one tile to one split of its keys; an empty split answers zeros and a log-sum-exp of MASKED."""
        tile, head, split = (pl.program_id(axis) for axis in range(3))
        row, position, end, low = (plt.load(tiles.at[tile, jnp.int32(i)]) for i in (0, 2, 3, 4))
        R, H = q.shape[2:]
        token_R = lax.div(jnp.arange(R, dtype=jnp.int32), self.group)
        first_R, last_R = low + token_R, jnp.minimum(position + token_R, end - 1)
        q_RH = plt.load(q.at[tile, head])
        factor_R = plt.load(factor.at[tile, head])
        begin = jnp.maximum(low, 0)
        first_block, last_block = lax.div(begin, self.block), pl.cdiv(end, self.block)
        turns = pl.cdiv(last_block - first_block, self.splits)
        block = first_block + split * turns
        read = functools.partial(self.read, pages, cache, row, head, begin, end)

        def fold(b, carry):
            acc_RH, top_R, total_R = carry
            token_U = b * self.block + jnp.arange(self.block, dtype=jnp.int32)
            k_UH, v_UH, k_scale_U, v_scale_U = read(token_U)
            logits_RU = self.dot(q_RH, k_UH, trans_b=True) * factor_R[:, None]
            if k_scale_U is not None:
                logits_RU *= k_scale_U[None]
            if self.soft_cap is not None:
                logits_RU = jnp.tanh(logits_RU * (1 / self.soft_cap)) * self.soft_cap
            logits_RU = jnp.where(self.seen(token_U, first_R, last_R), logits_RU, MASKED)
            new_top_R = jnp.maximum(top_R, jnp.max(logits_RU, axis=1))
            decay_R = jnp.exp(top_R - new_top_R)
            probs_RU = jnp.exp(logits_RU - new_top_R[:, None])
            total_R = total_R * decay_R + jnp.sum(probs_RU, axis=1)
            if v_scale_U is not None:
                # Beside the largest of the block's, so that weights stay within float16.
                largest = jnp.maximum(jnp.max(v_scale_U), 1e-30)
                value_RH = self.dot((probs_RU * (v_scale_U / largest)[None]).astype(self.wide), v_UH) * largest
            else:
                value_RH = self.dot(probs_RU.astype(self.wide), v_UH)
            return acc_RH * decay_R[:, None] + value_RH, new_top_R, total_R

        start = self.start(split, plt.load(sinks.at[head, pl.ds(0, R)]), H)
        acc_RH, top_R, total_R = lax.fori_loop(block, jnp.minimum(block + turns, last_block), fold, start)
        divisor_R = jnp.maximum(total_R, 1e-30)
        answer_RH = acc_RH * (plt.load(v_scale.at[jnp.int32(0)]) / divisor_R)[:, None]
        plt.store(out.at[tile, head, split], answer_RH.astype(out.dtype))
        plt.store(lse.at[tile, head, split], jnp.where(total_R > 0, top_R + jnp.log(divisor_R), MASKED))

    def start(self, split, sink_R, head_dim):
        """Accumulator, running top and total; the sink counts once, in the first split."""
        top_R = jnp.where(split == 0, sink_R, MASKED)
        return jnp.zeros((*top_R.shape, head_dim), jnp.float32), top_R, jnp.where(top_R > 0.5 * MASKED, 1.0, 0.0)

    def seen(self, token_U, first_R, last_R):
        """Which keys of a block each query row sees."""
        return (token_U[None] >= first_R[:, None]) & (token_U[None] <= last_R[:, None])

    def read(self, pages, cache, row, head, begin, end, token_U):
        """A block of keys and values to be multiplied, and their scales or None twice. Outside [begin, end) zeros."""
        page_size = cache.shape[1]
        is_live_U = (token_U >= begin) & (token_U < end)
        page_U = plt.load(page_id(pages, row, lax.div(token_U, page_size)), mask=is_live_U, other=0)
        inside_U = lax.rem(token_U, page_size)
        # Every index an array: Pallas's interpreter has no other way to load from many places.
        place_1H = jnp.arange(cache.shape[3], dtype=jnp.int32)[None]
        vectors = [
            self.widen(
                plt.load(
                    cache.at[page_U[:, None], inside_U[:, None], 2 * head + i, place_1H],
                    mask=is_live_U[:, None],
                    other=0,
                )
            )
            for i in (0, 1)
        ]
        if self.first_scale is None:
            return *vectors, None, None
        first_scale, width = self.first_scale, cache.shape[3]

        def scale_of(i):
            bits_U = jnp.zeros_like(token_U)
            for byte in range(scales.BYTES):
                place = (2 * head + i) * scales.BYTES + byte
                at = cache.at[page_U, inside_U, first_scale + lax.div(place, width), lax.rem(place, width)]
                bits_U |= plt.load(at, mask=is_live_U, other=0).astype(jnp.int32) << (8 * byte)
            return lax.bitcast_convert_type(bits_U, jnp.float32)

        return *vectors, scale_of(0), scale_of(1)

    def widen(self, x_UH):
        """Numbers of a page, whose bytes came as uint8, in the format that is multiplied."""
        if self.dtype == jnp.int8:
            return lax.bitcast_convert_type(x_UH, jnp.int8).astype(self.wide)
        if self.dtype.itemsize > 1:
            return x_UH.astype(self.wide)
        bits_UH = x_UH.astype(jnp.int16)
        if self.dtype == jnp.float8_e4m3fn:
            bits_UH = ((bits_UH & 0x80) << 8) | ((bits_UH & 0x7F) << 7)
        else:
            bits_UH = bits_UH << 8
        return lax.bitcast_convert_type(bits_UH, jnp.float16).astype(self.wide)

    def dot(self, a, b, trans_b=False):
        precision = lax.Precision.HIGHEST if self.wide == jnp.float32 else None
        return plt.dot(a, b, trans_b=trans_b, precision=precision)


def page_id(pages, row, p):
    return pages.at[row, p]
