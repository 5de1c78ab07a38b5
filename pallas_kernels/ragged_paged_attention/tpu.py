"""Ragged paged attention on a TPU: one grid cell walks over all rows, with its own fetches of pages.

A row is cut into items: a block of its queries against one fetched block of its keys and values. While an item is
computed, the next one's pages (of this row or the next) are on their way into the other half of a double buffer.
New keys and values go straight from the step's own array into the same buffer, and by a second copy, memory to
memory, into their pages. Rows with one query run in a loop of their own whose query block is one token.

Refs are indexed plainly, so the kernel runs in the Pallas TPU interpreter under race detection.

Source: Dao 2023, arXiv 2307.08691 (online softmax in blocks); compared with ragged_paged_attention of
jax.experimental.pallas.ops.tpu, which walks pages by grid steps.

Dimension key as in the package, and
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
from pallas_kernels.ragged_paged_attention import tpu_plan
from pallas_kernels.ragged_paged_attention.reference import MASKED, store
from pallas_kernels.ragged_paged_attention.tpu_plan import LANES, Blocks, cache_shape, refusal

__all__ = ["attend", "cache_shape", "refusal", "supports"]

NO_WINDOW = 2**30
UNPACKED_TOKENS = 64  # cache tokens unpacked in one turn of a loop
QUERY_GROUP = 16  # query tokens laid out at once; rows of a group start at a whole tile whatever G is


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
    new_TCH = _new_keys_and_values(k_TKH, v_TKH, cache_PBCH, k_scale, v_scale)
    if sinks_N is not None:
        sinks_N = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None], (N, LANES))
    quantised = cache_PBCH.dtype.itemsize == 1
    numbers_2 = jnp.stack(
        [jnp.asarray(1.0 if s is None or not quantised else s, jnp.float32) for s in (k_scale, v_scale)]
    )
    settings_2 = jnp.stack([jnp.asarray(NO_WINDOW if window is None else window), jnp.asarray(page_offset)])
    kernel = functools.partial(
        _kernel, sizes=sizes, K=K, M=M, scale=scale, soft_cap=soft_cap, has_window=window is not None
    )
    whole, scalars = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.SMEM)
    out_TNH, cache_PBCH = pl.pallas_call(
        kernel,
        in_specs=[scalars] * 6 + [whole] * 3 + [pl.BlockSpec(memory_space=pltpu.VMEM) if sinks_N is not None else None],
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
    )
    return out_TNH[..., :H], cache_PBCH


def _new_keys_and_values(k_TKH, v_TKH, cache_PBCH, k_scale, v_scale):
    """The step's keys and values as the cache holds a token."""
    T, K, H = k_TKH.shape
    _, _, C, cache_H = cache_PBCH.shape
    new_TCH = jnp.stack([store(k_TKH, k_scale, cache_PBCH), store(v_TKH, v_scale, cache_PBCH)], 2).reshape(T, 2 * K, H)
    return jnp.pad(new_TCH, ((0, 0), (0, C - 2 * K), (0, cache_H - H)))


def _vmem_limit(sizes, q_TNH, k_TKH, cache_PBCH, device_kind) -> int:
    """Twice what the kernel itself asks for: values that do not fit the registers spill to the same memory."""
    asked = max(tpu_plan.vmem_bytes(blocks, q_TNH, k_TKH, cache_PBCH) for blocks in sizes.values())
    return min(tpu_plan.vmem_limit(device_kind), max(16 * 2**20, 2 * asked + 8 * 2**20))


def _kernel(
    kv_lens, table, cu_q_lens, counts, settings, numbers, q_in, new, cache_in, sinks, out, cache, *, sizes, **statics
):
    """Both cases, one after the other; each has its own scratch memory while it runs."""
    inputs = dict(kv_lens=kv_lens, table=table, cu_q_lens=cu_q_lens, settings=settings, numbers=numbers)
    inputs |= dict(new=new, sinks=sinks, out=out, cache=cache)
    _walk_case(sizes["decode"], 0, counts[0], **inputs, **statics)
    _walk_case(sizes["chunk"], counts[0], counts[1], **inputs, **statics)


