"""Ragged paged attention on a TPU: one grid cell walks over all rows, with its own fetches of pages.

The walk is that of tpu_walk.py. New keys and values go straight from the step's own array into the buffer of an item,
and by a second copy, memory to memory, into their pages. A token's scales in int8 pages are no whole tile: those of new
tokens join the others of their page before the walk, which reads them there.

Refs are indexed plainly, so the kernel runs in the Pallas TPU interpreter under race detection.

Source: Dao 2023, arXiv 2307.08691 (online softmax in blocks); compared with ragged_paged_attention of
jax.experimental.pallas.ops.tpu, which walks pages by grid steps.

Dimension key as in the package, and
    L  planes of a page that hold its scales
    R  query rows of one kv head: tokens of a query block x G, padded      U  cache tokens in a compute block
    W  rows of the unpacked block: a token's words, one a kv head when two bfloat16 share a word
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.platform import current_device_kind
from pallas_kernels.ragged_paged_attention import scales, tpu_plan
from pallas_kernels.ragged_paged_attention.reference import store
from pallas_kernels.ragged_paged_attention.tpu_plan import LANES, Blocks, cache_shape, refusal
from pallas_kernels.ragged_paged_attention.tpu_walk import NO_WINDOW, Walk, page_id, side_by_side
from pallas_kernels.ragged_paged_attention.tpu_write import Writer

__all__ = ["attend", "cache_shape", "refusal", "supports"]

UNPACKED_TOKENS = 64  # cache tokens unpacked in one turn of a loop


def supports(q_TNH, k_TKH, cache_PBCH) -> bool:
    return refusal(q_TNH, k_TKH, cache_PBCH, device_kind=current_device_kind()) is None


def attend(
    q_TNH,
    k_TKH,
    v_TKH,
    cache_PBCH,
    kv_lens_S,
    page_table_SM,
    cu_q_lens_S1,
    counts_2,
    *,
    scale,
    window=None,
    soft_cap=None,
    sinks_N=None,
    k_scale=None,
    v_scale=None,
    page_offset=0,
    max_q_len=None,
    decode_blocks: Blocks | None = None,
    chunk_blocks: Blocks | None = None,
    interpret=False,
):
    """The door's signature, and block sizes (None for tuned or by formula) and Pallas's own `interpret`.

    Pages written in this step may be read by their own row only: rows run one after another, and a shared prefix
    must come from an earlier step.

    Raises:
        ValueError: the shapes or dtypes are not among those of `refusal`, which words the message.
    """
    device_kind = current_device_kind()
    reason = refusal(q_TNH, k_TKH, cache_PBCH, page_table_SM, device_kind)
    if reason:
        raise ValueError(reason)
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    _, _, C, cache_H = cache_PBCH.shape
    M = page_table_SM.shape[1]
    sizes = {
        "decode": decode_blocks or tpu_plan.blocks(q_TNH, k_TKH, cache_PBCH, M, "decode", device_kind),
        "chunk": chunk_blocks or tpu_plan.blocks(q_TNH, k_TKH, cache_PBCH, M, "chunk", device_kind),
    }
    lanes = ((0, 0), (0, 0), (0, cache_H - H))
    new_TCH, new_scales_XCL = _new_keys_and_values(k_TKH, v_TKH, cache_PBCH, k_scale, v_scale)
    if sinks_N is not None:
        sinks_N = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None], (N, LANES))
    quantised = cache_PBCH.dtype.itemsize == 1
    numbers_2 = jnp.stack(
        [jnp.asarray(1.0 if s is None or not quantised else s, jnp.float32) for s in (k_scale, v_scale)]
    )
    settings_2 = jnp.stack([jnp.asarray(NO_WINDOW if window is None else window), jnp.asarray(page_offset)])
    kernel = functools.partial(
        _kernel,
        sizes=sizes,
        page_size=scales.page_size(cache_PBCH),
        K=K,
        M=M,
        scale=scale,
        soft_cap=soft_cap,
        has_window=window is not None,
    )
    whole, scalars = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.SMEM)
    out_TNH, cache_PBCH = pl.pallas_call(
        kernel,
        in_specs=[scalars] * 6
        + [whole] * 3
        + [pl.BlockSpec(memory_space=pltpu.VMEM) if sinks_N is not None else None]
        + [whole if new_scales_XCL is not None else None],
        out_specs=[whole, whole],
        out_shape=[
            jax.ShapeDtypeStruct((T, N, cache_H), q_TNH.dtype),
            jax.ShapeDtypeStruct(cache_PBCH.shape, cache_PBCH.dtype),
        ],
        # Queries and answers share memory: a padding token keeps its query, which is finite.
        input_output_aliases={6: 0, 8: 1},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_vmem_limit(sizes, q_TNH, k_TKH, cache_PBCH, device_kind)
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(
        kv_lens_S.astype(jnp.int32),
        page_table_SM.astype(jnp.int32).reshape(-1),
        cu_q_lens_S1.astype(jnp.int32),
        counts_2.astype(jnp.int32),
        settings_2.astype(jnp.int32),
        numbers_2,
        jnp.pad(q_TNH, lanes),
        new_TCH,
        cache_PBCH,
        sinks_N,
        new_scales_XCL,
    )
    return out_TNH[..., :H], cache_PBCH


def _new_keys_and_values(k_TKH, v_TKH, cache_PBCH, k_scale, v_scale):
    """The step's keys and values as the cache holds a token, and their scales where it holds such, else None.

    Scales are int32[X, C, LANES], the bits of floats, of LANES tokens each, with room for a page's before and behind.
    """
    T, K, H = k_TKH.shape
    _, tokens, C, cache_H = cache_PBCH.shape
    B, scales_XCL = scales.page_size(cache_PBCH), None
    if B < tokens:
        (k_TKH, k_scale_TK), (v_TKH, v_scale_TK) = scales.rounded(k_TKH), scales.rounded(v_TKH)
        scale_TC = jnp.stack([k_scale_TK, v_scale_TK], 2).reshape(T, 2 * K)
        around, end = tpu_plan.round_up(B, LANES), tpu_plan.round_up(T, LANES)
        scale_TC = jnp.pad(scale_TC, ((around, around + end - T), (0, C - 2 * K)))
        scales_XCL = lax.bitcast_convert_type(scale_TC, jnp.int32).reshape(-1, LANES, C).swapaxes(1, 2)
    else:
        k_TKH, v_TKH = store(k_TKH, k_scale, cache_PBCH), store(v_TKH, v_scale, cache_PBCH)
    new_TCH = jnp.stack([k_TKH, v_TKH], 2).reshape(T, 2 * K, H)
    return jnp.pad(new_TCH, ((0, 0), (0, C - 2 * K), (0, cache_H - H))), scales_XCL


def _vmem_limit(sizes, q_TNH, k_TKH, cache_PBCH, device_kind) -> int:
    """Twice what the kernel itself asks for: values that do not fit the registers spill to the same memory."""
    asked = max(tpu_plan.vmem_bytes(blocks, q_TNH, k_TKH, cache_PBCH) for blocks in sizes.values())
    return min(tpu_plan.vmem_limit(device_kind), max(16 * 2**20, 2 * asked + 8 * 2**20))


def _kernel(
    kv_lens,
    table,
    cu_q_lens,
    counts,
    settings,
    numbers,
    q_in,
    new,
    cache_in,
    sinks,
    new_scales,
    out,
    cache,
    *,
    sizes,
    page_size,
    M,
    **statics,
):
    """Both cases, one after the other; each has its own scratch memory while it runs."""
    rows = dict(kv_lens=kv_lens, table=table, cu_q_lens=cu_q_lens, settings=settings, cache=cache)
    rows |= dict(page_size=page_size, M=M)
    if new_scales is not None:
        write_scales(new_scales, rows, counts[1])
    inputs = dict(numbers=numbers, new=new, sinks=sinks, out=out) | rows | statics
    _walk_case(sizes["decode"], 0, counts[0], **inputs)
    _walk_case(sizes["chunk"], counts[0], counts[1], **inputs)


def write_scales(new, rows, num_rows):
    """Puts the scales of the step's keys and values into their pages, and waits until they are there."""
    cache, B = rows["cache"], rows["page_size"]
    C, L = cache.shape[2], cache.shape[1] - B
    scratch = dict(
        granules=pltpu.VMEM((tpu_plan.IN_FLIGHT, L, C, LANES), cache.dtype),
        around=pltpu.VMEM((tpu_plan.IN_FLIGHT, L // scales.BYTES + 1, C, LANES), jnp.int32),
        in_sems=pltpu.SemaphoreType.DMA((tpu_plan.IN_FLIGHT,)),
        out_sems=pltpu.SemaphoreType.DMA((tpu_plan.IN_FLIGHT,)),
    )
    pl.run_scoped(lambda **scratch: _ScaleWriter(**rows, **scratch, new=new, last=num_rows, granule=B).run(), **scratch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ScaleWriter(Writer):
    """A writer of scales, whose granule is all that a page has of them."""

    around: object  # scales of the step's tokens around a granule's, in scratch memory, by slot

    def place(self, s, g):
        return planes_of(self, s, g)

    def first_token(self, s, g):
        """Where the page's first token would stand in `new`, were all of it new."""
        before = tpu_plan.round_up(self.page_size, LANES)
        return before + self.cu_q_lens[s] + g * self.page_size - self.past_len(s)

    def fetch(self, s, g, slot):
        super().fetch(s, g, slot)
        source = self.new.at[pl.ds(self.first_token(s, g) // LANES, self.around.shape[1])]
        pltpu.make_async_copy(source, self.around.at[slot], self.in_sems.at[slot]).start()

    def wait_fetched(self, slot):
        super().wait_fetched(slot)
        buffer = self.around.at[slot]
        pltpu.make_async_copy(buffer, buffer, self.in_sems.at[slot]).wait()

    def change(self, s, g, slot):
        ahead = self.first_token(s, g) % LANES
        rolled = [pltpu.roll(self.around[slot, j], (LANES - ahead) % LANES, 1) for j in range(self.around.shape[1])]
        lane_CL = lax.broadcasted_iota(jnp.int32, self.around.shape[2:], 1)
        for j in range(len(rolled) - 1):
            word_CL = jnp.where(lane_CL < LANES - ahead, rolled[j], rolled[j + 1])
            in_page_CL = j * LANES + lane_CL
            position_CL = g * self.page_size + in_page_CL
            is_new_CL = (position_CL >= self.past_len(s)) & (position_CL < self.kv_lens[s])
            is_new_CL &= in_page_CL < self.page_size
            for i in range(scales.BYTES):
                plane = scales.BYTES * j + i
                new_CL = word_CL << (8 * (scales.BYTES - 1 - i)) >> 24
                old_CL = self.granules[slot, plane].astype(jnp.int32)
                self.granules[slot, plane] = jnp.where(is_new_CL, new_CL, old_CL).astype(self.granules.dtype)


def _walk_case(blocks, first, last, **kwargs):
    """Walks rows [first, last) with one case's block sizes, if there are any."""
    (N, H), C, K = kwargs["out"].shape[1:], kwargs["cache"].shape[2], kwargs["K"]
    cache_dtype, dtype = kwargs["cache"].dtype, kwargs["out"].dtype
    R = tpu_plan.padded_rows(blocks.query * (N // K))
    is_float32 = cache_dtype == jnp.float32
    word_dtype, token_words = (jnp.float32, C) if is_float32 else (jnp.uint32, C // 2)
    L = kwargs["cache"].shape[1] - kwargs["page_size"]
    scratch = dict(
        kv_buf=pltpu.VMEM((2, blocks.fetch, C, H), cache_dtype),
        q_buf=pltpu.VMEM((2, blocks.query, N, H), dtype),
        out_buf=pltpu.VMEM((2, blocks.query, N, H), dtype),
        words=pltpu.VMEM((H // LANES, blocks.compute * token_words, LANES), word_dtype),
        q_rows=pltpu.VMEM((K, R, H), jnp.float32 if is_float32 else jnp.bfloat16),
        acc=pltpu.VMEM((K, R, H), jnp.float32),
        top=pltpu.VMEM((K, R, LANES), jnp.float32),
        total=pltpu.VMEM((K, R, LANES), jnp.float32),
        pending=pltpu.SMEM((3,), jnp.int32),
        kv_sems=pltpu.SemaphoreType.DMA((2,)),
        q_sems=pltpu.SemaphoreType.DMA((2,)),
        out_sems=pltpu.SemaphoreType.DMA((2,)),
        write_sem=pltpu.SemaphoreType.DMA((1,)),
    )
    if L:
        num_pages = blocks.fetch // kwargs["page_size"]
        scratch["planes"] = pltpu.VMEM((2, num_pages, L, C, LANES), cache_dtype)
        scratch["factors"] = pltpu.VMEM((C, blocks.compute), jnp.float32)

    @pl.when(last > first)
    def _walk():
        pl.run_scoped(lambda **scratch: _Walk(**kwargs, **scratch, blocks=blocks, last=last).run(first), **scratch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk(Walk):
    """A walk over keys and values in pages, the step's own ones in an array beside them."""

    new: object
    words: object
    write_sem: object
    # of pages that hold scales, those fetched, by slot, and those of a compute block, zero outside of its tokens
    planes: object = None
    factors: object = None

    def fetch_keys(self, s, qb, kb, slot):
        """Starts bringing in an item's keys and values: the past from pages, this step's from `new`."""
        begin, end, start = self.span(s, qb, kb)
        past = self.past_len(s)
        past_end = jnp.minimum(end, past)
        B = self.page_size

        @pl.loop(begin // B, jnp.maximum(begin // B, pl.cdiv(past_end, B)))
        def _fetch_page(p):
            n = jnp.minimum(B, past_end - p * B)
            page = self.cache.at[page_id(self, s, p), pl.ds(0, n)]
            copy = pltpu.make_async_copy(page, self.kv_buf.at[slot, pl.ds(p * B - start, n)], self.kv_sems.at[slot])
            copy.start()

        new_begin = jnp.maximum(begin, past)

        @pl.when(new_begin < end)
        def _fetch_new():
            n = end - new_begin
            source = self.new.at[pl.ds(self.cu_q_lens[s] + new_begin - past, n)]
            copy = pltpu.make_async_copy(
                source, self.kv_buf.at[slot, pl.ds(new_begin - start, n)], self.kv_sems.at[slot]
            )
            copy.start()

        if self.planes is not None:

            @pl.loop(begin // B, pl.cdiv(end, B))
            def _fetch_scales(p):
                here = self.planes.at[slot, p - start // B]
                pltpu.make_async_copy(planes_of(self, s, p), here, self.kv_sems.at[slot]).start()

    def fetched(self, s, qb, kb, slot):
        parts = super().fetched(s, qb, kb, slot)
        if self.planes is None:
            return parts
        begin, end, _ = self.span(s, qb, kb)
        num_pages = pl.cdiv(end, self.page_size) - begin // self.page_size
        return [*parts, self.planes.at[slot, pl.ds(0, num_pages)]]

    def start_row(self, s):
        self.write_pages(s)

    def finish(self):
        self.wait_writes()

    def write_pages(self, s):
        """Starts copying a row's new keys and values into its pages, once the row before has done so."""
        self.wait_writes()
        past, B = self.past_len(s), self.page_size

        @pl.loop(past // B, pl.cdiv(self.kv_lens[s], B))
        def _write_page(p):
            begin = jnp.maximum(p * B, past)
            n = jnp.minimum((p + 1) * B, self.kv_lens[s]) - begin
            source = self.new.at[pl.ds(self.cu_q_lens[s] + begin - past, n)]
            target = self.cache.at[page_id(self, s, p), pl.ds(begin - p * B, n)]
            pltpu.make_async_copy(source, target, self.write_sem.at[0]).start()

        self.pending[2] = self.q_len(s)

    def wait_writes(self):
        @pl.when(self.pending[2] > 0)
        def _wait():
            tokens = self.new.at[pl.ds(0, self.pending[2])]
            pltpu.make_async_copy(tokens, tokens, self.write_sem.at[0]).wait()

    def unpack(self, slot, offset, begin, end):
        """Spreads a block's tokens over `words`; what lies outside [begin, end) may be anything and becomes zero."""
        U, (C, H) = self.blocks.compute, self.kv_buf.shape[2:]
        words, part = self.words.shape[1] // U, min(U, UNPACKED_TOKENS)

        def spread(blank):
            @pl.loop(0, U // part)
            def _part(i):
                kv_UCH = self.kv_buf[slot, pl.ds(offset + i * part, part)]
                kv_WH = kv_UCH.astype(self.operand).reshape(part * C, H)
                if self.operand == jnp.bfloat16:
                    kv_WH = pltpu.bitcast(kv_WH, jnp.uint32)
                if blank:
                    row_WH = i * part * words + lax.broadcasted_iota(jnp.int32, kv_WH.shape, 0)
                    kv_WH = jnp.where((row_WH >= begin * words) & (row_WH < end * words), kv_WH, jnp.zeros_like(kv_WH))
                here = pl.ds(pl.multiple_of(i * part * words, part * words), part * words)
                for lane in range(H // LANES):
                    self.words[lane, here] = kv_WH[:, lane * LANES : (lane + 1) * LANES]

        if self.planes is not None:
            self.lay_out_scales(slot, offset, begin, end)
        whole = is_whole(begin, end, U)
        pl.when(whole)(lambda: spread(False))
        pl.when(~whole)(lambda: spread(True))

    def lay_out_scales(self, slot, offset, begin, end):
        """Puts the scales of a block's tokens into `factors`, a vector's in a row; of others they become zero."""
        U, B = self.blocks.compute, self.page_size
        if U % B == 0:
            places = [(offset // B + i, j) for i in range(U // B) for j in range(0, B, LANES)]
        else:
            places = [(offset // B, offset % B + j) for j in range(0, U, LANES)]
        parts = [self.scales_of_page(slot, page, first)[:, : min(B, LANES)] for page, first in places]
        token_CU = lax.broadcasted_iota(jnp.int32, self.factors.shape, 1)
        self.factors[...] = jnp.where((token_CU >= begin) & (token_CU < end), side_by_side(parts), 0)

    def scales_of_page(self, slot, page, first):
        """The scales of LANES tokens of a fetched page, the first of which is at whole lanes: [C, LANES]."""
        plane, word_CL = first // LANES * scales.BYTES, 0
        for i in range(scales.BYTES):
            byte_CL = self.planes[slot, page, plane + i].astype(jnp.int32) & 0xFF
            word_CL |= byte_CL << (8 * i)
        return lax.bitcast_convert_type(word_CL, jnp.float32)

    def scales(self, k):
        if self.factors is None:
            return None, None
        return self.factors[pl.ds(2 * k, 1)], self.factors[pl.ds(2 * k + 1, 1)]

    def head(self, k, slot, offset):
        """Keys and values of kv head k out of `words`."""
        U = self.blocks.compute

        def every(first):
            rows = pl.ds(first, U, stride=self.words.shape[1] // U)
            return side_by_side([self.words[lane, rows] for lane in range(self.words.shape[0])])

        if self.operand == jnp.float32:
            return every(2 * k), every(2 * k + 1)
        kv_UH = every(k)
        k_UH = lax.bitcast_convert_type(kv_UH << 16, jnp.float32)
        v_UH = lax.bitcast_convert_type(kv_UH & jnp.uint32(0xFFFF0000), jnp.float32)
        return k_UH.astype(jnp.bfloat16), v_UH.astype(jnp.bfloat16)


def planes_of(walk, s, p):
    """Where page p of row s holds its scales."""
    B = walk.page_size
    return walk.cache.at[page_id(walk, s, p), pl.ds(B, walk.cache.shape[1] - B), :, pl.ds(0, LANES)]


def is_whole(begin, end, size):
    """Whether a compute block of `size` tokens lies within [begin, end), so that nothing in it needs blanking."""
    return (begin <= 0) & (end >= size)
