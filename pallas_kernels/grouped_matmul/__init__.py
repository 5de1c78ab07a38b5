"""Grouped matmul: tokens sorted by expert, each run of them times its own expert's weights.

`ragged_dot` is XLA's own (`jax.lax.ragged_dot_general`), which on CPUs and GPUs multiplies every row by every expert.
`megablox` is the Pallas kernel that JAX ships for TPUs, which reads weights stored `[out, in]` as they lie and visits
only tiles that hold tokens; `tpu` does that with rounded weights, which megablox does not take. `mosaic` (Hopper
GPUs: gpu.py), `triton` (GPUs of NVIDIA's since Ampere, and int4 on all) and `cpu` also read only experts with rows. Of
int4 `ragged_dot` is a loop over experts that have some, whose weights become floats one expert after another.

Source: Gale et al. 2022, arXiv 2211.15841 (block-sparse experts without capacity limits).

Dimension key
    T  tokens     R  rows: tokens times the experts each goes to, sorted by expert     I  inputs     O  outputs
    E  experts     G  kernels
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import cpu, panels
from pallas_kernels.grouped_matmul.xla import ragged_dot, reference
from pallas_kernels.linear import rounded_tokens
from pallas_kernels.platform import current_device_kind, current_platform, has_triton, is_hopper

MEGABLOX_ROWS = 128  # rows of a tile; fewer tokens are padded up to one tile
MEGABLOX_WIDTH = 1536  # inputs or outputs of a tile at most; wider ones would not fit the vector memory twice


def grouped_matmul(
    x_TI,
    kernel,
    group_sizes_E,
    *,
    token_R=None,
    kernel_scale=None,
    kernel_offset=None,
    first=None,
    out_dtype=jnp.float32,
    in_panels=False,
    implementation=None,
):
    """Multiplies rows by their experts' kernels, accumulating in float32, or of int8 exactly.

    Args:
        x_TI: tokens, or rows themselves; those past the last group are padding.
        kernel: weights `[G, O, I]`, each expert's stored `[out, in]`, or `[G, P, O / P, I]` where outputs have parts:
            those of E experts, or of more layers' experts. Any float dtype, or int8 or int4 as `pallas_kernels.linear`
            has them.
        group_sizes_E: int32 rows of each expert; their sum is at most R.
        token_R: int32, which token each row is, rows of expert 0 first, then of expert 1, ...; None where x has rows.
        kernel_scale: what one step of a rounded kernel is worth. Of an int8 kernel `[E, O]`, or in parts: of the E
            experts alone. Of an int4 kernel `[G, O, J]`, or in parts, for J groups of inputs.
        kernel_offset: what 0 stands for in an int4 kernel, as kernel_scale has it.
        first: int32 scalar, where expert 0 stands among the kernels; None for 0, of as many as there are sizes.
        out_dtype: dtype of the result.
        in_panels: the kernels stand as `pallas_kernels.panels.pack` puts them, and with int4 scales and offsets.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        `[R, O]`; padding rows are zeros.

    Raises:
        ValueError: shapes do not fit together, a rounded kernel has no scale, or the implementation is unknown or does
            not take them.
    """
    (T, I), (G, *out, kernel_I), (E,) = x_TI.shape, kernel.shape, group_sizes_E.shape
    if kernel_I != I or E > G or (first is None and E != G):
        raise ValueError(
            f"rows {x_TI.shape}, kernels {kernel.shape} and group sizes {group_sizes_E.shape} do not fit: kernels "
            f"are [experts, out, in] with in = {I}, and there is one size an expert"
        )
    _check_scales(kernel, E, kernel_scale, kernel_offset)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    O, R = math.prod(out), T if token_R is None else len(token_R)
    kernel_GOI = kernel.reshape(G, O, I)
    scales: dict[str, Any] = {}
    if kernel.dtype == jnp.int8:
        scales["scale_EO"] = kernel_scale.reshape(E, O)
    elif kernel.dtype == jnp.int4:
        scales |= {"scale_GOJ": kernel_scale.reshape(G, O, -1), "offset_GOJ": kernel_offset.reshape(G, O, -1)}
    name = implementation or _fastest(x_TI, kernel_GOI, kernel_scale, in_panels)
    own = lambda a: a if token_R is None else a[token_R]
    if name == "cpu":
        scales["in_panels"] = in_panels
    elif kernel.dtype == jnp.int8:  # a token once, whatever its rows
        x_TI, step_T1 = rounded_tokens(x_TI)
        scales["step_R1"] = own(step_T1)
    if in_panels and name != "cpu":
        kernel_GOI = panels.unpack(kernel_GOI)
        scales |= {key: panels.unpack(scales[key], 1) for key in ("scale_GOJ", "offset_GOJ") if key in scales}
    if name == "tpu" and kernel.dtype == jnp.int4:
        from pallas_kernels.grouped_matmul import tpu

        scales["sums_RJ"] = own(tpu.sums_of_groups(x_TI, kernel_scale.shape[-1]))
        scales["parts"] = math.prod(out[:-1]) if out[-1] % 128 == 0 else 1
    if name == "triton":  # it finds them
        scales["token_R"] = token_R
    else:
        x_TI = own(x_TI)
    out_RO = IMPLEMENTATIONS[name](x_TI, kernel_GOI, group_sizes_E.astype(jnp.int32), first, out_dtype, **scales)
    is_live_R = jnp.arange(R) < group_sizes_E.sum()
    return jnp.where(is_live_R[:, None], out_RO, 0)


def _check_scales(kernel, E, scale, offset):
    """Raises: ValueError."""
    is_rounded, has_groups = kernel.dtype in (jnp.int8, jnp.int4), kernel.dtype == jnp.int4
    if is_rounded != (scale is not None) or has_groups != (offset is not None):
        raise ValueError(
            f"{kernel.dtype} kernels, kernel_scale {scale} and kernel_offset {offset}; int8 and int4, and only they, "
            "have the one, and int4 the other"
        )
    if kernel.dtype == jnp.int8 and scale.shape != (E, *kernel.shape[1:-1]):
        raise ValueError(f"kernel_scale {scale.shape} of {E} experts {kernel.shape}; int8 has one an output")
    if has_groups:
        is_even = scale.shape[:-1] == kernel.shape[:-1] and kernel.shape[-1] % scale.shape[-1] == 0
        if scale.shape != offset.shape or not is_even:
            raise ValueError(
                f"int4 kernels {kernel.shape}, kernel_scale {scale.shape} and kernel_offset {offset.shape}; groups "
                "share a row's inputs evenly"
            )


def megablox(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # imports the TPU compiler's front end

    (R, I), O = x_RI.shape, kernel_GOI.shape[1]
    reason = tpu_refusal(I, O)
    if reason:
        raise ValueError(reason)
    if first is not None:  # it reads no kernel of an empty group
        sizes_G = jnp.zeros(len(kernel_GOI), jnp.int32)
        group_sizes_E = lax.dynamic_update_slice(sizes_G, group_sizes_E, (first,))
    x_RI = jnp.pad(x_RI, ((0, -R % MEGABLOX_ROWS), (0, 0)))
    out_RO = gmm(
        x_RI,
        kernel_GOI,
        group_sizes_E,
        preferred_element_type=out_dtype,
        tiling=(MEGABLOX_ROWS, _tile(I), _tile(O)),
        transpose_rhs=True,
        interpret=interpret,
    )
    return out_RO[:R]


def _tpu(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=False, **scales):
    from pallas_kernels.grouped_matmul import tpu

    reason = tpu_refusal(x_RI.shape[1], kernel_GOI.shape[1] // scales.get("parts", 1))
    if reason or (reason := tpu.refusal(x_RI.dtype, kernel_GOI, scales.get("scale_GOJ"))):
        raise ValueError(reason)
    run = tpu.multiply_int8 if kernel_GOI.dtype == jnp.int8 else tpu.multiply_int4
    first = 0 if first is None else first
    return run(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, **scales, interpret=interpret)


def mosaic(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=False, **rounded):
    from pallas_kernels.grouped_matmul import gpu  # imports Mosaic GPU

    if reason := gpu.refusal(x_RI.dtype, kernel_GOI):
        raise ValueError(reason)
    first = 0 if first is None else first
    return gpu.multiply(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, **rounded, interpret=interpret)


def _triton(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, interpret=False, **rounded):
    from pallas_kernels.grouped_matmul import triton  # imports Triton

    if reason := triton.refusal(x_RI.dtype, kernel_GOI, rounded.get("scale_GOJ")):
        raise ValueError(reason)
    first = 0 if first is None else first
    return triton.multiply(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, **rounded, interpret=interpret)


def tpu_refusal(num_inputs, num_outputs) -> str | None:
    """Why a TPU's kernels cannot run a width, with the nearest that they can; None when they can."""
    for what, width in (("inputs", num_inputs), ("outputs", num_outputs)):
        if width % 128:
            padded = -(-width // 128) * 128
            return f"{width} {what} are not whole lanes of 128; pad the kernel to {padded} or use ragged_dot"
    return None


def _tile(width) -> int:
    """The widest tile that divides: a short one's step takes longer than its weights' way from memory."""
    return max(tile for tile in range(128, MEGABLOX_WIDTH + 1, 128) if width % tile == 0)


def _cpu(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, in_panels=False, **scales):
    from pallas_kernels.cpu import experts

    return experts.multiply(
        x_RI, kernel_GOI, group_sizes_E, 0 if first is None else first, **scales,
        out_dtype=out_dtype, num_threads=cpu.register().num_threads, in_panels=in_panels,
    )  # fmt: skip


def check(
    platform: str,
    device_kind: str,
    hidden_size: int,
    ffn_size: int,
    dtype: str,
    quantization: str | None = None,
    in_panels: bool = False,
) -> tuple[int | None, str]:
    """What multiplies experts of these widths, for when an engine is planned.

    Returns:
        what the feed-forward units must be whole numbers of, when they are not and only XLA's ragged dot would be left
        where there is a kernel; else None. And the implementation.
    """
    is_hopper_of_halves = platform == "gpu" and is_hopper(device_kind) and dtype in ("bfloat16", "float16")
    if platform == "tpu" and (quantization != "int4" or dtype == "bfloat16"):
        kernel = "megablox" if quantization is None else "tpu"
        return (128 if ffn_size % 128 else None), kernel if hidden_size % 128 == 0 else "ragged_dot"
    if is_hopper_of_halves and quantization != "int4":
        unit = 64 if quantization is None else 128  # inputs of a buffer
        if ffn_size % unit or hidden_size % unit == 0:
            return (unit if ffn_size % unit else None), "mosaic" if hidden_size % unit == 0 else "ragged_dot"
    if platform == "gpu" and has_triton(device_kind):
        dtypes = ("bfloat16", "float16") if quantization == "int4" else ("bfloat16", "float16", "float32")
        unit = 32  # inputs, as its narrowest block or an int4 kernel's group has them
        return None, "triton" if dtype in dtypes and hidden_size % unit == ffn_size % unit == 0 else "ragged_dot"
    if platform == "cpu" and cpu.is_available() and (quantization != "int4" or in_panels):
        return None, "cpu"
    return None, "ragged_dot"


def _fastest(x_TI, kernel_GOI, kernel_scale, in_panels) -> str:
    platform, dtype = current_platform(), kernel_GOI.dtype
    rows_dtype = jnp.int8 if dtype == jnp.int8 else x_TI.dtype
    if platform == "tpu" and tpu_refusal(x_TI.shape[1], kernel_GOI.shape[1]) is None:
        if dtype not in (jnp.int8, jnp.int4):
            return "megablox"
        from pallas_kernels.grouped_matmul import tpu

        return "ragged_dot" if tpu.refusal(rows_dtype, kernel_GOI, kernel_scale) else "tpu"
    if platform == "gpu":
        return _fastest_on_gpu(rows_dtype, kernel_GOI, kernel_scale)
    if platform == "cpu" and cpu.is_available():
        from pallas_kernels.cpu import matmul

        if dtype == jnp.int4:
            return "cpu" if in_panels and matmul.supports_groups(x_TI, kernel_scale) else "ragged_dot"
        return "cpu" if matmul.supports(x_TI, kernel_GOI) else "ragged_dot"
    return "ragged_dot"


def _fastest_on_gpu(rows_dtype, kernel_GOI, kernel_scale) -> str:
    kind = current_device_kind()
    if is_hopper(kind):
        from pallas_kernels.grouped_matmul import gpu

        if gpu.refusal(rows_dtype, kernel_GOI) is None:
            return "mosaic"
    if has_triton(kind):
        from pallas_kernels.grouped_matmul import triton

        if triton.refusal(rows_dtype, kernel_GOI, kernel_scale) is None:
            return "triton"
    return "ragged_dot"


IMPLEMENTATIONS = {
    "reference": reference, "ragged_dot": ragged_dot, "megablox": megablox, "tpu": _tpu, "mosaic": mosaic,
    "triton": _triton, "cpu": _cpu,
}  # fmt: skip
