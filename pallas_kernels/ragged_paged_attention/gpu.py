"""Ragged paged attention on a GPU: tiles of up to 64 query rows, each attended by a kernel for this GPU.

A tile is some tokens of one row times the G query heads of one kv head: one token when the row decodes, 64 // G
tokens of a chunk. Decodes are many and thin, so their keys are split over several blocks of threads (split-KV), and
the parts are joined afterwards by their log-sum-exps. Keys and values are written to their pages before, by XLA.

Hopper GPUs have a Mosaic kernel (gpu_hopper), others a Triton kernel (gpu_triton); what neither takes is gathered and
computed in plain XLA (gpu_gather).

Source: Dao et al. 2023, "Flash-Decoding for long-context inference".

Dimension key as in the package, and
    I  tiles      X  splits of a tile's keys      R  query rows of a tile
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.platform import current_device_kind
from pallas_kernels.ragged_paged_attention import gpu_gather, gpu_plan
from pallas_kernels.ragged_paged_attention.gpu_plan import TILE, cache_shape, num_splits
from pallas_kernels.ragged_paged_attention.reference import MASKED, count_at_most, locate, write

__all__ = ["attend", "cache_shape", "supports"]

FAR = 2**30  # a window that hides nothing


def supports(q_TNH, k_TKH, cache_PBCH) -> bool:
    return q_TNH.shape[1] % k_TKH.shape[1] == 0 and cache_PBCH.shape[2] >= 2 * k_TKH.shape[1]


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
    splits=None,
    kernel=None,
    interpret=False,
):
    """The door's signature, and what tests say.

    Args:
        splits: of a decode's keys; None for by formula.
        kernel: as `gpu_plan.kernel` says for this GPU, or for None, an H100's when it is interpreted.
        interpret: as Pallas takes it.
    """
    T, N, H = q_TNH.shape
    row_T, position_T, live_T = locate(T, kv_lens_S, cu_q_lens_S1, counts_2)
    cache_PBCH = write(
        cache_PBCH, k_TKH, v_TKH, k_scale, v_scale, page_table_SM, row_T, position_T, live_T, page_offset
    )
    kernel = kernel or gpu_plan.kernel(q_TNH, k_TKH, cache_PBCH, "H100" if interpret else current_device_kind())
    if kernel == "gather":
        out_TNH = gpu_gather.attend_pages(
            q_TNH,
            cache_PBCH,
            kv_lens_S,
            page_table_SM,
            cu_q_lens_S1,
            counts_2,
            num_kv_heads=k_TKH.shape[1],
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks_N=sinks_N,
            k_scale=k_scale,
            v_scale=v_scale,
            page_offset=page_offset,
        )
        return jnp.where(live_T[:, None, None], out_TNH, 0), cache_PBCH
    run = functools.partial(
        _run_tiles,
        q_TNH,
        cache_PBCH,
        # An array of its own: a slice of the step's packed vector may start where the kernel cannot take it.
        jnp.maximum(page_table_SM, 0) + page_offset,
        sinks_N,
        k_scale=k_scale,
        v_scale=v_scale,
        K=k_TKH.shape[1],
        scale=scale,
        soft_cap=soft_cap,
        kernel=kernel,
        interpret=interpret,
    )
    reach = FAR if window is None else window
    S, G, K = kv_lens_S.shape[0], N // k_TKH.shape[1], k_TKH.shape[1]
    rows = (kv_lens_S, cu_q_lens_S1, counts_2, reach)
    splits = splits or num_splits(min(S, T) * K, page_table_SM.shape[1] * cache_PBCH.shape[1])
    token_T = jnp.arange(T, dtype=jnp.int32) - cu_q_lens_S1[row_T]
    if max_q_len is not None and max_q_len * G <= TILE:
        tiles = _row_tiles(min(S, T), counts_2[1], *rows)
        out_TNH = run(tiles, tokens=max_q_len, splits=splits)[jnp.minimum(row_T, len(tiles) - 1), token_T]
    else:
        decode = run(_row_tiles(min(S, T), counts_2[0], *rows), tokens=1, splits=splits)
        tokens = TILE // G
        tiles, first_tile_S = _chunk_tiles(T, tokens, *rows)
        chunk = run(tiles, tokens=tokens, splits=1)
        # Answers lie tile by tile; each token picks its own.
        from_chunk = chunk[first_tile_S[row_T] + token_T // tokens, token_T % tokens]
        from_decode = decode[jnp.minimum(row_T, decode.shape[0] - 1), 0]
        out_TNH = jnp.where((row_T < counts_2[0])[:, None, None], from_decode, from_chunk)
    return jnp.where(live_T[:, None, None], out_TNH, 0)[..., :H].astype(q_TNH.dtype), cache_PBCH


def _row_tiles(num_tiles, num_rows, kv_lens_S, cu_q_lens_S1, counts_2, window):
    """One tile a row: (row, first token, its position, keys' end, first key it sees or less); dead rows end at 0."""
    row_I = jnp.arange(num_tiles, dtype=jnp.int32)
    end_I = jnp.where(row_I < num_rows, kv_lens_S[:num_tiles], 0)
    position_I = end_I - jnp.diff(cu_q_lens_S1)[:num_tiles]
    tiles_I5 = jnp.stack([row_I, cu_q_lens_S1[:num_tiles], position_I, end_I, position_I + 1 - window], axis=1)
    return tiles_I5.astype(jnp.int32)


def _chunk_tiles(T, tokens, kv_lens_S, cu_q_lens_S1, counts_2, window):
    """The same for rows past the decodes, cut into tiles of so many tokens; and where each row's tiles start."""
    S = kv_lens_S.shape[0]
    row_S = jnp.arange(S)
    q_len_S = jnp.where((row_S >= counts_2[0]) & (row_S < counts_2[1]), jnp.diff(cu_q_lens_S1), 0)
    last_tile_S = jnp.cumsum(-(-q_len_S // tokens))
    first_tile_S = last_tile_S - -(-q_len_S // tokens)
    tile_I = jnp.arange(T // tokens + min(S, T), dtype=jnp.int32)
    row_I = jnp.minimum(count_at_most(last_tile_S, tile_I), S - 1)
    token_I = (tile_I - first_tile_S[row_I]) * tokens
    position_I = kv_lens_S[row_I] - q_len_S[row_I] + token_I
    end_I = jnp.where(tile_I < last_tile_S[-1], jnp.minimum(position_I + tokens, kv_lens_S[row_I]), 0)
    low_I = position_I + 1 - window
    tiles_I5 = jnp.stack([row_I, cu_q_lens_S1[row_I] + token_I, position_I, end_I, low_I], axis=1)
    return tiles_I5.astype(jnp.int32), first_tile_S.astype(jnp.int32)


# Layers share one trace of this, and so one lowering of the kernel, which takes a second.
@functools.partial(jax.jit, static_argnames=("K", "scale", "soft_cap", "tokens", "splits", "kernel", "interpret"))
def _run_tiles(
    q_TNH, cache_PBCH, pages_SM, sinks_N, tiles_I5, k_scale, v_scale,
    *, K, scale, soft_cap, tokens, splits, kernel, interpret,
):  # fmt: skip
    """Attends all tiles: `[I, tokens, N, H]`, H as in the cache."""
    T, N, H = q_TNH.shape
    cache_H, G, I = cache_PBCH.shape[3], N // K, tiles_I5.shape[0]
    rows = _load(kernel).num_rows(tokens * G)
    # TMA starts at whole eights of rows, which tokens of a ragged batch do not: so lay the queries out by tile.
    token_IT = jnp.minimum(tiles_I5[:, 1:2] + jnp.arange(tokens), T - 1)
    q_IKRH = q_TNH[token_IT].reshape(I, tokens, K, G, H).transpose(0, 2, 1, 3, 4).reshape(I, K, tokens * G, H)
    q_IKRH = jnp.pad(q_IKRH, ((0, 0), (0, 0), (0, rows - tokens * G), (0, cache_H - H)))
    sinks_KR = jnp.full((K, TILE), MASKED, jnp.float32)
    if sinks_N is not None:
        repeats = -(-TILE // G)
        sinks_KR = jnp.tile(sinks_N.astype(jnp.float32).reshape(K, G), (1, repeats))[:, :TILE]
    out_IKXRH, lse_IKXR = _load(kernel).attend_tiles(
        tiles_I5, pages_SM.astype(jnp.int32), sinks_KR, q_IKRH, cache_PBCH, k_scale, v_scale,
        group=G, scale=scale, soft_cap=soft_cap, splits=splits, answers=q_TNH.dtype, interpret=interpret,
    )  # fmt: skip
    if splits == 1:
        out_IKRH = out_IKXRH[:, :, 0]
    else:
        weight_IKXR = jax.nn.softmax(lse_IKXR, axis=2)
        out_IKRH = jnp.einsum("IKXRH,IKXR->IKRH", out_IKXRH, weight_IKXR)
    out_IKTGH = out_IKRH[:, :, : tokens * G].reshape(I, K, tokens, G, cache_H)
    return out_IKTGH.transpose(0, 2, 1, 3, 4).reshape(I, tokens, N, cache_H)


def _load(kernel):
    """The kernel's module, which imports its compiler."""
    return importlib.import_module(f"pallas_kernels.ragged_paged_attention.gpu_{kernel}")
