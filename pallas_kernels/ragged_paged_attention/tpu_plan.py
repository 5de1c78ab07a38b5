"""What the TPU kernel takes, how it wants its cache shaped and how large its blocks are. No Pallas in here.

The formulas aim at two things: a fetch long enough to hide its own latency behind the memory's bandwidth, and a
compute block small enough that its logits stay near the registers. `tuned/ragged_paged_attention_tpu.json`
overrides them for the shapes it names.

Dimension key as in the package.
"""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import scales
from pallas_kernels.ragged_paged_attention.scales import LANES, PAGE_SIZES

IN_FLIGHT = 16  # pages whose scales are written at a time
CACHE_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2")
MAX_HEAD_DIM = 256
TABLE_BYTES = 2**20 - 32 * 1024  # of the scalar memory of one core; page table and lengths live there
# Vector memory of a core: what its compiler says when it refuses more. What is not listed has that of v5e and v6e.
VMEM_BYTES = {"TPU v4": 16 * 2**20, "TPU v5": 64 * 2**20, "TPU7x": 64 * 2**20}
FETCH_BYTES = 2 * 2**20  # about 1.5 us at 1.6 TB/s, the latency that one fetch must hide
TUNED_PATH = pathlib.Path(__file__).parents[1] / "tuned" / "ragged_paged_attention_tpu.json"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one case, in tokens.

    Attributes:
        query: query tokens worked on together; 1 in the decode case.
        fetch: cache tokens brought in by one fetch; a multiple of the page size and of `compute`.
        compute: cache tokens folded into the softmax at once.
    """

    query: int
    fetch: int
    compute: int


def cache_shape(num_pages, page_size, num_kv_heads, head_dim, dtype=None) -> tuple[int, int, int, int]:
    """One layer's pages on a TPU: H in whole lanes, C such that tokens lie end to end without holes.

    With int8 for a dtype, B has room for scales behind a page's tokens; see scales.py.
    """
    dtype = None if dtype is None else jnp.dtype(dtype)
    heads = padded_heads(num_kv_heads, dtype)
    has_scales = dtype == jnp.int8 and page_size in PAGE_SIZES
    tokens = page_size + (scales.num_planes(page_size) if has_scales else 0)
    return (num_pages, tokens, heads, round_up(head_dim, LANES))


def padded_heads(num_kv_heads, dtype=None) -> int:
    """Key and value vectors of a token, padded to a power of two up to 16 and to 16s beyond (one bfloat16 tile).

    Of 8 bits they are four at least, as four share a word.
    """
    heads = 2 * num_kv_heads
    if dtype is not None and dtype.itemsize == 1:
        heads = max(4, heads)
    return round_up(heads, 16) if heads > 16 else 1 << (heads - 1).bit_length()


def vmem_limit(device_kind) -> int:
    """Vector memory that the kernel may ask for: three quarters, as the rest is the compiler's."""
    return VMEM_BYTES.get(device_kind, 128 * 2**20) * 3 // 4


def refusal(q_TNH, k_TKH, cache_PBCH, page_table_SM=None, device_kind="") -> str | None:
    """Why the kernel cannot run these shapes and dtypes, with the nearest that it can; None when it can."""
    _, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    P, tokens, C, cache_H = cache_PBCH.shape
    B = scales.page_size(cache_PBCH)
    if N % K:
        return f"{N} query heads cannot share {K} kv heads evenly; use {max(1, N // K) * K} query heads"
    if H > MAX_HEAD_DIM:
        return f"head_dim {H} is over the TPU kernel's {MAX_HEAD_DIM}, and a TPU has no other; use a GPU or a CPU"
    if jnp.dtype(cache_PBCH.dtype).name not in CACHE_DTYPES:
        return f"pages of {cache_PBCH.dtype} are not among {', '.join(CACHE_DTYPES)}; use bfloat16"
    if jnp.dtype(q_TNH.dtype).name not in ("bfloat16", "float32"):
        return f"queries of {q_TNH.dtype} are neither bfloat16 nor float32; cast them to bfloat16"
    if B not in PAGE_SIZES:
        nearest = min(PAGE_SIZES, key=lambda size: (abs(size - B), size))
        return f"page size {B} is not one of {PAGE_SIZES}; use {nearest}"
    wanted = (P, tokens, *cache_shape(P, B, K, H, cache_PBCH.dtype)[2:])
    if (C, cache_H) != wanted[2:]:
        return f"a cache of {(P, tokens, C, cache_H)} was given where a TPU needs {wanted}; allocate it by cache_shape"
    if page_table_SM is not None and (reason := table_refusal(page_table_SM, B)):
        return reason
    num_columns = 2**20 if page_table_SM is None else page_table_SM.shape[1]
    return _vmem_refusal(q_TNH, k_TKH, cache_PBCH, num_columns, device_kind)


