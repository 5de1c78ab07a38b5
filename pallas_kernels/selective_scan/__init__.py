"""Selective scan: the recurrence of a Mamba layer over a packed batch, each row going on from its own state.

h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t and y_t = C_t h_t + D x_t, a state of N numbers for each of C channels.

Source: Gu and Dao 2023, arXiv 2312.00752, section 3.2 and algorithm 2.

Dimension key
    T  tokens in the step, all rows end to end     S  rows (sequences)     C  channels     N  state of a channel
    B  tokens of a block
"""

import jax
import jax.numpy as jnp

from pallas_kernels.platform import current_device_kind, current_platform
from pallas_kernels.ragged_paged_attention.reference import count_at_most

BLOCK = 8  # tokens whose states are held at once; a state of 16 x 8,192 is half a megabyte


def selective_scan(
    x_TC,
    dt_TC,
    a_NC,
    b_TN,
    c_TN,
    skip_C,
    state_SNC,
    cu_q_lens_S1,
    num_rows,
    *,
    max_q_len=None,
    implementation=None,
):
    """Runs each row's tokens through its state.

    Args:
        x_TC: channels after the convolution; dt_TC: their step sizes, positive (after softplus).
        a_NC: negative decay rates; b_TN, c_TN: what goes into and comes out of the state, a token each.
        skip_C: what of x goes straight to the answer.
        state_SNC: float32, each row's state before the step; zeros for a row that starts. Donation-friendly.
            Channels come last, since a TPU pads the last dimension to 128.
        cu_q_lens_S1: int32 running sum of tokens a row, from 0; padding rows repeat the last value.
        num_rows: int32 scalar: rows at or past it are padding.
        max_q_len: tokens that a row has at most, where it is known when the step is compiled.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        `[T, C]` in x's dtype, zeros for padding tokens; and each row's state after the step, padding rows' unchanged.

    Raises:
        ValueError: the implementation is unknown, takes one token a row or does not take these shapes and dtypes, or
            shapes do not fit together.
    """
    N, C = a_NC.shape
    if x_TC.shape != dt_TC.shape or x_TC.shape[1] != C or b_TN.shape[1] != N or state_SNC.shape[1:] != (N, C):
        raise ValueError(
            f"channels and states do not fit: x {x_TC.shape}, dt {dt_TC.shape}, a {a_NC.shape}, b {b_TN.shape}, state "
            f"{state_SNC.shape}; needed are [T, {C}], [T, {C}], [{N}, {C}], [T, {N}], [S, {N}, {C}]"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    if implementation == "update" and max_q_len != 1:
        raise ValueError(f"update takes one token a row, and max_q_len is {max_q_len}; choose blocks")
    name = implementation or _fastest(max_q_len, x_TC, dt_TC, state_SNC)
    return IMPLEMENTATIONS[name](x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_q_lens_S1, num_rows)


def reference(x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_q_lens_S1, num_rows):
    """One token after another."""
    row_T, live_T = _rows(x_TC.shape[0], cu_q_lens_S1, num_rows)

    def step(state_SNC, token):
        x_C, dt_C, b_N, c_N, row, live = token
        before_NC = state_SNC[row]
        after_NC = jnp.exp(dt_C * a_NC) * before_NC + b_N[:, None] * (dt_C * x_C)
        y_C = jnp.where(live, c_N @ after_NC + skip_C * x_C, 0)
        return state_SNC.at[row].set(jnp.where(live, after_NC, before_NC)), y_C

    a_NC, skip_C = a_NC.astype(jnp.float32), skip_C.astype(jnp.float32)
    tokens = [x.astype(jnp.float32) for x in (x_TC, dt_TC, b_TN, c_TN)]
    state_SNC, y_TC = jax.lax.scan(step, state_SNC, (*tokens, row_T, live_T))
    return y_TC.astype(x_TC.dtype), state_SNC


def update(x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_q_lens_S1, num_rows):
    """One token a row or none: all states at once."""
    T, S = x_TC.shape[0], state_SNC.shape[0]
    ran_S = (jnp.diff(cu_q_lens_S1) > 0) & (jnp.arange(S) < num_rows)
    token_S = jnp.minimum(cu_q_lens_S1[:-1], T - 1)
    x_SC, dt_SC, b_SN, c_SN = (x[token_S].astype(jnp.float32) for x in (x_TC, dt_TC, b_TN, c_TN))
    decay_SNC, inflow_SNC = _decay_and_inflow(x_SC, dt_SC, a_NC, b_SN)
    state_SNC = jnp.where(ran_S[:, None, None], decay_SNC * state_SNC + inflow_SNC, state_SNC)
    y_SC = _answer(state_SNC, c_SN, skip_C, x_SC)
    row_T, live_T = _rows(T, cu_q_lens_S1, num_rows)
    return jnp.where(live_T[:, None], y_SC[row_T], 0).astype(x_TC.dtype), state_SNC


def blocks(x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_q_lens_S1, num_rows):
    """Blocks of tokens one after another: each reads old states once and writes those of rows that end in it."""
    T, S = x_TC.shape[0], state_SNC.shape[0]
    row_T, live_T = _rows(T, cu_q_lens_S1, num_rows)
    token_T = jnp.arange(T)
    is_first_T = token_T == cu_q_lens_S1[row_T]
    is_last_T = live_T & (token_T == cu_q_lens_S1[row_T + 1] - 1)
    end_T = jnp.where(is_last_T, row_T, S)  # past the last row, hence dropped

    def block(carry, tokens):
        state_SNC, state_NC = carry
        x_BC, dt_BC, b_BN, c_BN, row_B, is_first_B, end_B = tokens
        decay_BNC, inflow_BNC = _decay_and_inflow(x_BC, dt_BC, a_NC, b_BN)
        old_BNC = state_SNC[row_B]
        states = []
        for i in range(BLOCK):
            state_NC = decay_BNC[i] * jnp.where(is_first_B[i], old_BNC[i], state_NC) + inflow_BNC[i]
            states.append(state_NC)
        states_BNC = jnp.stack(states)
        state_SNC = state_SNC.at[end_B].set(states_BNC, mode="drop")
        return (state_SNC, state_NC), _answer(states_BNC, c_BN, skip_C, x_BC)

    floats = [x.astype(jnp.float32) for x in (x_TC, dt_TC, b_TN, c_TN)]
    tokens = [_blocked(x) for x in (*floats, row_T, is_first_T)]
    start = state_SNC, jnp.zeros_like(state_SNC[0])
    (state_SNC, _), y = jax.lax.scan(block, start, (*tokens, _blocked(end_T, fill=S)))
    y_TC = y.reshape(-1, x_TC.shape[1])[:T]
    return jnp.where(live_T[:, None], y_TC, 0).astype(x_TC.dtype), state_SNC


def _decay_and_inflow(x_TC, dt_TC, a_NC, b_TN):
    """What is left of the state before a token, and what the token adds: two of float32 [T, N, C]."""
    return jnp.exp(dt_TC[:, None] * a_NC.astype(jnp.float32)), b_TN[:, :, None] * (dt_TC * x_TC)[:, None]


def _answer(state_TNC, c_TN, skip_C, x_TC):
    return (state_TNC * c_TN[:, :, None]).sum(1) + skip_C.astype(jnp.float32) * x_TC


def _blocked(x, fill=0):
    x = jnp.pad(x, [(0, -len(x) % BLOCK)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(-1, BLOCK, *x.shape[1:])


def _rows(T, cu_q_lens_S1, num_rows):
    """Each token's row, and whether it is real."""
    token_T = jnp.arange(T, dtype=jnp.int32)
    row_T = count_at_most(cu_q_lens_S1[1:], token_T)
    live_T = (token_T < cu_q_lens_S1[-1]) & (row_T < num_rows)
    return jnp.minimum(row_T, cu_q_lens_S1.shape[0] - 2), live_T


def _tpu(*arrays):
    """Both states and tokens stay in fast memory; see tpu.py."""
    from pallas_kernels.selective_scan import tpu as kernel  # imports the TPU compiler's front end

    return kernel.scan(*arrays)


def _fastest(max_q_len, x_TC, dt_TC, state_SNC) -> str:
    platform = current_platform()
    if max_q_len == 1:
        return "update"
    if platform == "tpu":
        from pallas_kernels.selective_scan import tpu as kernel

        if kernel.refusal(x_TC, dt_TC, state_SNC, current_device_kind()) is None:
            return "tpu"
    return "reference" if platform == "cpu" else "blocks"


IMPLEMENTATIONS = {"reference": reference, "update": update, "blocks": blocks, "tpu": _tpu}
