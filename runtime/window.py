"""The step of a decode bucket: a window of up to `num_steps` steps in one dispatch.

Every row brings its newest token and gains one a step. A row stops at its advance, at a token that ends it, or when it
turns out to be faulty; the others go on, and the window ends with the last of them. A row that has stopped computes
its last input again, into the same place: every kernel sees an ordinary row, and nothing new is written. Rows whose
request ended in an earlier dispatch, which the host has not read yet, never start; when all are such, nothing runs.

A window of one step is the ordinary decode step: there is no other program. In a bucket that drafts, a row brings its
drafts beside its newest token and may gain several tokens a step.

Dimension key
    S  rows of the bucket     C  tokens a row may gain in a window     W  words of a vocabulary mask
    X  slots, the last one idle     U  tokens a slot's history holds     J  likeliest tokens reported
    D  drafts a row     Q  1 + D: queries a row     T  S Q     K  knobs a row     E  2 + D
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from models.inputs import StepInputs
from models.interface import bind
from runtime.batch import StepLayout
from runtime.buckets import Bucket
from runtime.config import EnginePlan
from runtime.drafting import Spread, count_gained, propose
from runtime.sampling import Knobs, Tables, finished, looks_back_S, nothing, sample_states
from runtime.step_state import StepOutput, StepState, pack_rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a window's steps share."""

    plan: EnginePlan
    model: Any
    num_rows: jax.Array
    num_drafts: jax.Array
    slots_S: jax.Array
    cu_q_lens_S1: jax.Array
    page_table_SM: jax.Array
    knobs_KS: jax.Array
    mask_SW: jax.Array
    tables: Tables

    def sample(self, w: "Window", hidden, num, knobs, slots, mask):
        """(what is sampled from each hidden state, whether it ends its row)."""
        sampled = sample_states(
            self.model,
            hidden,
            knobs,
            self.tables,
            slots,
            w.history_XU,
            mask,
            num_rows=num,
            max_logprobs=self.plan.num_logprobs,
            logprobs_mode=self.plan.logprobs_mode,
        )
        return sampled, finished(sampled.token_S, knobs, self.tables, slots) | sampled.is_faulty_S


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """What a window's steps hand on.

    Attributes:
        caches, history_XU: as in StepState.
        num_done: steps.
        token_S: the row's input. known_S: how many tokens the row has, that one included.
        left_S: tokens the row may still gain; 0 when it has stopped.
        is_over_S, is_faulty_S: why, when not for its advance.
        tokens_CS, count_S: what it gained.
        described: (logprob_S, rank_S, top_ids_SJ, top_logprobs_SJ) of the last step.
        drafted_E: as in StepOutput.
    """

    caches: list[jax.Array]
    history_XU: jax.Array
    num_done: jax.Array
    token_S: jax.Array
    known_S: jax.Array
    left_S: jax.Array
    is_over_S: jax.Array
    is_faulty_S: jax.Array
    tokens_CS: jax.Array
    count_S: jax.Array
    described: Any
    drafted_E: jax.Array

    @property
    def runs_S(self):
        return self.left_S > 0

    def gain(self, slots_S, tokens_QS, gained_S, ends_S, is_faulty_S, **changes) -> "Window":
        """The window after a step.

        Args:
            tokens_QS, gained_S: what each row sampled, and how many of them count; 0 for a row that does not run.
            ends_S, is_faulty_S: bool, of the last one that counts.
        """
        ends_S, is_faulty_S = self.runs_S & ends_S, self.runs_S & is_faulty_S
        left_S = jnp.where(ends_S, 0, self.left_S - gained_S)
        idle, place_C1 = self.history_XU.shape[0] - 1, jnp.arange(len(self.tokens_CS))[:, None]
        place_Q1 = jnp.arange(len(tokens_QS))[:, None]
        slots_QS = jnp.where(place_Q1 < gained_S, slots_S, idle)
        tokens_CS, newest_S = self.tokens_CS, tokens_QS[0]
        for q, token_S in enumerate(tokens_QS):
            counts_S = q < gained_S
            tokens_CS = jnp.where(counts_S & (place_C1 == self.count_S + q), token_S, tokens_CS)
            newest_S = jnp.where(counts_S, token_S, newest_S)
        return dataclasses.replace(
            self,
            history_XU=self.history_XU.at[slots_QS, self.known_S + place_Q1].set(tokens_QS),
            num_done=self.num_done + 1,
            token_S=jnp.where(left_S > 0, newest_S, self.token_S),
            known_S=jnp.where(left_S > 0, self.known_S + gained_S, self.known_S),
            left_S=left_S,
            is_over_S=self.is_over_S | ends_S,
            is_faulty_S=self.is_faulty_S | is_faulty_S,
            tokens_CS=tokens_CS,
            count_S=self.count_S + gained_S,
            **changes,
        )