def table_refusal(page_table_SM, B) -> str | None:
    """Why the scalar memory does not hold a page table of pages of B tokens; None when it does."""
    S, M = page_table_SM.shape
    if S <= most_rows(M):
        return None
    needed, limit = 4 * S * (M + 2), TABLE_BYTES
    shorter = limit // (4 * S) - 2
    choices = [f"{most_rows(M)} rows"] if most_rows(M) else []
    choices += [f"{shorter} pages a row, {shorter * B:,} tokens"] if shorter > 0 else []
    choices += [f"page size {size}" for size in PAGE_SIZES if size > B and S <= most_rows(-(-M * B // size))][:1]
    return (
        f"a page table of {S} rows x {M} pages of {B} tokens takes {needed:,} bytes of {limit:,} in scalar "
        f"memory; use at most {' or '.join(choices)}"
    )


def _vmem_refusal(q_TNH, k_TKH, cache_PBCH, num_columns, device_kind) -> str | None:
    """Why the blocks by formula do not fit the vector memory, with the nearest shapes whose blocks do."""
    (T, N, H), K, (P, tokens, _, _) = q_TNH.shape, k_TKH.shape[1], cache_PBCH.shape
    limit = vmem_limit(device_kind)

    def asked(kv_heads, cache_dtype):
        arrays = (
            jax.ShapeDtypeStruct((T, kv_heads * (N // K), H), q_TNH.dtype),
            jax.ShapeDtypeStruct((T, kv_heads, H), k_TKH.dtype),
            jax.ShapeDtypeStruct((P, tokens, *cache_shape(P, tokens, kv_heads, H, cache_dtype)[2:]), cache_dtype),
        )
        sizes = [blocks(*arrays, num_columns, case, device_kind) for case in ("decode", "chunk")]
        return max(vmem_bytes(size, *arrays) for size in sizes)

    dtype = jnp.dtype(cache_PBCH.dtype)
    needed = asked(K, dtype)
    if needed <= limit:
        return None
    most = next((n for n in range(K - 1, 0, -1) if asked(n, dtype) <= limit), 0)
    choices = [f"at most {most} kv heads a chip" if most else "fewer query heads a kv head"]
    choices += ["pages of bfloat16"] if dtype.itemsize > 2 and asked(K, jnp.bfloat16) <= limit else []
    return (
        f"{N} query and {K} kv heads of {H} with pages of {dtype} take {needed:,} bytes of {limit:,} in vector "
        f"memory; use {' or '.join(choices)}"
    )


def most_rows(num_columns) -> int:
    """Rows whose page tables, and two numbers more each, the scalar memory holds; whole eights."""
    return TABLE_BYTES // (4 * (num_columns + 2)) // 8 * 8


def blocks(q_TNH, k_TKH, cache_PBCH, num_columns, case, device_kind="") -> Blocks:
    """Block sizes for one case ("decode" or "chunk"), tuned where the table knows the shape, else by formula."""
    T, N, _ = q_TNH.shape
    K = k_TKH.shape[1]
    _, _, C, H = cache_PBCH.shape
    B = scales.page_size(cache_PBCH)
    itemsize = jnp.dtype(cache_PBCH.dtype).itemsize
    key = (device_kind, case, N // K, K, H, jnp.dtype(cache_PBCH.dtype).name)
    tuned = _tuned().get(key)
    if tuned:
        query, fetch, compute = tuned
    else:
        token_bytes = C * H * itemsize
        # Unpacked keys and values stay within 1 MiB, or 2 for a chunk, whose many query rows repay a longer block.
        # Few kv heads make longer blocks: there is less to interleave.
        unpacked, most = (2**20, 1024) if case == "decode" else (2**21, 512)
        compute = power_of_two_within(unpacked // (C * H * 2), LANES, most)
        fetch = power_of_two_within(FETCH_BYTES // token_bytes, compute, 4096)
        query = 1 if case == "decode" else power_of_two_within(512 // (N // K), 16, 128)  # 512 query rows a kv head
    compute = min(compute, max(LANES, 1 << (num_columns * B - 1).bit_length()))
    fetch = max(min(fetch, round_up(num_columns * B, compute)), compute, B)
    return Blocks(min(query, round_up(T, 16)) if query > 1 else 1, round_up(fetch, max(B, compute)), compute)


def vmem_bytes(blocks: Blocks, q_TNH, k_TKH, cache_PBCH) -> int:
    """Scratch memory one case asks for, compiler's own spills excluded."""
    N, K = q_TNH.shape[1], k_TKH.shape[1]
    _, _, C, H = cache_PBCH.shape
    itemsize = jnp.dtype(cache_PBCH.dtype).itemsize
    rows = padded_rows(blocks.query * (N // K))
    pages = 2 * blocks.fetch * C * H * itemsize
    unpacked = blocks.compute * C * H * (4 if itemsize == 4 else 2)
    queries = 4 * blocks.query * round_up(N, 16) * H * q_TNH.dtype.itemsize
    softmax = K * rows * (2 * LANES * 4 + H * 4 + H * 4)
    scaling = writing = 0
    if L := cache_PBCH.shape[1] - scales.page_size(cache_PBCH):
        planes = L * C * LANES
        scaling = 2 * blocks.fetch // scales.page_size(cache_PBCH) * planes + 4 * C * blocks.compute
        writing = IN_FLIGHT * (2 * planes + 4 * C * LANES)
    return max(pages + unpacked + queries + softmax + scaling, writing)


def heads_together(num_kv_heads, query) -> int:
    """Heads whose work is interleaved: one query row leaves units idle, many rows only lengthen the program."""
    most = 8 if query == 1 else 1
    return max(n for n in range(1, most + 1) if num_kv_heads % n == 0)


def padded_rows(rows) -> int:
    return round_up(rows, 16 if rows > 8 else 8)


def round_up(x, multiple) -> int:
    return -(-x // multiple) * multiple


def power_of_two_within(x, low, high) -> int:
    return max(low, min(high, 1 << int(math.log2(max(x, 1)))))


@functools.cache
def _tuned() -> dict:
    if not TUNED_PATH.exists():
        return {}
    rows = json.loads(TUNED_PATH.read_text())["rows"]
    return {
        (row["device"], row["case"], row["group"], row["kv_heads"], row["head_dim"], row["dtype"]): (
            row["query"],
            row["fetch"],
            row["compute"],
        )
        for row in rows
    }
