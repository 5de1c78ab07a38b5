"""Ragged paged attention: a packed batch of chunks and decodes over keys and values kept in pages.

One door, several implementations of one signature: `reference` says what is computed and runs anywhere, the
others say how to compute it fast on one platform. The door picks by platform and by what the implementation
supports; the tests hold every implementation to the reference.

Source: Kwon et al. 2023, arXiv 2309.06180, section 4 (pages); Milakov and Gimelshein 2018, arXiv 1805.02867
(online softmax); attention sinks as in OpenAI's gpt-oss: one more logit a head, without a value.

Dimension key
    T  tokens in the step, all rows end to end     S  rows (sequences)      M  page-table columns
    N  query heads    K  key/value heads           G  N / K                 H  head dimension
    P  pages in the pool    B  tokens in a page    C  2 K: key and value of kv head 0, then of head 1, ...
"""

import importlib

import jax.numpy as jnp

from pallas_kernels.platform import current_platform
from pallas_kernels.ragged_paged_attention import gpu_plan, scales, tpu_plan

# Name -> module beside this file. A module has `attend`, of the door's signature, and `supports`, which says
# whether it can run these shapes and dtypes here. Loaded on first use: a platform's kernels import its compiler.
IMPLEMENTATIONS = {"reference": "reference", "cpu": "cpu", "tpu": "tpu", "gpu": "gpu"}

# What is tried on each platform, best first; the reference is always there.
PREFERENCE = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("gpu",), "cuda": ("gpu",)}


def ragged_paged_attention(
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
    implementation=None,
):
    """Writes the step's keys and values into their pages, then attends each query to its own row's past.

    Query j of row s stands at position kv_lens[s] - q_len[s] + j and sees the keys at or before it.

    Args:
        q_TNH, k_TKH, v_TKH: the step's queries, keys and values, any float dtype.
        cache_PBCH: one layer's pages, shaped by `cache_shape`. Written in place when donated.
        kv_lens_S: int32 tokens in the cache after this step; 0 marks a padding row.
        page_table_SM: int32 page ids; columns past a row's last page are never read.
        cu_q_lens_S1: int32 running sum of query lengths, from 0; padding rows repeat the last value.
        counts_2: int32 `[num_decode, num_rows]`: rows before num_decode have one query each.
        scale: multiplies the logits, usually H ** -0.5.
        window: int or int32 scalar: a query at position p sees keys at positions > p - window. None for all.
        soft_cap: float c: logits become c * tanh(logits / c). None for none.
        sinks_N: a logit a query head, added to the softmax's sum without a value. None for none.
        k_scale, v_scale: float or scalar: an int8 or fp8 cache holds key / k_scale. None for 1, and for an int8 cache
            that holds a scale for each key and value; see scales.py.
        page_offset: int or int32 scalar added to every page id, for layers that share one array.
        max_q_len: int: no row has more queries than this; None when any may have all T. Known while tracing, it
            spares some implementations the part of the program that reads long chunks.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        `[T, N, H]` in q's dtype, padding tokens finite; and the cache with this step's tokens in it.

    Raises:
        ValueError: N is not a multiple of K, the cache does not hold K heads, scales are given where the cache has its
            own, or the implementation is unknown.
    """
    N, K, C = q_TNH.shape[1], k_TKH.shape[1], cache_PBCH.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} kv heads evenly; check num_key_value_heads in config.json")
    if C < 2 * K:
        raise ValueError(f"a cache of {C} vectors a token cannot hold {K} keys and values; shape it by cache_shape")
    has_scales = scales.are_in(cache_PBCH, K) or scales.are_behind(cache_PBCH, K)
    if has_scales and not (k_scale is None and v_scale is None):
        raise ValueError("this cache holds a scale for each key and value; leave k_scale and v_scale out")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    name = implementation or _fastest(q_TNH, k_TKH, cache_PBCH)
    return _load(name).attend(
        q_TNH,
        k_TKH,
        v_TKH,
        cache_PBCH,
        kv_lens_S,
        page_table_SM,
        cu_q_lens_S1,
        counts_2,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
        k_scale=k_scale,
        v_scale=v_scale,
        page_offset=page_offset,
        max_q_len=max_q_len,
    )


def cache_shape(num_pages, page_size, num_kv_heads, head_dim, platform, dtype=None) -> tuple[int, ...]:
    """The shape of one layer's pages on a platform: `[P, B, C, H]`, C or H padded where its kernels need it.

    An int8 cache has room for scales of its own; see scales.py. On a TPU they make B larger, elsewhere C.
    """
    if platform == "tpu":
        return tpu_plan.cache_shape(num_pages, page_size, num_kv_heads, head_dim, dtype)
    shape = (num_pages, page_size, 2 * num_kv_heads, head_dim)
    if platform in ("gpu", "cuda"):
        shape = gpu_plan.cache_shape(num_pages, page_size, num_kv_heads, head_dim)
    if dtype is None or jnp.dtype(dtype) != jnp.int8:
        return shape
    return (*shape[:2], shape[2] + scales.num_vectors(num_kv_heads, shape[3]), shape[3])


def _fastest(q_TNH, k_TKH, cache_PBCH) -> str:
    for name in PREFERENCE.get(current_platform(), ()):
        if _load(name).supports(q_TNH, k_TKH, cache_PBCH):
            return name
    return "reference"


def _load(name):
    return importlib.import_module(f"{__name__}.{IMPLEMENTATIONS[name]}")
