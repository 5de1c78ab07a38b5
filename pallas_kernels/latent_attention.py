"""Latent (MLA) attention: all heads read one compressed vector a token, kept in pages.

Queries come absorbed: q_latent has been multiplied by the heads' key up-projections, and the answer is still latent,
to be multiplied by the value up-projections. So a token's page entry is its latent and its rotary key, end to end,
and a step reads each entry once for all heads.

Source: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1, with the absorption of its appendix B.

Dimension key
    T  tokens in the step, all rows end to end     S  rows (sequences)      M  page-table columns
    N  query heads     R  latent width (kv_lora_rank)     H  rotary width     W  R + H, padded
    P  pages in the pool     B  tokens in a page     U  tokens gathered for one row
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.reference import MASKED, locate

LANES = 128


def latent_attention(
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
    implementation=None,
):
    """Writes the step's latents into their pages, then attends each query to its own row's past.

    Args:
        q_latent_TNR, q_rope_TNH: absorbed queries and their rotary part.
        latent_TR, rope_TH: the step's latents, normalised, and rotary keys: what pages keep.
        cache_PBW: one layer's pages, shaped by `cache_shape`. Written in place when donated.
        kv_lens_S, page_table_SM, cu_q_lens_S1, counts_2: as in ragged_paged_attention.
        scale: multiplies the logits.
        page_offset: int or int32 scalar added to every page id, for layers that share one array.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        Latent answers `[T, N, R]` in q's dtype, zeros for padding tokens; and the cache with this step's tokens in it.

    Raises:
        ValueError: the cache is narrower than latent and rotary key, or the implementation is unknown.
    """
    R, H, W = latent_TR.shape[1], rope_TH.shape[1], cache_PBW.shape[2]
    if W < R + H:
        raise ValueError(f"a cache {W} wide cannot hold latents of {R} and rotary keys of {H}; shape it by cache_shape")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation or "reference"](
        q_latent_TNR,
        q_rope_TNH,
        latent_TR,
        rope_TH,
        cache_PBW,
        kv_lens_S,
        page_table_SM,
        cu_q_lens_S1,
        counts_2,
        scale=scale,
        page_offset=page_offset,
    )


def cache_shape(num_pages, page_size, latent_width, rope_width, platform) -> tuple[int, int, int]:
    """The shape of one layer's pages: latent and rotary key end to end, in whole lanes on a TPU."""
    width = latent_width + rope_width
    return (num_pages, page_size, -(-width // LANES) * LANES if platform == "tpu" else width)


def reference(
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
):
    """Plain jnp, one row after another; a row gathers all pages its table could name."""
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


IMPLEMENTATIONS = {"reference": reference}