def _walk_case(blocks, first, last, **kwargs):
    """Walks rows [first, last) with one case's block sizes, if there are any."""
    (N, H), C, K = kwargs["out"].shape[1:], kwargs["cache"].shape[2], kwargs["K"]
    cache_dtype, dtype = kwargs["cache"].dtype, kwargs["out"].dtype
    R = tpu_plan.padded_rows(blocks.query * (N // K))
    is_float32 = cache_dtype == jnp.float32
    word_dtype, token_words = (jnp.float32, C) if is_float32 else (jnp.uint32, C // 2)
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

    @pl.when(last > first)
    def _walk():
        pl.run_scoped(lambda **scratch: _Walk(**kwargs, **scratch, blocks=blocks, last=last).run(first), **scratch)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One case's loop over its items. Refs and static numbers; every method traces a piece of the kernel."""

    # scalars
    kv_lens: object
    table: object
    cu_q_lens: object
    settings: object  # window, page offset
    numbers: object  # k_scale, v_scale
    # memory
    new: object
    sinks: object
    out: object  # queries on the way in, answers on the way out
    cache: object
    # scratch
    kv_buf: object
    q_buf: object
    out_buf: object
    words: object
    q_rows: object
    acc: object
    top: object
    total: object
    pending: object  # tokens on their way out: two answer buffers, page writes
    kv_sems: object
    q_sems: object
    out_sems: object
    write_sem: object
    # static
    blocks: Blocks
    K: int
    M: int
    scale: float
    soft_cap: float | None
    has_window: bool
    last: object  # rows end here

    @property
    def operand(self):
        """What the matrix unit multiplies."""
        return self.q_rows.dtype

    @property
    def page_size(self):
        return self.cache.shape[1]

    @property
    def G(self):
        return self.out.shape[1] // self.K

    # ---- which tokens ----

    def q_len(self, s):
        return self.cu_q_lens[s + 1] - self.cu_q_lens[s]

    def past_len(self, s):
        """Tokens of the row that earlier steps left in its pages."""
        return self.kv_lens[s] - self.q_len(s)

    def next_row(self, s):
        """The next row that has queries, or `last`."""

        def is_empty(s):
            inside = jnp.minimum(s, self.kv_lens.shape[0] - 1)
            return (s < self.last) & (self.q_len(inside) == 0)

        row, _ = lax.while_loop(
            lambda state: state[1], lambda state: (state[0] + 1, is_empty(state[0] + 1)), (s + 1, is_empty(s + 1))
        )
        return row

    def visible(self, s, qb):
        """Cache tokens [begin, end) that query block qb of row s sees; begin is a page's start."""
        first = self.past_len(s) + qb * self.blocks.query
        end = kv_end(first, self.blocks.query, self.kv_lens[s])
        begin = jnp.maximum(first - self.settings[0] + 1, 0) if self.has_window else 0
        return begin // self.page_size * self.page_size, end

    def span(self, s, qb, kb):
        """The part [begin, end) of fetch block kb that query block qb sees, and where the block starts."""
        begin, end = self.visible(s, qb)
        start = kb * self.blocks.fetch
        return jnp.maximum(begin, start), jnp.minimum(end, start + self.blocks.fetch), start

    def successor(self, s, qb, kb):
        """The item after this one; its row is `last` when there is none."""
        _, end = self.visible(s, qb)
        more_keys = (kb + 1) * self.blocks.fetch < end
        more_queries = (qb + 1) * self.blocks.query < self.q_len(s)
        stay = more_keys | more_queries
        s = jnp.where(stay, s, self.next_row(s))
        qb = jnp.where(more_keys, qb, jnp.where(more_queries, qb + 1, 0))
        inside = jnp.minimum(s, self.kv_lens.shape[0] - 1)
        return s, qb, jnp.where(more_keys, kb + 1, self.visible(inside, qb)[0] // self.blocks.fetch)

    # ---- copies ----

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

    def fetch_queries(self, s, qb, slot):
        self.query_copy(s, qb, slot).start()

    def query_copy(self, s, qb, slot):
        n = jnp.minimum(self.blocks.query, self.q_len(s) - qb * self.blocks.query)
        source = self.out.at[pl.ds(self.cu_q_lens[s] + qb * self.blocks.query, n)]
        return pltpu.make_async_copy(source, self.q_buf.at[slot, pl.ds(0, n)], self.q_sems.at[slot])

    def send_answers(self, s, qb, slot):
        n = jnp.minimum(self.blocks.query, self.q_len(s) - qb * self.blocks.query)
        target = self.out.at[pl.ds(self.cu_q_lens[s] + qb * self.blocks.query, n)]
        pltpu.make_async_copy(self.out_buf.at[slot, pl.ds(0, n)], target, self.out_sems.at[slot]).start()
        self.pending[slot] = n

    def wait_answers(self, slot):
        @pl.when(self.pending[slot] > 0)
        def _wait():
            tokens = self.out_buf.at[slot, pl.ds(0, self.pending[slot])]
            pltpu.make_async_copy(tokens, tokens, self.out_sems.at[slot]).wait()

    # ---- the walk ----

    def run(self, first):
        for i in range(3):
            self.pending[i] = 0
        s = self.next_row(first - 1)

        @pl.when(s < self.last)
        def _run():
            kb = self.visible(s, 0)[0] // self.blocks.fetch
            self.fetch_queries(s, 0, 0)
            self.fetch_keys(s, 0, kb, 0)
            zero = jnp.int32(0)
            lax.while_loop(lambda item: item[0] < self.last, self.item, (s, zero, kb, zero, zero))
            self.wait_answers(0)
            self.wait_answers(1)
            self.wait_writes()

    def item(self, state):
        """One item; starts the next one's copies first, so that they run under this one's work."""
        s, qb, kb, kv_slot, q_slot = state
        begin, end = self.visible(s, qb)
        after = self.successor(s, qb, kb)
        is_first, is_last = kb == begin // self.blocks.fetch, (after[0] != s) | (after[1] != qb)

        @pl.when(after[0] < self.last)
        def _prefetch():
            self.fetch_keys(*after, 1 - kv_slot)

            @pl.when(is_last)
            def _queries():
                self.fetch_queries(after[0], after[1], 1 - q_slot)

        @pl.when(is_first)
        def _start():
            @pl.when(qb == 0)
            def _write():
                self.write_pages(s)

            self.query_copy(s, qb, q_slot).wait()
            self.lay_out_queries(q_slot)

        wait_keys(self, s, qb, kb, kv_slot)
        self.fold_block(s, qb, kb, kv_slot)

        @pl.when(is_last)
        def _finish():
            self.wait_answers(q_slot)
            self.lay_out_answers(q_slot)
            self.send_answers(s, qb, q_slot)

        return *after, 1 - kv_slot, jnp.where(is_last, 1 - q_slot, q_slot)

    # ---- arithmetic ----

    def groups(self, body):
        """Runs body(first token, tokens, first row, rows) over the query block, some tokens at a time."""
        if self.blocks.query == 1:
            body(0, 1, 0, self.q_rows.shape[1])
            return

        @pl.loop(0, self.blocks.query // QUERY_GROUP)
        def _group(i):
            rows = QUERY_GROUP * self.G
            body(i * QUERY_GROUP, QUERY_GROUP, pl.multiple_of(i * rows, 16), rows)

    def lay_out_queries(self, slot):
        """Queries of one kv head side by side, and the softmax's running top, total and sum at their start."""

        def lay_out(token, tokens, row, rows):
            q_TNH = self.q_buf[slot, pl.ds(token, tokens)].astype(jnp.float32)
            for k in range(self.K):
                heads = slice(k * self.G, (k + 1) * self.G)
                here = pl.ds(row, rows)
                self.q_rows[k, here] = _to_rows(q_TNH[:, heads], rows).astype(self.operand)
                self.acc[k, here] = jnp.zeros((rows, self.acc.shape[2]), jnp.float32)
                if self.sinks is None:
                    self.top[k, here] = jnp.full((rows, LANES), MASKED, jnp.float32)
                    self.total[k, here] = jnp.zeros((rows, LANES), jnp.float32)
                else:
                    sink_TGL = jnp.broadcast_to(self.sinks[heads][None], (tokens, self.G, LANES))
                    self.top[k, here] = _to_rows(sink_TGL, rows)
                    self.total[k, here] = jnp.ones((rows, LANES), jnp.float32)

        self.groups(lay_out)

    def lay_out_answers(self, slot):
        H = self.acc.shape[2]

        def lay_out(token, tokens, row, rows):
            heads_TGH = []
            for k in range(self.K):
                total_RH = _across_lanes(self.total[k, pl.ds(row, rows)], H)
                answer_RH = self.acc[k, pl.ds(row, rows)] / total_RH * self.numbers[1]
                heads_TGH.append(answer_RH[: tokens * self.G].reshape(tokens, self.G, H))
            answer_TNH = jnp.concatenate(heads_TGH, axis=1)
            self.out_buf[slot, pl.ds(token, tokens)] = answer_TNH.astype(self.out_buf.dtype)

        self.groups(lay_out)

    def fold_block(self, s, qb, kb, slot):
        """Folds a fetched block into the running softmax, one compute block after another."""
        begin, end, start = self.span(s, qb, kb)
        first_position = self.past_len(s) + qb * self.blocks.query
        U = self.blocks.compute

        @pl.loop((begin - start) // U, pl.cdiv(end - start, U))
        def _fold(c):
            position = start + c * U
            self.unpack(slot, pl.multiple_of(c * U, U), begin - position, end - position)
            hidden_RU = self.hidden(first_position, position)
            together = tpu_plan.heads_together(self.K, self.blocks.query)

            @pl.loop(0, self.K // together)
            def _heads(i):
                for j in range(together):
                    self.fold_head(i * together + j, hidden_RU)

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

        whole = is_whole(begin, end, U)
        pl.when(whole)(lambda: spread(False))
        pl.when(~whole)(lambda: spread(True))

    def head(self, k):
        """Keys and values of kv head k out of `words`."""
        U = self.blocks.compute

        def every(first):
            rows = pl.ds(first, U, stride=self.words.shape[1] // U)
            return _side_by_side([self.words[lane, rows] for lane in range(self.words.shape[0])])

        if self.operand == jnp.float32:
            return every(2 * k), every(2 * k + 1)
        kv_UH = every(k)
        k_UH = lax.bitcast_convert_type(kv_UH << 16, jnp.float32)
        v_UH = lax.bitcast_convert_type(kv_UH & jnp.uint32(0xFFFF0000), jnp.float32)
        return k_UH.astype(jnp.bfloat16), v_UH.astype(jnp.bfloat16)

    def hidden(self, first_position, position):
        """Which keys of a compute block which query rows must not see."""
        shape = (self.q_rows.shape[1], self.blocks.compute)
        key_RU = position + lax.broadcasted_iota(jnp.int32, shape, 1)
        query_RU = first_position
        if self.blocks.query > 1:
            query_RU += lax.broadcasted_iota(jnp.int32, shape, 0) // self.G
        hidden_RU = key_RU > query_RU
        return hidden_RU | (key_RU <= query_RU - self.settings[0]) if self.has_window else hidden_RU

    def fold_head(self, k, hidden_RU):
        k_UH, v_UH = self.head(k)
        dot = functools.partial(
            lax.dot_general,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if self.operand == jnp.float32 else None,
        )
        logits_RU = dot(self.q_rows[k], k_UH, (((1,), (1,)), ((), ()))) * (self.scale * self.numbers[0])
        if self.soft_cap is not None:
            logits_RU = self.soft_cap * jnp.tanh(logits_RU / self.soft_cap)
        logits_RU = jnp.where(hidden_RU, MASKED, logits_RU)
        top_RL = self.top[k]
        new_top_RL = jnp.maximum(top_RL, logits_RU.max(axis=1, keepdims=True))
        decay_RL = jnp.exp(top_RL - new_top_RL)
        probs_RU = jnp.exp(logits_RU - _across_lanes(new_top_RL, logits_RU.shape[1]))
        self.top[k] = new_top_RL
        self.total[k] = self.total[k] * decay_RL + probs_RU.sum(axis=1, keepdims=True)
        value_RH = dot(probs_RU.astype(self.operand), v_UH, (((1,), (0,)), ((), ())))
        self.acc[k] = self.acc[k] * _across_lanes(decay_RL, value_RH.shape[1]) + value_RH


def kv_end(first_position, num_queries, kv_len):
    """One past the last cache token that a block of queries sees."""
    return jnp.minimum(first_position + num_queries, kv_len)


def is_whole(begin, end, size):
    """Whether a compute block of `size` tokens lies within [begin, end), so that nothing in it needs blanking."""
    return (begin <= 0) & (end >= size)


def page_id(walk, s, p):
    return walk.table[s * walk.M + p] + walk.settings[1]


def wait_keys(walk, s, qb, kb, slot):
    """Waits until all of an item's keys and values are in; a semaphore counts bytes, so one wait serves all copies."""
    begin, end, _ = walk.span(s, qb, kb)
    tokens = walk.kv_buf.at[slot, pl.ds(0, end - begin)]
    pltpu.make_async_copy(tokens, tokens, walk.kv_sems.at[slot]).wait()


def _to_rows(x_TGH, rows):
    T, G, H = x_TGH.shape
    x_RH = x_TGH.reshape(T * G, H)
    return x_RH if T * G == rows else jnp.concatenate([x_RH, jnp.zeros((rows - T * G, H), x_RH.dtype)], axis=0)


def _across_lanes(x_RL, width):
    """Widens a value repeated over 128 lanes to any width."""
    return x_RL[:, :width] if width <= LANES else _side_by_side([x_RL] * (width // LANES))


def _side_by_side(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