def make_window(graph: Any, bucket: Bucket, plan: EnginePlan) -> Callable:
    """The step of a decode bucket; see runtime.step.make_step."""
    layout = StepLayout.of(bucket, plan)
    S, Q = bucket.num_rows, 1 + bucket.num_drafts
    run_step = _plain_step if Q == 1 else _drafting_step

    def window(weights, state: StepState, packed, mask_SW):
        f = layout.unpack(packed)
        _, num_rows, _, _, num_steps, num_drafts = f["counts"]
        slots_S, table_SM = f["slots"], f["page_table"]
        model = bind(graph, weights)
        rows = Rows(
            plan, model, num_rows, num_drafts, slots_S, f["cu_q_lens"], table_SM, f["knobs"], mask_SW, state.tables
        )
        real_S = jnp.arange(S) < num_rows
        known_S = jnp.where(real_S, state.length_X[slots_S], 0)
        is_over_S = state.is_over_X[slots_S] & real_S
        w = Window(
            caches=state.caches,
            history_XU=state.history_XU,
            num_done=jnp.int32(0),
            token_S=state.history_XU[slots_S, jnp.maximum(known_S - 1, 0)],
            known_S=known_S,
            left_S=jnp.where(is_over_S, 0, f["advance"]),
            is_over_S=is_over_S,
            is_faulty_S=jnp.zeros(S, bool),
            tokens_CS=jnp.zeros((plan.max_decode_steps * Q, S), jnp.int32),
            count_S=jnp.zeros(S, jnp.int32),
            described=nothing(S, plan.num_logprobs),
            drafted_E=jnp.zeros(1 + Q, jnp.int32),
        )
        w = lax.while_loop(lambda w: (w.num_done < num_steps) & w.runs_S.any(), lambda w: run_step(rows, w), w)
        logprob_S, rank_S, top_ids_SJ, top_logprobs_SJ = w.described
        rows_OS = pack_rows(w.count_S, w.is_faulty_S, rank_S, logprob_S, w.tokens_CS)
        length_X = state.length_X.at[slots_S].set(known_S + w.count_S)
        is_over_X = state.is_over_X.at[slots_S].set(w.is_over_S)
        state = StepState(w.caches, w.history_XU, length_X, is_over_X, state.tables)
        return state, StepOutput(rows_OS, top_ids_SJ, top_logprobs_SJ, None, w.drafted_E if Q > 1 else None)

    return window


