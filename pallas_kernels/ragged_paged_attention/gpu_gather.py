"""Attention over gathered pages in plain XLA: for GPUs and page dtypes that the Mosaic kernel does not take.

Row after row and block after block of queries, a loop gathers some of the row's pages at a time and folds them into
a running softmax, so memory stays bounded and only pages in use are read.

Dimension key as in the package, and
    Q  queries of a block      U  cache tokens gathered at once
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention import scales
from pallas_kernels.ragged_paged_attention.reference import MASKED

QUERIES, KEYS = 256, 1024


def attend_pages(
    q_TNH,
    cache_PBCH,
    kv_lens_S,
    page_table_SM,
    cu_q_lens_S1,
    counts_2,
    *,
    num_kv_heads,
    scale,
    window,
    soft_cap,
    sinks_N,
    k_scale,
    v_scale,
    page_offset,
):
    """Attends queries to pages already written. Returns `[T, N, H]`; tokens past the last row's are meaningless."""
    T, N, H = q_TNH.shape
    K, B = num_kv_heads, cache_PBCH.shape[1]
    M = page_table_SM.shape[1]
    queries, pages = min(QUERIES, T), max(1, min(M, KEYS // B))
    quantised, has_scales = cache_PBCH.dtype.itemsize == 1, scales.are_in(cache_PBCH, K)
    scale = scale * (k_scale if quantised and k_scale is not None else 1.0)
    page_table_SM = jnp.pad(page_table_SM, ((0, 0), (0, -M % pages)))
    # A block may start near the last token: it is read and written with room to spare.
    q_TKGH = jnp.pad(q_TNH, ((0, queries), (0, 0), (0, 0))).reshape(T + queries, K, N // K, H)
    sinks_KG1 = jnp.full((K, N // K, 1), MASKED) if sinks_N is None else sinks_N.reshape(K, -1, 1).astype(jnp.float32)

    def read(s, i, begin, end):
        page_W = lax.dynamic_slice(page_table_SM, (s, i * pages), (1, pages))[0]
        kv_UCH = cache_PBCH.at[page_W + page_offset].get(mode="clip").reshape(pages * B, *cache_PBCH.shape[2:])
        position_U = i * pages * B + jnp.arange(pages * B)
        used_U = (position_U >= begin) & (position_U < end)
        scale_UC = scales.of_tokens(kv_UCH, K)[..., None] if has_scales else 1
        kv_UCH = (kv_UCH[:, : 2 * K, :H].astype(q_TNH.dtype) * scale_UC).astype(q_TNH.dtype)
        kv_UCH = jnp.where(used_U[:, None, None], kv_UCH, 0)
        return kv_UCH[:, 0::2], kv_UCH[:, 1::2], position_U

    def fold_queries(s, b, out_TKGH):
        first, q_len = cu_q_lens_S1[s] + b * queries, cu_q_lens_S1[s + 1] - cu_q_lens_S1[s]
        q_QKGH = lax.dynamic_slice_in_dim(q_TKGH, first, queries)
        position_Q = kv_lens_S[s] - q_len + b * queries + jnp.arange(queries)
        end = jnp.minimum(position_Q[-1] + 1, kv_lens_S[s])
        begin = 0 if window is None else jnp.maximum(position_Q[0] + 1 - window, 0)

        def fold_keys(i, carry):
            acc_KGQH, top_KGQ, total_KGQ = carry
            k_UKH, v_UKH, position_U = read(s, i, begin, end)
            logits_KGQU = scale * jnp.einsum("QKGH,UKH->KGQU", q_QKGH, k_UKH, preferred_element_type=jnp.float32)
            if soft_cap is not None:
                logits_KGQU = soft_cap * jnp.tanh(logits_KGQU / soft_cap)
            seen_QU = (position_U <= position_Q[:, None]) & (position_U < end)
            if window is not None:
                seen_QU &= position_U > position_Q[:, None] - window
            logits_KGQU = jnp.where(seen_QU, logits_KGQU, MASKED)
            new_top_KGQ = jnp.maximum(top_KGQ, logits_KGQU.max(-1))
            decay_KGQ = jnp.exp(top_KGQ - new_top_KGQ)
            probs_KGQU = jnp.exp(logits_KGQU - new_top_KGQ[..., None])
            value_KGQH = jnp.einsum(
                "KGQU,UKH->KGQH", probs_KGQU.astype(v_UKH.dtype), v_UKH, preferred_element_type=jnp.float32
            )
            return (
                acc_KGQH * decay_KGQ[..., None] + value_KGQH,
                new_top_KGQ,
                total_KGQ * decay_KGQ + probs_KGQU.sum(-1),
            )

        top_KGQ = jnp.broadcast_to(sinks_KG1, (K, N // K, queries))
        total_KGQ = jnp.where(top_KGQ > 0.5 * MASKED, 1.0, 0.0)
        start = (jnp.zeros((K, N // K, queries, H), jnp.float32), top_KGQ, total_KGQ)
        acc_KGQH, _, total_KGQ = lax.fori_loop(begin // (pages * B), -(-end // (pages * B)), fold_keys, start)
        answer_QKGH = (acc_KGQH / jnp.maximum(total_KGQ, 1e-30)[..., None]).transpose(2, 0, 1, 3)
        # The next rows' tokens lie behind this row's: leave them alone.
        mine_Q = (b * queries + jnp.arange(queries) < q_len)[:, None, None, None]
        before_QKGH = lax.dynamic_slice_in_dim(out_TKGH, first, queries)
        return lax.dynamic_update_slice_in_dim(out_TKGH, jnp.where(mine_Q, answer_QKGH, before_QKGH), first, 0)

    def fold_row(s, out_TKGH):
        num_blocks = -(-(cu_q_lens_S1[s + 1] - cu_q_lens_S1[s]) // queries)
        return lax.fori_loop(0, num_blocks, lambda b, out: fold_queries(s, b, out), out_TKGH)

    out_TKGH = lax.fori_loop(0, counts_2[1], fold_row, jnp.zeros(q_TKGH.shape, jnp.float32))
    v_scale = v_scale if quantised and v_scale is not None else 1.0
    return (out_TKGH[:T].reshape(T, N, H) * v_scale).astype(q_TNH.dtype)
