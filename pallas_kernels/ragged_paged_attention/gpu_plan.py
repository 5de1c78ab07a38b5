"""What the GPU kernels take and how they cut their work. No Pallas in here. Dimension key as in the package."""

import jax.numpy as jnp

from pallas_kernels.platform import HOPPER, has_triton, is_hopper, is_past_tritons_offsets
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
TRITON_BYTES = 16384  # of the keys of a block: beside as many values, two blocks in flight fit any GPU since Ampere


def cache_shape(num_pages, page_size, num_kv_heads, head_dim) -> tuple[int, int, int, int]:
    """One layer's pages on a GPU: H in whole rows of 128 bytes (64 of bfloat16), which is what TMA swizzles.

    Past 128 in whole 128s, which is how the kernel cuts its accumulators.
    """
    width = 64 if head_dim <= 128 else 128
    return (num_pages, page_size, 2 * num_kv_heads, -(-head_dim // width) * width)


def refusal(q_TNH, k_TKH, cache_PBCH, device_kind) -> str | None:
    """Why a GPU should not run this at all: what its kernel does not take for a number that is the caller's choice."""
    N, K, B = q_TNH.shape[1], k_TKH.shape[1], cache_PBCH.shape[1]
    if N % K or (B not in PAGE_SIZES and is_hopper(device_kind)):
        return hopper_refusal(q_TNH, k_TKH, cache_PBCH, device_kind)
    return None


def kernel(q_TNH, k_TKH, cache_PBCH, device_kind) -> str:
    """Which kernel runs this: "hopper", "triton" or "gather"."""
    if hopper_refusal(q_TNH, k_TKH, cache_PBCH, device_kind) is None:
        return "hopper"
    return "triton" if triton_refusal(q_TNH, k_TKH, cache_PBCH, device_kind) is None else "gather"


def hopper_refusal(q_TNH, k_TKH, cache_PBCH, device_kind) -> str | None:
    """Why the Mosaic kernel cannot run this, with the nearest that it can; None when it can."""
    B = cache_PBCH.shape[1]
    if reason := _refusal_of_shapes(q_TNH, k_TKH, cache_PBCH):
        return reason
    if not is_hopper(device_kind):
        return f"{device_kind} is not a Hopper GPU ({', '.join(HOPPER)})"
    if B not in PAGE_SIZES:
        nearest = min(PAGE_SIZES, key=lambda size: (abs(size - B), size))
        return f"page size {B} is not one of {PAGE_SIZES}; use {nearest}"
    queries = QUERIES.get(cache_PBCH.dtype.name)
    if queries is None:
        return f"the kernel takes no pages of {cache_PBCH.dtype}; use bfloat16 or float16"
    if q_TNH.dtype.name not in queries:
        return f"pages of {cache_PBCH.dtype} take queries of {' or '.join(queries)}, not of {q_TNH.dtype}"
    return None


def triton_refusal(q_TNH, k_TKH, cache_PBCH, device_kind) -> str | None:
    """Why the Triton kernel cannot run this; None when it can."""
    if reason := _refusal_of_shapes(q_TNH, k_TKH, cache_PBCH):
        return reason
    if not has_triton(device_kind):
        return f"{device_kind} is not a GPU of NVIDIA's with tensor cores for bfloat16, Ampere or newer"
    if cache_PBCH.dtype.itemsize == 1 and is_past_tritons_offsets(cache_PBCH.size):
        return f"pages of {cache_PBCH.size} bytes are between 2 and 4 GiB; take fewer or more"
    return None


def _refusal_of_shapes(q_TNH, k_TKH, cache_PBCH) -> str | None:
    N, H = q_TNH.shape[1:]
    K = k_TKH.shape[1]
    C, cache_H = cache_PBCH.shape[2:]
    if N % K:
        return f"{N} query heads cannot share {K} kv heads evenly; use {max(1, N // K) * K} query heads"
    if N // K > TILE:
        return f"{N // K} query heads a kv head are over a tile's {TILE}"
    if cache_H > MAX_HEAD_DIM:
        return f"head_dim {H} is over the kernel's {MAX_HEAD_DIM}"
    if cache_H not in (64, 128, 256):
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


def widened_for(q_dtype, dtype):
    """What the Triton kernel multiplies: the pages' numbers, or what holds a query's digits and theirs of 8 bits."""
    if jnp.dtype(dtype).itemsize > 1:
        return jnp.dtype(dtype)
    if q_dtype == jnp.bfloat16:
        return widened(dtype)
    return jnp.dtype(q_dtype)


def tokens_of_block(head_dim, dtype) -> int:
    """Keys that the Triton kernel folds at once."""
    return max(16, min(TILE, TRITON_BYTES // (head_dim * jnp.dtype(dtype).itemsize)))


def num_warps(num_rows, head_dim) -> int:
    """Of a Triton block: four keep the sums of 16 rows in registers, of a whole tile of wide heads eight."""
    return 8 if num_rows * head_dim >= TILE * 128 else 4
