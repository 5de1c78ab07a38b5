"""What the TPU kernel of latent attention takes, and how large its blocks are. No Pallas in here.

Dimension key as in the package.
"""

import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tpu_plan import (
    FETCH_BYTES,
    LANES,
    PAGE_SIZES,
    Blocks,
    padded_rows,
    power_of_two_within,
    round_up,
    table_refusal,
    vmem_limit,
)

GRANULE = 16  # tokens; a copy in or out of a page starts and ends at whole tiles, of bfloat16 two
IN_FLIGHT = 32  # granules that are written at a time
MOST_GROUP = 32  # heads of a chunk's group: 16 tokens of it are 512 query rows
LONG_ROWS = 128  # query rows from which a shorter block keeps logits near the registers


def refusal(q_latent_TNR, q_rope_TNH, cache_PBW, page_table_SM, device_kind) -> str | None:
    """Why the kernel cannot run these shapes and dtypes, with the nearest that it can; None when it can."""
    R, H = q_latent_TNR.shape[2], q_rope_TNH.shape[2]
    _, B, W = cache_PBW.shape
    dtypes = {jnp.dtype(x.dtype).name for x in (q_latent_TNR, q_rope_TNH, cache_PBW)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        return f"queries and pages of {', '.join(sorted(dtypes))} are not of one dtype; use bfloat16 for all of them"
    if R % LANES:
        return f"latents of {R} are not whole lanes of {LANES}; pad them to {round_up(R, LANES)}"
    if B not in PAGE_SIZES:
        nearest = min(PAGE_SIZES, key=lambda size: (abs(size - B), size))
        return f"page size {B} is not one of {PAGE_SIZES}; use {nearest}"
    if W != round_up(R + H, LANES):
        return f"a cache {W} wide was given where a TPU needs {round_up(R + H, LANES)}; allocate it by cache_shape"
    if reason := table_refusal(page_table_SM, B):
        return reason
    needed = vmem_bytes(q_latent_TNR, cache_PBW, page_table_SM.shape[1])
    if needed > vmem_limit(device_kind):
        return (
            f"{q_latent_TNR.shape[0]} tokens of {q_latent_TNR.shape[1]} heads take {needed:,} bytes of "
            f"{vmem_limit(device_kind):,} in vector memory; use fewer tokens a step or fewer heads a chip"
        )
    return None


def blocks(q_latent_TNR, cache_PBW, num_columns, case) -> Blocks:
    """Block sizes for one case ("decode" or "chunk")."""
    T, N, _ = q_latent_TNR.shape
    _, B, W = cache_PBW.shape
    group = heads_of_group(N, case)
    query = 1 if case == "decode" else min(power_of_two_within(512 // group, 16, 128), round_up(T, 16))
    compute = 256 if query * group >= LONG_ROWS else 512
    fetch = power_of_two_within(FETCH_BYTES // (W * cache_PBW.dtype.itemsize), compute, 4096)
    compute = min(compute, max(LANES, 1 << (num_columns * B - 1).bit_length()))
    fetch = max(min(fetch, round_up(num_columns * B, compute)), compute, B)
    return Blocks(query, round_up(fetch, max(B, compute)), compute)


def heads_of_group(num_heads, case) -> int:
    """Query heads whose rows are multiplied together; all of a decode's, and so many of a chunk's."""
    if case == "decode":
        return num_heads
    return max(n for n in range(1, MOST_GROUP + 1) if num_heads % n == 0)


def vmem_bytes(q_latent_TNR, cache_PBW, num_columns, sizes=None) -> int:
    """Vector memory that the kernel asks for, the compiler's own spills excluded."""
    T, N, R = q_latent_TNR.shape
    W, itemsize = cache_PBW.shape[2], cache_PBW.dtype.itemsize
    found = []
    for case in ("decode", "chunk"):
        size = sizes[case] if sizes else blocks(q_latent_TNR, cache_PBW, num_columns, case)
        group = heads_of_group(N, case)
        rows = N // group * padded_rows(size.query * group)
        softmax = rows * (W * itemsize + 4 * R + 2 * 4 * LANES)
        found.append(2 * size.fetch * W * itemsize + 2 * size.query * round_up(N, 16) * (W + R) * itemsize + softmax)
    return max(max(found), IN_FLIGHT * GRANULE * W * itemsize) + 4 * (T + 3 * GRANULE) * W
