"""Latent attention on a TPU: first the step's latents go into their pages, then rows are walked over.

A page holds tokens as rows of whole tiles, so copies start and end at granules of 16 tokens. A new token therefore
changes a granule: it is brought in, new tokens take their places in it, and it goes out again, many at a time. Behind
that queries read pages alone, by the walk of ragged paged attention (tpu_walk.py). An entry is the key of all heads and
its beginning the value, so both products take it from the buffer as it lies. Heads of a chunk are cut into groups that
stand where the walk has kv heads, only because a block of rows of all heads would be too large.

Dimension key as in the package, and
    U  cache tokens in a compute block     A  a granule's tokens
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.latent_attention import tpu_plan
from pallas_kernels.latent_attention.tpu_plan import GRANULE, IN_FLIGHT
from pallas_kernels.platform import current_device_kind
from pallas_kernels.ragged_paged_attention.tpu_plan import LANES, Blocks, padded_rows, vmem_limit
from pallas_kernels.ragged_paged_attention.tpu_walk import NO_WINDOW, Walk, page_id
from pallas_kernels.ragged_paged_attention.tpu_write import Writer

SUBLANES = 8  # rows of a tile of 32 bits: loads start at one


def attend(
    q_latent_TNR,
    q_rope_TNH,
    latent_TR,
    rope_TH,
    cache_PBW,
    kv_lens_S,
    page_table_SM,
    cu_q_lens_S1,
    counts_2,
    *,
    scale,
    page_offset=0,
    max_q_len=None,
    decode_blocks: Blocks | None = None,
    chunk_blocks: Blocks | None = None,
    interpret=False,
):
    """The door's signature, and block sizes (None for those by formula) and Pallas's own `interpret`.

    Raises:
        ValueError: the shapes or dtypes are not among those of `tpu_plan.refusal`, which words the message.
    """
    device_kind = current_device_kind()
    reason = tpu_plan.refusal(q_latent_TNR, q_rope_TNH, cache_PBW, page_table_SM, device_kind)
    if reason:
        raise ValueError(reason)
    R, H, W, M = q_latent_TNR.shape[2], q_rope_TNH.shape[2], cache_PBW.shape[2], page_table_SM.shape[1]
    sizes = {
        "decode": decode_blocks or tpu_plan.blocks(q_latent_TNR, cache_PBW, M, "decode"),
        "chunk": chunk_blocks or tpu_plan.blocks(q_latent_TNR, cache_PBW, M, "chunk"),
    }
    asked = tpu_plan.vmem_bytes(q_latent_TNR, cache_PBW, M, sizes)
    # Rounded to what pages hold, and in words of 32 bits, whose rows can be rolled.
    new_TW = jnp.concatenate([latent_TR, rope_TH], axis=1).astype(cache_PBW.dtype).astype(jnp.float32)
    whole, scalars = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, M=M, scale=scale, has_chunks=max_q_len != 1),
        in_specs=[scalars] * 5 + [whole] * 2 + [pl.BlockSpec(memory_space=pltpu.VMEM), whole],
        out_specs=[whole, whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_latent_TNR, cache_PBW)],
        # Queries and answers share memory: a padding token keeps its query, which is finite.
        input_output_aliases={5: 0, 8: 1},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=min(vmem_limit(device_kind), max(16 * 2**20, 2 * asked + 8 * 2**20))
        ),
        interpret=interpret,
        name="latent_attention",
    )(
        kv_lens_S.astype(jnp.int32),
        page_table_SM.astype(jnp.int32).reshape(-1),
        cu_q_lens_S1.astype(jnp.int32),
        counts_2.astype(jnp.int32),
        jnp.stack([NO_WINDOW, jnp.asarray(page_offset)]).astype(jnp.int32),
        q_latent_TNR,
        jnp.pad(q_rope_TNH, ((0, 0), (0, 0), (0, W - R - H))),
        jnp.pad(new_TW, ((GRANULE, 2 * GRANULE), (0, W - R - H))),
        cache_PBW,
    )


def _kernel(
    kv_lens,
    table,
    cu_q_lens,
    counts,
    settings,
    q_in,
    q_rope,
    new,
    cache_in,
    out,
    cache,
    *,
    sizes,
    M,
    scale,
    has_chunks,
):
    rows = dict(kv_lens=kv_lens, table=table, cu_q_lens=cu_q_lens, settings=settings, cache=cache, M=M)
    rows |= dict(page_size=cache.shape[1])
    write_pages(new, rows, counts[1])
    # Where all rows have one query or none, an empty one may come before others.
    num_decode = counts[0] if has_chunks else counts[1]
    _walk_case("decode", sizes["decode"], 0, num_decode, q_rope, out, scale, rows)
    if has_chunks:
        _walk_case("chunk", sizes["chunk"], num_decode, counts[1], q_rope, out, scale, rows)


def write_pages(new, rows, num_rows):
    """Puts the step's latents of all rows into their pages, and waits until they are there."""
    cache = rows["cache"]
    scratch = dict(
        granules=pltpu.VMEM((IN_FLIGHT, GRANULE, cache.shape[2]), cache.dtype),
        in_sems=pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
        out_sems=pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
    )
    pl.run_scoped(
        lambda **scratch: _Writer(**rows, **scratch, new=new, last=num_rows, granule=GRANULE).run(), **scratch
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Writer(Writer):
    """A writer of the step's latents, which stand between tokens that nobody takes."""

    def place(self, s, g):
        per_page = self.page_size // GRANULE
        return self.cache.at[page_id(self, s, g // per_page), pl.ds(g % per_page * GRANULE, GRANULE)]

    def change(self, s, g, slot):
        old_AW = self.granules[slot].astype(jnp.float32)
        token = GRANULE + self.cu_q_lens[s] + g * GRANULE - self.past_len(s)
        around = GRANULE + SUBLANES
        new_AW = self.new[pl.ds(pl.multiple_of(token // SUBLANES * SUBLANES, SUBLANES), around)]
        new_AW = pltpu.roll(new_AW, (around - token % SUBLANES) % around, 0)[:GRANULE]
        position_AW = g * GRANULE + lax.broadcasted_iota(jnp.int32, old_AW.shape, 0)
        is_new_AW = (position_AW >= self.past_len(s)) & (position_AW < self.kv_lens[s])
        self.granules[slot] = jnp.where(is_new_AW, new_AW, old_AW).astype(self.granules.dtype)


def _walk_case(case, blocks, first, last, q_rope, out, scale, rows):
    """Walks rows [first, last) with one case's block sizes, if there are any."""
    (N, R), W, dtype = out.shape[1:], rows["cache"].shape[2], rows["cache"].dtype
    K = N // tpu_plan.heads_of_group(N, case)
    num_rows = padded_rows(blocks.query * (N // K))
    scratch = dict(
        kv_buf=pltpu.VMEM((2, blocks.fetch, W), dtype),
        q_buf=pltpu.VMEM((2, blocks.query, N, W), dtype),
        out_buf=pltpu.VMEM((2, blocks.query, N, R), dtype),
        q_rows=pltpu.VMEM((K, num_rows, W), dtype),
        acc=pltpu.VMEM((K, num_rows, R), jnp.float32),
        top=pltpu.VMEM((K, num_rows, LANES), jnp.float32),
        total=pltpu.VMEM((K, num_rows, LANES), jnp.float32),
        pending=pltpu.SMEM((3,), jnp.int32),
        kv_sems=pltpu.SemaphoreType.DMA((2,)),
        q_sems=pltpu.SemaphoreType.DMA((2,)),
        out_sems=pltpu.SemaphoreType.DMA((2,)),
    )
    fixed = dict(numbers=(1.0, 1.0), sinks=None, soft_cap=None, has_window=False, scale=scale)

    @pl.when(last > first)
    def _walk():
        pl.run_scoped(
            lambda **scratch: _Walk(
                **rows, **scratch, **fixed, q_rope=q_rope, out=out, blocks=blocks, K=K, last=last
            ).run(first),
            **scratch,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk(Walk):
    """A walk over latents in pages; where it says kv head, it means a group of query heads."""

    q_rope: object

    def num_fetched(self, s, qb, kb):
        begin, end, _ = self.span(s, qb, kb)
        return pl.multiple_of(whole_granules(end - begin), GRANULE)

    def fetch_keys(self, s, qb, kb, slot):
        begin, end, start = self.span(s, qb, kb)
        B = self.page_size

        @pl.loop(begin // B, pl.cdiv(end, B))
        def _fetch_page(p):
            n = pl.multiple_of(whole_granules(jnp.minimum(B, end - p * B)), GRANULE)
            page = self.cache.at[page_id(self, s, p), pl.ds(0, n)]
            here = pl.ds(pl.multiple_of(p * B - start, GRANULE), n)
            pltpu.make_async_copy(page, self.kv_buf.at[slot, here], self.kv_sems.at[slot]).start()

    def query_copies(self, s, qb, slot):
        """A query is brought in by halves, its latent part and its rotary one."""
        n, R = jnp.minimum(self.blocks.query, self.q_len(s) - qb * self.blocks.query), self.out.shape[2]
        tokens = pl.ds(self.cu_q_lens[s] + qb * self.blocks.query, n)
        parts = (self.out, pl.ds(0, R)), (self.q_rope, pl.ds(R, self.q_rope.shape[2]))
        return [
            pltpu.make_async_copy(source.at[tokens], self.q_buf.at[slot, pl.ds(0, n), :, lanes], self.q_sems.at[slot])
            for source, lanes in parts
        ]

    def unpack(self, slot, offset, begin, end):
        """Zeroes what lies past the end of a compute block, since 0 times an old NaN is NaN."""
        U, W = self.blocks.compute, self.kv_buf.shape[2]

        @pl.when(~is_whole(end, U))
        def _blank():
            here = pl.ds(pl.multiple_of(offset + end // GRANULE * GRANULE, GRANULE), GRANULE)
            kv_AW = self.kv_buf[slot, here].astype(jnp.float32)
            row_AW = lax.broadcasted_iota(jnp.int32, kv_AW.shape, 0)
            self.kv_buf[slot, here] = jnp.where(row_AW < end % GRANULE, kv_AW, 0).astype(self.kv_buf.dtype)

            @pl.loop(end // GRANULE + 1, U // GRANULE)
            def _rest(i):
                here = pl.ds(pl.multiple_of(offset + i * GRANULE, GRANULE), GRANULE)
                self.kv_buf[slot, here] = jnp.zeros((GRANULE, W), self.kv_buf.dtype)

    def head(self, k, slot, offset):
        kv_UW = self.kv_buf[slot, pl.ds(offset, self.blocks.compute)]
        return kv_UW, kv_UW[:, : self.acc.shape[2]]


def is_whole(end, size):
    """Whether a compute block of `size` tokens has nothing past its row's end."""
    return end >= size


def whole_granules(n):
    return (n + GRANULE - 1) // GRANULE * GRANULE
