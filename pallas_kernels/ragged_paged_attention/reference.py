"""What ragged paged attention computes, in plain jnp. See the package for arguments and dimension key.

One row after another, as many as there really are; a row gathers all pages its table could name.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import scales

MASKED = -1e30  # finite: -inf minus -inf is nan


def supports(q_TNH, k_TKH, cache_PBCH) -> bool:
    return True


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
):
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    row_T, position_T, live_T = locate(T, kv_lens_S, cu_q_lens_S1, counts_2)
    cache_PBCH = write(
        cache_PBCH, k_TKH, v_TKH, k_scale, v_scale, page_table_SM, row_T, position_T, live_T, page_offset
    )
    q_TKGH = q_TNH.reshape(T, K, N // K, H).astype(jnp.float32)

    def fold_row(s, out_TKGH):
        k_UKH, v_UKH = _read(cache_PBCH, page_table_SM[s] + page_offset, kv_lens_S[s], K, H, k_scale, v_scale)
        logits_KGTU = jnp.einsum("TKGH,UKH->KGTU", q_TKGH, k_UKH, precision="highest") * scale
        if soft_cap is not None:
            logits_KGTU = soft_cap * jnp.tanh(logits_KGTU / soft_cap)
        key_position_U = jnp.arange(k_UKH.shape[0])
        seen_TU = key_position_U <= position_T[:, None]
        if window is not None:
            seen_TU &= key_position_U > position_T[:, None] - window
        probs_KGTU = _softmax(jnp.where(seen_TU, logits_KGTU, MASKED), sinks_N)
        row_TKGH = jnp.einsum("KGTU,UKH->TKGH", probs_KGTU, v_UKH, precision="highest")
        mine_T = live_T & (row_T == s)
        return jnp.where(mine_T[:, None, None, None], row_TKGH, out_TKGH)

    out_TKGH = jax.lax.fori_loop(0, counts_2[1], fold_row, jnp.zeros_like(q_TKGH))
    return out_TKGH.reshape(T, N, H).astype(q_TNH.dtype), cache_PBCH


def locate(T, kv_lens_S, cu_q_lens_S1, counts_2):
    """Each token's row, its position in that row, and whether it is real."""
    token_T = jnp.arange(T, dtype=jnp.int32)
    row_T = count_at_most(cu_q_lens_S1[1:], token_T)
    live_T = (token_T < cu_q_lens_S1[-1]) & (row_T < counts_2[1])
    row_T = jnp.minimum(row_T, kv_lens_S.shape[0] - 1)
    return row_T, kv_lens_S[row_T] - cu_q_lens_S1[row_T + 1] + token_T, live_T


def count_at_most(ends_S, x_T):
    """How many ends are at or below each x: int32[T]. searchsorted would be a loop of small programs on a GPU."""
    return (ends_S[None, :] <= x_T[:, None]).sum(1, dtype=jnp.int32)


