"""Grouped matmul: tokens sorted by expert, each run of them times its own expert's weights.

`ragged_dot` is XLA's own (`jax.lax.ragged_dot_general`), which on CPUs and GPUs multiplies every row by every expert.
`megablox` is the Pallas kernel that JAX ships for TPUs, which reads weights stored `[out, in]` as they lie and visits
only tiles that hold tokens. `mosaic` (Hopper GPUs: gpu.py) and `cpu` also read only experts with rows.

Source: Gale et al. 2022, arXiv 2211.15841 (block-sparse experts without capacity limits).

Dimension key
    T  rows: tokens times the experts each goes to, sorted by expert     I  inputs     O  outputs
    E  experts     G  kernels
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import cpu, panels
from pallas_kernels.platform import current_device_kind, current_platform, is_hopper

MEGABLOX_ROWS = 128  # rows of a tile; fewer tokens are padded up to one tile
MEGABLOX_WIDTH = 1536  # inputs or outputs of a tile at most; wider ones would not fit the vector memory twice


def grouped_matmul(
    x_TI, kernel_GOI, group_sizes_E, *, first=None, out_dtype=jnp.float32, in_panels=False, implementation=None
):
    """Multiplies rows by their experts' kernels, accumulating in float32.

    Args:
        x_TI: rows of expert 0, then of expert 1, ...; rows past the last group are padding.
        kernel_GOI: weights, each expert's stored `[out, in]`: those of E experts, or of more layers' experts.
        group_sizes_E: int32 rows of each expert; their sum is at most T.
        first: int32 scalar, where expert 0 stands among the kernels; None for 0, of as many as there are sizes.
        out_dtype: dtype of the result.
        in_panels: the kernels stand as `pallas_kernels.panels.pack` puts them.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        `[T, O]`; padding rows are zeros.

    Raises:
        ValueError: shapes do not fit together, or the implementation is unknown or does not take them.
    """
    (T, I), (G, _, kernel_I), (E,) = x_TI.shape, kernel_GOI.shape, group_sizes_E.shape
    if kernel_I != I or E > G or (first is None and E != G):
        raise ValueError(
            f"rows {x_TI.shape}, kernels {kernel_GOI.shape} and group sizes {group_sizes_E.shape} do not fit: kernels "
            f"are [experts, out, in] with in = {I}, and there is one size an expert"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    name = implementation or _fastest(x_TI, kernel_GOI)
    options = {"in_panels": in_panels} if name == "cpu" else {}
    if in_panels and name != "cpu":
        kernel_GOI = panels.unpack(kernel_GOI)
    out_TO = IMPLEMENTATIONS[name](x_TI, kernel_GOI, group_sizes_E.astype(jnp.int32), first, out_dtype, **options)
    live_T = jnp.arange(T) < group_sizes_E.sum()
    return jnp.where(live_T[:, None], out_TO, 0)


def reference(x_TI, kernel_GOI, group_sizes_E, first, out_dtype):
    """Every expert on every row, then each row picks its own."""
    kernel_EOI = _cut(kernel_GOI, first, len(group_sizes_E))
    group_T = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(x_TI.shape[0]), side="right")
    group_T = jnp.minimum(group_T, kernel_EOI.shape[0] - 1)
    all_ETO = jnp.einsum("TI,EOI->ETO", x_TI, kernel_EOI, preferred_element_type=jnp.float32, precision="highest")
    return jnp.take_along_axis(all_ETO, group_T[None, :, None], axis=0)[0].astype(out_dtype)


def ragged_dot(x_TI, kernel_GOI, group_sizes_E, first, out_dtype):
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    kernel_EOI = _cut(kernel_GOI, first, len(group_sizes_E))
    out_TO = lax.ragged_dot_general(x_TI, kernel_EOI, group_sizes_E, numbers, preferred_element_type=jnp.float32)
    return out_TO.astype(out_dtype)


def _cut(kernel_GOI, first, num_experts):
    return kernel_GOI if first is None else lax.dynamic_slice_in_dim(kernel_GOI, first, num_experts)


def megablox(x_TI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # imports the TPU compiler's front end

    (T, I), O = x_TI.shape, kernel_GOI.shape[1]
    reason = megablox_refusal(I, O)
    if reason:
        raise ValueError(reason)
    if first is not None:  # it reads no kernel of an empty group
        sizes_G = jnp.zeros(len(kernel_GOI), jnp.int32)
        group_sizes_E = lax.dynamic_update_slice(sizes_G, group_sizes_E, (first,))
    x_TI = jnp.pad(x_TI, ((0, -T % MEGABLOX_ROWS), (0, 0)))
    out_TO = gmm(
        x_TI,
        kernel_GOI,
        group_sizes_E,
        preferred_element_type=out_dtype,
        tiling=(MEGABLOX_ROWS, _tile(I), _tile(O)),
        transpose_rhs=True,
        interpret=interpret,
    )
    return out_TO[:T]


def mosaic(x_TI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=False):
    from pallas_kernels.grouped_matmul import gpu  # imports Mosaic GPU

    if reason := gpu.refusal(x_TI, kernel_GOI):
        raise ValueError(reason)
    first = 0 if first is None else first
    return gpu.multiply(x_TI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=interpret)


def megablox_refusal(num_inputs, num_outputs) -> str | None:
    """Why megablox cannot run a width, with the nearest that it can; None when it can."""
    for what, width in (("inputs", num_inputs), ("outputs", num_outputs)):
        if width % 128:
            padded = -(-width // 128) * 128
            return f"{width} {what} are not whole lanes of 128; pad the kernel to {padded} or use ragged_dot"
    return None


def _tile(width) -> int:
    """The widest tile that divides: a short one's step takes longer than its weights' way from memory."""
    return max(tile for tile in range(128, MEGABLOX_WIDTH + 1, 128) if width % tile == 0)


def _cpu(x_TI, kernel_GOI, group_sizes_E, first, out_dtype, in_panels=False):
    from pallas_kernels.cpu import experts

    return experts.multiply(
        x_TI, kernel_GOI, group_sizes_E, 0 if first is None else first,
        out_dtype=out_dtype, num_threads=cpu.register().num_threads, in_panels=in_panels,
    )  # fmt: skip


def check(platform: str, device_kind: str, hidden_size: int, ffn_size: int, dtype: str) -> tuple[int | None, str]:
    """What multiplies experts of these widths, for when an engine is planned.

    Returns:
        what the feed-forward units must be whole numbers of, when they are not and only XLA's ragged dot would be left
        where there is a kernel; else None. And the implementation.
    """
    if platform == "tpu":
        return (128 if ffn_size % 128 else None), "megablox" if hidden_size % 128 == 0 else "ragged_dot"
    if platform == "gpu" and is_hopper(device_kind) and dtype in ("bfloat16", "float16"):
        return (64 if ffn_size % 64 else None), "mosaic" if hidden_size % 64 == 0 else "ragged_dot"
    return None, "cpu" if platform == "cpu" and cpu.is_available() else "ragged_dot"


def _fastest(x_TI, kernel_GOI) -> str:
    platform = current_platform()
    if platform == "tpu" and megablox_refusal(x_TI.shape[1], kernel_GOI.shape[1]) is None:
        return "megablox"
    if platform == "gpu" and is_hopper(current_device_kind()):
        from pallas_kernels.grouped_matmul import gpu

        return "ragged_dot" if gpu.refusal(x_TI, kernel_GOI) else "mosaic"
    if platform == "cpu" and cpu.is_available():
        from pallas_kernels.cpu import matmul

        return "cpu" if matmul.supports(x_TI, kernel_GOI) else "ragged_dot"
    return "ragged_dot"


IMPLEMENTATIONS = {
    "reference": reference, "ragged_dot": ragged_dot, "megablox": megablox, "mosaic": mosaic, "cpu": _cpu
}  # fmt: skip
