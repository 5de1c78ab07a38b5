"""From a fused projection to attended values: head norms, rotation and ragged paged attention in one call.

On a CPU this is one pass over the tokens, where the separate steps would be some ten operations of tens of
microseconds each. Elsewhere the reference leaves norms and rotation to XLA and attends by the platform's kernel.

Dimension key
    T  tokens in the step     S  rows          M  page-table columns
    K  key/value heads        G  query heads a kv head     N  K G
    X  G + 2: what a token brings each kv head, its queries, its key and its value
    H  head dimension         R  rotated pairs, at most H / 2      E  rotary tables
    P  pages in the pool      B  tokens in a page      C  2 K
"""

import jax
import jax.numpy as jnp

from pallas_kernels import cpu
from pallas_kernels.platform import current_platform
from pallas_kernels.ragged_paged_attention import ragged_paged_attention


def qkv_attention(
    qkv_TKXH,
    cache_PBCH,
    kv_lens_S,
    page_table_SM,
    cu_q_lens_S1,
    counts_2,
    *,
    scale,
    ropes_ET2R=None,
    rope_index=0,
    q_norm_H=None,
    k_norm_H=None,
    norm_eps=1e-6,
    norm_offset=0.0,
    window=None,
    soft_cap=None,
    sinks_N=None,
    k_scale=None,
    v_scale=None,
    page_offset=0,
    max_q_len=None,
    implementation=None,
):
    """Normalises and rotates queries and keys, writes keys and values to their pages, and attends.

    Args:
        qkv_TKXH: the fused projection of each token.
        ropes_ET2R: float32 cosines and sines of each table at the tokens' positions; pair r of a head is elements
            r and r + R, what is past 2 R stays. None for no rotation.
        rope_index: int or int32 scalar, the table to use.
        q_norm_H, k_norm_H: weights of an RMS norm over each head, before rotation. None for none.
        norm_eps, norm_offset: added to the mean square, and to the weights (Gemma's 1).
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.
        cache_PBCH and the rest: as `ragged_paged_attention` has them.

    Returns:
        `[T, N, H]` in qkv's dtype, padding tokens anything; and the cache with this step's tokens in it.

    Raises:
        ValueError: only one of the norms is given, or the implementation is unknown.
    """
    if (q_norm_H is None) != (k_norm_H is None):
        raise ValueError("queries and keys are normalised together; pass q_norm_H and k_norm_H, or neither")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    name = implementation or _fastest(qkv_TKXH, cache_PBCH, ropes_ET2R)
    return IMPLEMENTATIONS[name](
        qkv_TKXH,
        cache_PBCH,
        kv_lens_S,
        page_table_SM,
        cu_q_lens_S1,
        counts_2,
        ropes_ET2R=ropes_ET2R,
        rope_index=rope_index,
        q_norm_H=q_norm_H,
        k_norm_H=k_norm_H,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
        k_scale=k_scale,
        v_scale=v_scale,
        page_offset=page_offset,
        max_q_len=max_q_len,
    )


def reference(
    qkv_TKXH, *batch, ropes_ET2R, rope_index, q_norm_H, k_norm_H, norm_eps, norm_offset, **attention
):  # fmt: skip
    """Each step on its own, in float32, rounded to qkv's dtype before attention."""
    T, K, X, H = qkv_TKXH.shape
    q_TKGH, k_TK1H = (qkv_TKXH[:, :, part].astype(jnp.float32) for part in (slice(X - 2), slice(X - 2, X - 1)))
    if q_norm_H is not None:
        q_TKGH = _normalised(q_TKGH, q_norm_H, norm_eps, norm_offset)
        k_TK1H = _normalised(k_TK1H, k_norm_H, norm_eps, norm_offset)
    if ropes_ET2R is not None:
        q_TKGH, k_TK1H = (_rotated(x, ropes_ET2R[rope_index]) for x in (q_TKGH, k_TK1H))
    dtype = qkv_TKXH.dtype
    return ragged_paged_attention(
        q_TKGH.astype(dtype).reshape(T, -1, H),
        k_TK1H[:, :, 0].astype(dtype),
        qkv_TKXH[:, :, X - 1],
        *batch,
        **attention,
    )


def _normalised(x, weight_H, eps, offset):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * (weight_H.astype(jnp.float32) + offset)


def _rotated(x_TKXH, table_T2R):
    R = table_T2R.shape[-1]
    cos, sin = table_T2R[:, None, None, 0], table_T2R[:, None, None, 1]
    a, b, rest = x_TKXH[..., :R], x_TKXH[..., R : 2 * R], x_TKXH[..., 2 * R :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _cpu(qkv_TKXH, cache_PBCH, *batch, ropes_ET2R, max_q_len, **options):
    from pallas_kernels.cpu import attention

    _, K, X, H = qkv_TKXH.shape
    token, head = K * X * H, X * H
    return attention.call(
        qkv_TKXH,
        qkv_TKXH,
        qkv_TKXH,
        cache_PBCH,
        *batch,
        places=(0, (X - 2) * H, (X - 1) * H, token, head, token, head),
        num_heads=K * (X - 2),
        num_kv_heads=K,
        ropes=ropes_ET2R,
        num_threads=cpu.register().num_threads,
        **options,
    )


def _fastest(qkv_TKXH, cache_PBCH, ropes_ET2R) -> str:
    if current_platform() != "cpu" or not cpu.is_available():
        return "reference"
    from pallas_kernels.cpu import attention

    H, pairs = qkv_TKXH.shape[-1], 0 if ropes_ET2R is None else ropes_ET2R.shape[-1]
    known = attention.supports(H, qkv_TKXH.dtype, cache_PBCH.dtype) and cache_PBCH.shape[-1] == H
    return "cpu" if known and attention.rotates(pairs) else "reference"


IMPLEMENTATIONS = {"reference": reference, "cpu": _cpu}
