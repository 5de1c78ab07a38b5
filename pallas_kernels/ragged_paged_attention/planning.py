"""Whether a platform's attention takes a model, asked when an engine is planned. No Pallas in here.

Dimension key as in the package.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import cache_shape, gpu_plan, tpu_plan


def check(
    platform, device_kind, *, num_heads, num_kv_heads, head_dim, page_size, dtype, cache_dtype, num_rows, num_columns
) -> tuple[str | None, str]:
    """What will attend on one device, before anything is compiled.

    Args:
        platform, device_kind: as JAX calls them.
        num_heads, num_kv_heads: of one device.
        num_rows, num_columns: the largest page table.

    Returns:
        (why it cannot run here, with the nearest that can; None when it can), (what attends, in words).
    """
    if platform not in ("tpu", "gpu"):
        return None, "a kernel for this CPU, or XLA where it has none"
    array = jax.ShapeDtypeStruct
    # As many tokens as the largest block of queries has.
    q_TNH, k_TKH = (array((128, heads, head_dim), jnp.dtype(dtype)) for heads in (num_heads, num_kv_heads))
    shape = cache_shape(1, page_size, num_kv_heads, head_dim, platform, cache_dtype)
    cache_PBCH = array(shape, jnp.dtype(cache_dtype))
    if platform == "tpu":
        table_SM = array((num_rows, num_columns), jnp.int32)
        attends = "a Pallas kernel for TPUs"
        if shape[2] > tpu_plan.padded_heads(num_kv_heads):
            attends += "; pages of 8 bits take as much as of bfloat16, where a device has one kv head"
        return tpu_plan.refusal(q_TNH, k_TKH, cache_PBCH, table_SM, device_kind), attends
    refusal = gpu_plan.refusal(q_TNH, k_TKH, cache_PBCH, device_kind)
    match gpu_plan.kernel(q_TNH, k_TKH, cache_PBCH, device_kind):
        case "hopper":
            return refusal, "a Mosaic kernel for Hopper GPUs"
        case "triton":
            reason = gpu_plan.hopper_refusal(q_TNH, k_TKH, cache_PBCH, device_kind)
            return refusal, f"a Triton kernel: {reason}"
        case _:
            reason = gpu_plan.triton_refusal(q_TNH, k_TKH, cache_PBCH, device_kind)
            return refusal, f"gathered pages in XLA: {reason}"
