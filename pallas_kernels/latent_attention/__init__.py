"""Latent (MLA) attention: all heads read one compressed vector a token, kept in pages.

Queries come absorbed: q_latent has been multiplied by the heads' key up-projections, and the answer is still latent,
to be multiplied by the value up-projections. So a token's page entry is its latent and its rotary key, end to end,
and a step reads each entry once for all heads.

Source: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1, with the absorption of its appendix B.

Dimension key
    T  tokens in the step, all rows end to end     S  rows (sequences)      M  page-table columns
    N  query heads     R  latent width (kv_lora_rank)     H  rotary width     W  R + H, padded
    P  pages in the pool     B  tokens in a page
"""

import importlib

from pallas_kernels.latent_attention import tpu_plan
from pallas_kernels.platform import current_device_kind, current_platform

# Name -> module beside this file, loaded on first use, whose `attend` has the door's signature.
IMPLEMENTATIONS = {"reference": "reference", "tpu": "tpu"}


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
    max_q_len=None,
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
        max_q_len: int: no row has more queries than this; None when any may have all T. Known while tracing; with 1 the
            program has no part for chunks.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        Latent answers `[T, N, R]` in q's dtype, padding tokens finite; and the cache with this step's tokens in it.

    Raises:
        ValueError: the cache is narrower than latent and rotary key, or the implementation is unknown or does not take
            these shapes and dtypes.
    """
    R, H, W = latent_TR.shape[1], rope_TH.shape[1], cache_PBW.shape[2]
    if W < R + H:
        raise ValueError(f"a cache {W} wide cannot hold latents of {R} and rotary keys of {H}; shape it by cache_shape")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    name = implementation or _fastest(q_latent_TNR, q_rope_TNH, cache_PBW, page_table_SM)
    return importlib.import_module(f"{__name__}.{IMPLEMENTATIONS[name]}").attend(
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
        max_q_len=max_q_len,
    )


def cache_shape(num_pages, page_size, latent_width, rope_width, platform) -> tuple[int, int, int]:
    """The shape of one layer's pages: latent and rotary key end to end, in whole lanes on a TPU."""
    width = latent_width + rope_width
    return (num_pages, page_size, tpu_plan.round_up(width, tpu_plan.LANES) if platform == "tpu" else width)


def _fastest(q_latent_TNR, q_rope_TNH, cache_PBW, page_table_SM) -> str:
    arrays = q_latent_TNR, q_rope_TNH, cache_PBW, page_table_SM
    is_taken = current_platform() == "tpu" and tpu_plan.refusal(*arrays, current_device_kind()) is None
    return "tpu" if is_taken else "reference"