def write(cache_PBCH, k_TKH, v_TKH, k_scale, v_scale, page_table_SM, row_T, position_T, live_T, page_offset):
    P, B, C, padded_H = cache_PBCH.shape
    T, K, H = k_TKH.shape
    are_in, are_behind = scales.are_in(cache_PBCH, K), scales.are_behind(cache_PBCH, K)
    B = scales.page_size(cache_PBCH) if are_behind else B
    page_T = page_table_SM[row_T, jnp.clip(position_T // B, 0, page_table_SM.shape[1] - 1)] + page_offset
    # Past the end, hence dropped; no two alike, or a GPU would write each number by compare-and-swap.
    page_T = jnp.where(live_T, page_T, P + jnp.arange(T))
    scale_TC = jnp.zeros((T, 0))
    if are_in or are_behind:
        (k_TKH, k_scale_TK), (v_TKH, v_scale_TK) = scales.rounded(k_TKH), scales.rounded(v_TKH)
        scale_TC = jnp.stack([k_scale_TK, v_scale_TK], axis=2).reshape(T, 2 * K)
    else:
        k_TKH, v_TKH = store(k_TKH, k_scale, cache_PBCH), store(v_TKH, v_scale, cache_PBCH)
    kv_TCH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, 2 * K, H)
    kv_TCH = jnp.pad(kv_TCH, ((0, 0), (0, 0 if are_in else C - 2 * K), (0, padded_H - H)))
    if are_in:
        kv_TCH = jnp.concatenate([kv_TCH, scales.as_vectors(scale_TC, padded_H)], axis=1)
    cache_PBCH = cache_PBCH.at[page_T, position_T % B].set(kv_TCH, mode="drop", unique_indices=True)
    if not are_behind:
        return cache_PBCH
    planes_TXC = scales.as_planes(jnp.pad(scale_TC, ((0, 0), (0, C - 2 * K))))
    first_T = B + position_T % B // scales.LANES * scales.BYTES
    place_TX1 = first_T[:, None, None] + jnp.arange(scales.BYTES)[:, None]
    where = page_T[:, None, None], place_TX1, jnp.arange(C), (position_T % B % scales.LANES)[:, None, None]
    return cache_PBCH.at[where].set(planes_TXC, mode="drop", unique_indices=True)


def store(x_TKH, scale, cache_PBCH):
    """A key or value as the cache holds it; what an 8-bit cache cannot hold saturates."""
    dtype = cache_PBCH.dtype
    if dtype.itemsize > 1:
        return x_TKH.astype(dtype)
    x_TKH = x_TKH.astype(jnp.float32) / (1.0 if scale is None else scale)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(x_TKH), -127, 127).astype(dtype)
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x_TKH, -top, top).astype(dtype)


def _read(cache_PBCH, page_M, kv_len, K, H, k_scale, v_scale):
    """Keys and values of one row as float32, zero past its length (pages not in use may hold anything)."""
    kv_MBCH = cache_PBCH.at[page_M].get(mode="clip")
    are_behind = scales.are_behind(cache_PBCH, K)
    B = scales.page_size(cache_PBCH) if are_behind else cache_PBCH.shape[1]
    kv_UCH = kv_MBCH[:, :B].reshape(-1, *cache_PBCH.shape[2:])
    live_U = jnp.arange(kv_UCH.shape[0]) < kv_len
    if are_behind or scales.are_in(cache_PBCH, K):
        scale_UC = scales.of_planes(kv_MBCH[:, B:], B)[:, : 2 * K] if are_behind else scales.of_tokens(kv_UCH, K)
        kv_UCH = kv_UCH[:, : 2 * K, :H].astype(jnp.float32) * scale_UC[..., None]
    kv_UCH = jnp.where(live_U[:, None, None], kv_UCH[:, : 2 * K, :H].astype(jnp.float32), 0)
    k_UKH, v_UKH = kv_UCH[:, 0::2], kv_UCH[:, 1::2]
    quantised = cache_PBCH.dtype.itemsize == 1
    return (
        k_UKH * k_scale if quantised and k_scale is not None else k_UKH,
        v_UKH * v_scale if quantised and v_scale is not None else v_UKH,
    )


def _softmax(logits_KGTU, sinks_N):
    top_KGT1 = jnp.max(logits_KGTU, axis=-1, keepdims=True)
    if sinks_N is None:
        weights_KGTU = jnp.exp(logits_KGTU - top_KGT1)
        return weights_KGTU / jnp.sum(weights_KGTU, axis=-1, keepdims=True)
    K, G = logits_KGTU.shape[:2]
    sink_KG11 = sinks_N.reshape(K, G, 1, 1).astype(jnp.float32)
    top_KGT1 = jnp.maximum(top_KGT1, sink_KG11)
    weights_KGTU = jnp.exp(logits_KGTU - top_KGT1)
    return weights_KGTU / (jnp.sum(weights_KGTU, axis=-1, keepdims=True) + jnp.exp(sink_KG11 - top_KGT1))