def _plain_step(rows: Rows, w: Window) -> Window:
    """One token a row."""
    inputs = StepInputs(
        token_ids_T=w.token_S,
        positions_T=jnp.maximum(w.known_S - 1, 0),
        cu_q_lens_S1=rows.cu_q_lens_S1,
        kv_lens_S=w.known_S,
        page_table_SM=rows.page_table_SM,
        counts_2=jnp.stack([rows.num_rows, rows.num_rows]),
        num_tokens=rows.num_rows,
        max_q_len=1,
    )
    hidden_SD, caches = rows.model(inputs, w.caches)
    knobs = Knobs.unpack(rows.knobs_KS, num_known_S=w.known_S)
    sampled, ends_S = rows.sample(w, hidden_SD, rows.num_rows, knobs, rows.slots_S, rows.mask_SW)
    return w.gain(
        rows.slots_S,
        sampled.token_S[None],
        w.runs_S.astype(jnp.int32),
        ends_S,
        sampled.is_faulty_S,
        caches=caches,
        described=(sampled.logprob_S, sampled.rank_S, sampled.top_ids_SJ, sampled.top_logprobs_SJ),
    )


def _drafting_step(rows: Rows, w: Window) -> Window:
    """Each row's newest token and its drafts go through the model together.

    Rows that look at their own history when they sample draft nothing: a draft's place has not its history yet.
    """
    speculation, slots_S = rows.plan.speculation, rows.slots_S
    D = speculation.num_drafts
    knobs = Knobs.unpack(rows.knobs_KS, num_known_S=w.known_S)
    drafts_DS, found_S = propose(w.history_XU, slots_S, w.known_S, speculation)
    may_S = found_S & w.runs_S & ~looks_back_S(knobs)
    num_S = jnp.where(may_S, jnp.minimum(rows.num_drafts, w.left_S - 1), 0)
    spread = Spread.of(jnp.where(w.known_S > 0, 1 + num_S, 0), (1 + D) * len(slots_S))
    row_T, real_T = spread.row_T, spread.real_T
    positions_T = jnp.where(real_T, w.known_S[row_T] - 1 + spread.place_T, 0)
    num_tokens = spread.cu_q_lens_S1[-1]
    inputs = StepInputs(
        token_ids_T=spread.tokens_T(w.token_S, drafts_DS),
        positions_T=positions_T,
        cu_q_lens_S1=spread.cu_q_lens_S1,
        kv_lens_S=w.known_S + num_S,
        page_table_SM=rows.page_table_SM,
        counts_2=jnp.stack([jnp.where((num_S > 0).any(), 0, rows.num_rows), rows.num_rows]),
        num_tokens=num_tokens,
        max_q_len=1 + D,
    )
    hidden_TD, caches = rows.model(inputs, w.caches)
    own_T = Knobs.unpack(jnp.where(real_T, rows.knobs_KS[:, row_T], 0), num_known_S=positions_T + 1)
    # A row under a mask is never beside one that drafts: each token is then its row's own.
    mask_TW = jnp.pad(rows.mask_SW, ((0, D * len(slots_S)), (0, 0)))
    slot_T = jnp.where(real_T, slots_S[row_T], rows.plan.max_num_seqs)
    sampled, ends_T = rows.sample(w, hidden_TD, num_tokens, own_T, slot_T, mask_TW)
    tokens_QS, ends_QS, faulty_QS = (
        spread.by_row(x_T, 1 + D) for x_T in (sampled.token_S, ends_T, sampled.is_faulty_S)
    )
    gained_S = count_gained(w.runs_S, tokens_QS, ends_QS, drafts_DS, num_S)
    counts_QS = jnp.arange(1 + D)[:, None] < gained_S
    top = (sampled.logprob_S, sampled.rank_S, sampled.top_ids_SJ, sampled.top_logprobs_SJ)
    drafted_E = jnp.concatenate(
        [jnp.stack([(num_S > 0).sum(dtype=jnp.int32), num_S.sum()]), counts_QS[1:].sum(1, dtype=jnp.int32)]
    )
    return w.gain(
        slots_S,
        tokens_QS,
        gained_S,
        (ends_QS & counts_QS).any(0),
        (faulty_QS & counts_QS).any(0),
        caches=caches,
        described=tuple(spread.by_row(x_T, 1)[0] for x_T in top),
        drafted_E=w.drafted_E + drafted_E,
    )
