"""The compiled step: the only place where runtime code meets the device.

    step(weights, state, packed, mask_SW) -> (state, out)        state is donated

One pure function a bucket. What the scheduler decided arrives as numbers in fixed shapes; features
are arrays that may be neutral, not branches that need another program. Here is the step of a mixed
bucket: chunks of prompts, and one token of each row that decodes. A decode bucket's is in window.py.

Dimension key
    T  tokens of the bucket     S  rows of the bucket     W  32-bit words of a vocabulary mask
    X  slots, the last one idle     U  tokens a slot's history holds
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from models.inputs import StepInputs
from models.interface import bind
from runtime.batch import FROM_DEVICE, StepLayout
from runtime.buckets import Bucket
from runtime.config import EnginePlan
from runtime.sampling import Knobs, finished, sample_states, score_tokens, whole_scores
from runtime.step_state import StepOutput, StepState, pack_rows
from runtime.window import make_window


def make_step(graph: Any, bucket: Bucket, plan: EnginePlan) -> Callable:
    """The step of one bucket, to be jitted with its state donated.

    Args:
        graph: the model without weights, from models.interface.abstract.

    Returns:
        step(weights, state, packed, mask_SW) -> (state, StepOutput); mask_SW is uint32, a row's
        allowed tokens by bits, read only for rows whose `has_mask` knob is set.
    """
    return make_window(graph, bucket, plan) if bucket.is_decode else _make_mixed(graph, bucket, plan)


def _make_mixed(graph: Any, bucket: Bucket, plan: EnginePlan) -> Callable:
    layout = StepLayout.of(bucket, plan)
    T, S, idle = bucket.num_tokens, bucket.num_rows, plan.max_num_seqs

    def step(weights, state: StepState, packed, mask_SW):
        f = layout.unpack(packed)
        num_decode, num_rows, num_tokens, num_scored, *_ = f["counts"]
        cu_S1, slots_S = f["cu_q_lens"], f["slots"]
        decodes_S = jnp.arange(S) < num_decode
        kv_lens_S = jnp.where(decodes_S, state.length_X[slots_S], f["kv_lens"])
        gains_S = (f["advance"] > 0) & ~(decodes_S & state.is_over_X[slots_S])
        index_T = jnp.arange(T, dtype=jnp.int32)
        row_T = jnp.minimum((index_T[:, None] >= cu_S1[None, 1:]).sum(1), S - 1)
        real_T = index_T < num_tokens
        slot_T = jnp.where(real_T, slots_S[row_T], idle)
        positions_T = jnp.where(real_T, (kv_lens_S - cu_S1[1:])[row_T] + index_T, 0)
        known_T = state.history_XU[slot_T, positions_T]
        token_ids_T = jnp.where(f["token_ids"] == FROM_DEVICE, known_T, f["token_ids"])

        model = bind(graph, weights)
        inputs = StepInputs(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            cu_q_lens_S1=cu_S1,
            kv_lens_S=kv_lens_S,
            page_table_SM=f["page_table"],
            counts_2=jnp.stack([num_decode, num_rows]),
            num_tokens=num_tokens,
        )
        hidden_TD, caches = model(inputs, state.caches)
        history_XU = state.history_XU.at[slot_T, positions_T].set(token_ids_T)

        knobs = Knobs.unpack(f["knobs"], num_known_S=kv_lens_S)
        sampled = sample_states(
            model,
            hidden_TD[jnp.maximum(cu_S1[1:] - 1, 0)],
            knobs,
            state.tables,
            slots_S,
            history_XU,
            mask_SW,
            num_rows=num_rows,
            max_logprobs=plan.num_logprobs,
            logprobs_mode=plan.logprobs_mode,
        )
        ends_S = finished(sampled.token_S, knobs, state.tables, slots_S) | sampled.is_faulty_S
        to_slot_S = jnp.where(gains_S, slots_S, idle)
        state = StepState(
            caches,
            history_XU.at[to_slot_S, kv_lens_S].set(sampled.token_S),
            state.length_X.at[to_slot_S].set(kv_lens_S + 1),
            state.is_over_X.at[to_slot_S].set(ends_S),
            state.tables,
        )
        is_last_T = index_T == cu_S1[1:][row_T] - 1
        next_ids_T = jnp.where(is_last_T, f["next_tokens"][row_T], jnp.roll(token_ids_T, -1))
        logits = whole_scores(model.logits)
        prompt = score_tokens(hidden_TD, next_ids_T, num_scored, logits, max_logprobs=plan.num_logprobs)
        count_S, faulty_S = gains_S.astype(jnp.int32), gains_S & sampled.is_faulty_S
        rows_OS = pack_rows(count_S, faulty_S, sampled.rank_S, sampled.logprob_S, sampled.token_S[None])
        return state, StepOutput(rows_OS, sampled.top_ids_SJ, sampled.top_logprobs_SJ, prompt)

    return step
