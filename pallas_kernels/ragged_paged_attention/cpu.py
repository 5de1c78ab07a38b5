"""Ragged paged attention on CPUs: reads pages in place, and only those in use. See the package for arguments.

The kernel is pallas_kernels.cpu.attention; this file says where it finds queries, keys and values.
"""

from pallas_kernels import cpu


def supports(q_TNH, k_TKH, cache_PBCH) -> bool:
    if not cpu.is_available():
        return False
    from pallas_kernels.cpu import attention

    H = cache_PBCH.shape[-1]
    same = q_TNH.dtype == k_TKH.dtype and q_TNH.shape[-1] == H
    return same and attention.supports(H, q_TNH.dtype, cache_PBCH.dtype)


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
):
    from pallas_kernels.cpu import attention

    (_, N, H), K = q_TNH.shape, k_TKH.shape[1]
    return attention.call(
        q_TNH,
        k_TKH,
        v_TKH,
        cache_PBCH,
        kv_lens_S,
        page_table_SM,
        cu_q_lens_S1,
        counts_2,
        places=(0, 0, 0, N * H, N // K * H, K * H, H),
        num_heads=N,
        num_kv_heads=K,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
        k_scale=k_scale,
        v_scale=v_scale,
        page_offset=page_offset,
        num_threads=cpu.register().num_threads,
    )
