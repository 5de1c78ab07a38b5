"""What the GPU kernel takes and how it cuts its work. No Pallas in here. Dimension key as in the package."""

import jax.numpy as jnp

from pallas_kernels.platform import HOPPER, is_hopper
from pallas_kernels.ragged_paged_attention import scales

TILE = 64  # rows of one wgmma; also the tokens of a block of keys
PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
# What wgmma multiplies in the place of an 8-bit number, each of which it has exactly.
WIDENED = {
    "int8": jnp.dtype(jnp.bfloat16),
    "float8_e4m3fn": jnp.dtype(jnp.float16),
    "float8_e5m2": jnp.dtype(jnp.float16),
}
# By what pages hold. Queries of others would lose digits: 8-bit pages are for models of 16 bits.
QUERIES = {
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float16": ("bfloat16", "float16", "float32"),
    "int8": ("bfloat16",),
    "float8_e4m3fn": ("bfloat16", "float16"),
    "float8_e5m2": ("bfloat16", "float16"),
}
NUM_BLOCKS = 264  # two blocks of threads for each of an H100's 132 multiprocessors


def cache_shape(num_pages, page_size, num_kv_heads, head_dim) -> tuple[int, int, int, int]:
    """One layer's pages on a GPU: H in whole rows of 128 bytes (64 of bfloat16), which is what TMA swizzles.

    Past 128 in whole 128s, which is how the kernel cuts its accumulators.
    """
    width = 64 if head_dim <= 128 else 128
    return (num_pages, page_size, 2 * num_kv_heads, -(-head_dim // width) * width)


def refusal(q_TNH, k_TKH, cache_PBCH, device_kind) -> str | None:
    """Why a GPU should not run this at all: what the kernel does not take for a number that is the caller's choice."""
    N, K, B = q_TNH.shape[1], k_TKH.shape[1], cache_PBCH.shape[1]
    if N % K or (B not in PAGE_SIZES and is_hopper(device_kind)):
        return kernel_refusal(q_TNH, k_TKH, cache_PBCH, device_kind)
    return None


def kernel_refusal(q_TNH, k_TKH, cache_PBCH, device_kind) -> str | None:
    """Why the Mosaic kernel cannot run this, with the nearest that it can; None when it can."""
    N, H = q_TNH.shape[1:]
    K = k_TKH.shape[1]
    P, B, C, cache_H = cache_PBCH.shape
    if N % K:
        return f"{N} query heads cannot share {K} kv heads evenly; use {max(1, N // K) * K} query heads"
    if not is_hopper(device_kind):
        return f"{device_kind} is not a Hopper GPU ({', '.join(HOPPER)})"
    if B not in PAGE_SIZES:
        nearest = min(PAGE_SIZES, key=lambda size: (abs(size - B), size))
        return f"page size {B} is not one of {PAGE_SIZES}; use {nearest}"
    if N // K > TILE:
        return f"{N // K} query heads a kv head are over a tile's {TILE}"
    queries = QUERIES.get(cache_PBCH.dtype.name)
    if queries is None:
        return f"the kernel takes no pages of {cache_PBCH.dtype}; use bfloat16 or float16"
    if q_TNH.dtype.name not in queries:
        return f"pages of {cache_PBCH.dtype} take queries of {' or '.join(queries)}, not of {q_TNH.dtype}"
    if cache_H > MAX_HEAD_DIM:
        return f"head_dim {H} is over the kernel's {MAX_HEAD_DIM}"
    if cache_H % TILE or (cache_H > 128 and cache_H % 128):
        wanted = 256 if cache_H > 128 else 64 * -(-cache_H // 64)
        return f"a cache {cache_H} wide was given where the kernel needs {wanted}; allocate it by cache_shape"
    if C != 2 * K and not scales.are_in(cache_PBCH, K):
        return f"a cache of {C} vectors a token was given where the kernel needs {2 * K}; allocate it by cache_shape"
    return None


def num_splits(num_tiles, max_tokens) -> int:
    """Parts of a tile's keys that run side by side: as many as fill the GPU in whole waves of thread blocks.

    Args:
        num_tiles: tiles times kv heads, each the work of one block of threads when it is not split.
        max_tokens: keys that a tile may have.
    """
    most = max(1, min(32, max_tokens // (4 * TILE)))
    # A wave lasts as long as a part does, and a part's own start and end as long as a 64th of the keys.
    duration = lambda parts: -(-num_tiles * parts // NUM_BLOCKS) * (1 / parts + 1 / 64)
    return min(range(1, most + 1), key=duration)


def num_stages(head_dim, dtype) -> int:
    """Blocks of keys and values in flight: 32 KiB each at 128 dimensions; two thread blocks share 227 KiB.

    Of 8 bits half of that, beside a buffer of 16 KiB for a block that is widened.
    """
    if jnp.dtype(dtype).itemsize == 1:
        return {64: 6, 128: 3}.get(head_dim, 2)
    return {64: 4, 128: 2}.get(head_dim, 2)


def num_warpgroups(head_dim) -> int:
    """A warpgroup sums values of 128 dimensions: 64 registers a thread, and as many for a block's product."""
    return -(-head_dim // 128)


def widened(dtype):
    """What the kernel multiplies where pages hold this."""
    return WIDENED.get(jnp.dtype(dtype).name, dtype)
