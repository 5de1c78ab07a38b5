"""What latent attention computes, in plain jnp. See the package for arguments and dimension key.

One row after another; a row gathers all pages its table could name: U tokens.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.reference import MASKED, locate


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
):
    (T, N, R), W = q_latent_TNR.shape, cache_PBW.shape[2]
    row_T, position_T, live_T = locate(T, kv_lens_S, cu_q_lens_S1, counts_2)
    new_TW = _widen(jnp.concatenate([latent_TR, rope_TH], axis=1), W)
    cache_PBW = _write(cache_PBW, new_TW, page_table_SM, row_T, position_T, live_T, page_offset)
    q_TNW = _widen(jnp.concatenate([q_latent_TNR, q_rope_TNH], axis=2), W).astype(jnp.float32)

    def fold_row(s, out_TNR):
        entry_UW = _read(cache_PBW, page_table_SM[s] + page_offset, kv_lens_S[s])
        logits_TNU = jnp.einsum("TNW,UW->TNU", q_TNW, entry_UW, precision="highest") * scale
        seen_TU = jnp.arange(entry_UW.shape[0]) <= position_T[:, None]
        probs_TNU = jax.nn.softmax(jnp.where(seen_TU[:, None], logits_TNU, MASKED), axis=-1)
        row_TNR = jnp.einsum("TNU,UR->TNR", probs_TNU, entry_UW[:, :R], precision="highest")
        return jnp.where((live_T & (row_T == s))[:, None, None], row_TNR, out_TNR)

    out_TNR = jax.lax.fori_loop(0, counts_2[1], fold_row, jnp.zeros((T, N, R), jnp.float32))
    return out_TNR.astype(q_latent_TNR.dtype), cache_PBW


def _write(cache_PBW, new_TW, page_table_SM, row_T, position_T, live_T, page_offset):
    P, B, _ = cache_PBW.shape
    page_T = page_table_SM[row_T, jnp.clip(position_T // B, 0, page_table_SM.shape[1] - 1)] + page_offset
    page_T = jnp.where(live_T, page_T, P)  # past the end, hence dropped
    return cache_PBW.at[page_T, position_T % B].set(new_TW.astype(cache_PBW.dtype), mode="drop")


def _read(cache_PBW, page_M, kv_len):
    """A row's entries, float32, zeros past its length: pages not in use may hold anything, and 0 times NaN is NaN."""
    entry_UW = cache_PBW.at[page_M].get(mode="clip").reshape(-1, cache_PBW.shape[2])
    live_U = jnp.arange(entry_UW.shape[0]) < kv_len
    return jnp.where(live_U[:, None], entry_UW.astype(jnp.float32), 0)


def _widen(x, width):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
