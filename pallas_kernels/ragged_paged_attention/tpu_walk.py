"""How the TPU's attention kernels walk over a batch: one grid cell, all rows, with its own fetches of pages.

A row is cut into items: a block of its queries against one fetched block of its keys and values. While an item is
computed, the next one's pages (of this row or the next) are on their way into the other half of a double buffer.
Rows with one query run in a loop of their own whose query block is one token.

Source: Dao 2023, arXiv 2307.08691 (online softmax in blocks); compared with ragged_paged_attention of
jax.experimental.pallas.ops.tpu, which walks pages by grid steps.

Dimension key as in the package, and
    R  query rows of one kv head: tokens of a query block x G, padded      U  cache tokens in a compute block
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu_plan
from pallas_kernels.ragged_paged_attention.reference import MASKED
from pallas_kernels.ragged_paged_attention.tpu_plan import LANES, Blocks

NO_WINDOW = 2**30
QUERY_GROUP = 16  # query tokens laid out at once; rows of a group start at a whole tile whatever G is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a batch and their pages: scalars, the pages, and which rows are meant."""

    kv_lens: object
    table: object
    cu_q_lens: object
    settings: object  # window, page offset
    cache: object
    page_size: int  # tokens
    M: int
    last: object  # rows end here

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk(Rows):
    """One case's loop over its items. Refs and static numbers; every method traces a piece of the kernel.

    A kernel brings `fetch_keys`, which starts an item's copies, and `unpack` and `head`, which make keys and values of
    them.
    """

    numbers: object  # k_scale, v_scale
    # memory
    sinks: object
    out: object  # queries on the way in, answers on the way out
    # scratch
    kv_buf: object
    q_buf: object
    out_buf: object
    q_rows: object
    acc: object
    top: object
    total: object
    pending: object  # tokens on their way out: two answer buffers, page writes
    kv_sems: object
    q_sems: object
    out_sems: object
    # static
    blocks: Blocks
    K: int
    scale: float
    soft_cap: float | None
    has_window: bool

    @property
    def operand(self):
        """What the matrix unit multiplies."""
        return self.q_rows.dtype

    @property
    def G(self):
        return self.out.shape[1] // self.K

    # ---- which tokens ----

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
        """Starts bringing in an item's keys and values."""
        raise NotImplementedError

    def num_fetched(self, s, qb, kb):
        """Tokens that `fetch_keys` brings in."""
        begin, end, _ = self.span(s, qb, kb)
        return end - begin

    def fetched(self, s, qb, kb, slot):
        """As large parts of the buffers as `fetch_keys` fills."""
        return [self.kv_buf.at[slot, pl.ds(0, self.num_fetched(s, qb, kb))]]

    def start_row(self, s):
        """What a row's first item does besides."""

    def finish(self):
        """What is left to do behind the last item."""

    def query_copies(self, s, qb, slot):
        n = jnp.minimum(self.blocks.query, self.q_len(s) - qb * self.blocks.query)
        source = self.out.at[pl.ds(self.cu_q_lens[s] + qb * self.blocks.query, n)]
        return [pltpu.make_async_copy(source, self.q_buf.at[slot, pl.ds(0, n)], self.q_sems.at[slot])]

    def fetch_queries(self, s, qb, slot):
        for copy in self.query_copies(s, qb, slot):
            copy.start()

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
            self.finish()

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
            def _row():
                self.start_row(s)

            for copy in self.query_copies(s, qb, q_slot):
                copy.wait()
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
                    k = i * together + j
                    self.fold_head(k, *self.head(k, slot, pl.multiple_of(c * U, U)), hidden_RU, *self.scales(k))

    def unpack(self, slot, offset, begin, end):
        """Makes a compute block ready for `head`; what lies outside [begin, end) may be anything, and becomes zero."""
        raise NotImplementedError

    def head(self, k, slot, offset):
        """Keys and values of kv head k of a compute block: two of [U, H]."""
        raise NotImplementedError

    def scales(self, k):
        """What each key and each value of kv head k is multiplied by, two of [1, U]; None for the same for all."""
        return None, None

    def hidden(self, first_position, position):
        """Which keys of a compute block which query rows must not see."""
        shape = (self.q_rows.shape[1], self.blocks.compute)
        key_RU = position + lax.broadcasted_iota(jnp.int32, shape, 1)
        query_RU = first_position
        if self.blocks.query > 1:
            query_RU += lax.broadcasted_iota(jnp.int32, shape, 0) // self.G
        hidden_RU = key_RU > query_RU
        return hidden_RU | (key_RU <= query_RU - self.settings[0]) if self.has_window else hidden_RU

    def fold_head(self, k, k_UH, v_UH, hidden_RU, k_scale_1U, v_scale_1U):
        dot = functools.partial(
            lax.dot_general,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if self.operand == jnp.float32 else None,
        )
        logits_RU = dot(self.q_rows[k], k_UH, (((1,), (1,)), ((), ()))) * (self.scale * self.numbers[0])
        if k_scale_1U is not None:
            logits_RU *= k_scale_1U
        if self.soft_cap is not None:
            logits_RU = self.soft_cap * jnp.tanh(logits_RU / self.soft_cap)
        logits_RU = jnp.where(hidden_RU, MASKED, logits_RU)
        top_RL = self.top[k]
        new_top_RL = jnp.maximum(top_RL, logits_RU.max(axis=1, keepdims=True))
        decay_RL = jnp.exp(top_RL - new_top_RL)
        probs_RU = jnp.exp(logits_RU - _across_lanes(new_top_RL, logits_RU.shape[1]))
        self.top[k] = new_top_RL
        self.total[k] = self.total[k] * decay_RL + probs_RU.sum(axis=1, keepdims=True)
        if v_scale_1U is not None:
            probs_RU *= v_scale_1U
        value_RH = dot(probs_RU.astype(self.operand), v_UH, (((1,), (0,)), ((), ())))
        self.acc[k] = self.acc[k] * _across_lanes(decay_RL, value_RH.shape[1]) + value_RH


def kv_end(first_position, num_queries, kv_len):
    """One past the last cache token that a block of queries sees."""
    return jnp.minimum(first_position + num_queries, kv_len)


def page_id(walk, s, p):
    return walk.table[s * walk.M + p] + walk.settings[1]


def wait_keys(walk, s, qb, kb, slot):
    """Waits until all of an item's keys and values are in; a semaphore counts bytes, so one wait serves all copies."""
    for part in walk.fetched(s, qb, kb, slot):
        pltpu.make_async_copy(part, part, walk.kv_sems.at[slot]).wait()


def _to_rows(x_TGH, rows):
    T, G, H = x_TGH.shape
    x_RH = x_TGH.reshape(T * G, H)
    return x_RH if T * G == rows else jnp.concatenate([x_RH, jnp.zeros((rows - T * G, H), x_RH.dtype)], axis=0)


def _across_lanes(x_RL, width):
    """Widens a value repeated over 128 lanes to any width."""
    return x_RL[:, :width] if width <= LANES else side_by_side([x_RL] * (width // LANES))


def side_by_side(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
