"""Linear layers over the real tokens of a step: x times a kernel stored `[out, in]`, with what stands around it.

A decoder block is a few of these and an attention: normalise and project, add to the residual, gate. Each is one
call here, because on a CPU it is one pass over the weights; elsewhere the reference leaves the fusing to XLA.

Dimension key
    T  tokens in the step     I  inputs     O  outputs     J  groups of inputs     G  inputs of a group, I / J
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import cpu, panels
from pallas_kernels.platform import current_platform
from pallas_kernels.rotation import rotate

MATRIX_UNIT_ROWS = 32  # a guess: no machine with AMX was at hand to measure

WIDENED = 2**23  # int4 weights that are floats at a time

ACTIVATIONS = {
    None: lambda x: x,
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def linear(
    x_TI,
    kernel,
    num_tokens=None,
    *,
    kernel_scale=None,
    kernel_offset=None,
    norm_I=None,
    norm_eps=1e-6,
    norm_offset=0.0,
    residual_TO=None,
    bias=None,
    activation=None,
    out_dtype=None,
    in_panels=False,
    implementation=None,
):
    """Multiplies each token by the kernel, accumulating in float32.

    y = residual + activation(rms_norm(x) @ kernel.T + bias); or, for a kernel of two halves,
    residual + activation(gate) * up. What is None is left out.

    Args:
        x_TI: tokens, bfloat16 or float32.
        kernel: weights `[O, I]`, or gate and up `[2, O, I]`, any float dtype, int8 in [-127, 127], or int4. int8 stands
            for rotated weights: see pallas_kernels.rotation.
        kernel_scale: what one step of an integer kernel is worth. Of an int8 kernel `[O]` or `[2, O]`: tokens are then
            rotated and rounded to int8 too, each by its own largest element, and products are exact. Of an int4 kernel
            `[O, J]` or `[2, O, J]`, one for each of J groups of inputs: tokens stay as they are.
        kernel_offset: what 0 stands for in an int4 kernel, as kernel_scale has it.
        num_tokens: int32 scalar array: rows at or past it are padding. None when all are real.
        norm_I: weights of an RMS norm of x; norm_offset is added to them (Gemma's 1), norm_eps to the mean square.
        residual_TO: added to the result, after the activation.
        bias: `[O]`, or `[2, O]` for a kernel of two halves.
        activation: a name in ACTIVATIONS.
        out_dtype: dtype of the result; x's when None.
        in_panels: the kernel stands as `panels.pack` puts it, and with an int4 one its scales and offsets.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        `[T, O]`; padding rows hold anything.

    Raises:
        ValueError: the widths differ, an integer kernel has no scale, or the implementation or activation is unknown.
    """
    if x_TI.shape[-1] != kernel.shape[-1]:
        raise ValueError(f"x has {x_TI.shape[-1]} inputs and the kernel {kernel.shape[-1]}; kernels are [out, in]")
    if (kernel.dtype in (jnp.int8, jnp.int4)) != (kernel_scale is not None):
        raise ValueError(
            f"a {kernel.dtype} kernel and kernel_scale {kernel_scale}; int8 and int4 kernels, and only they, have one"
        )
    if (kernel.dtype == jnp.int4) != (kernel_offset is not None):
        raise ValueError(
            f"a {kernel.dtype} kernel and kernel_offset {kernel_offset}; int4 kernels, and only they, have one"
        )
    if kernel_offset is not None and not _are_groups(kernel, kernel_scale, kernel_offset):
        shapes = f"kernel_scale {kernel_scale.shape} and kernel_offset {kernel_offset.shape}"
        raise ValueError(f"an int4 kernel {kernel.shape}, {shapes}; groups share a row's inputs evenly")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {sorted(filter(None, ACTIVATIONS))}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    implementation = implementation or _fastest(x_TI, kernel, kernel_scale, in_panels)
    run = IMPLEMENTATIONS[implementation]
    if in_panels and run is _cpu:
        run = functools.partial(run, in_panels=True)
    elif in_panels:
        kernel = panels.unpack(kernel)
        if kernel_offset is not None:
            kernel_scale, kernel_offset = (panels.unpack(of, 1) for of in (kernel_scale, kernel_offset))
    return run(
        x_TI,
        kernel,
        num_tokens,
        kernel_scale=kernel_scale,
        kernel_offset=kernel_offset,
        norm_I=norm_I,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        residual_TO=residual_TO,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype or x_TI.dtype,
    )


def _are_groups(kernel, scale, offset) -> bool:
    *out, num_in = kernel.shape
    return scale.shape == offset.shape == (*out, scale.shape[-1]) and num_in % scale.shape[-1] == 0


def reference(
    x_TI, kernel, num_tokens, *, kernel_scale, kernel_offset, norm_I, norm_eps, norm_offset, residual_TO, bias,
    activation, out_dtype, by_int4=None,
):  # fmt: skip
    """Plain jnp over all rows, padding too; by_int4(x, kernel, scale, offset) in place of multiply_int4 where given."""
    if norm_I is not None:
        x = x_TI.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + norm_eps)
        x_TI = (x * (norm_I.astype(jnp.float32) + norm_offset)).astype(x_TI.dtype)
    # Both halves in one product: cut out of stacked layers one by one, XLA would copy each before it multiplies.
    flat = lambda a: None if a is None else a.reshape(-1, *a.shape[kernel.ndim - 1 :])
    kernel_OI, scale, bias_O = kernel.reshape(-1, kernel.shape[-1]), flat(kernel_scale), flat(bias)
    if kernel_offset is None:
        y_TO = _product(x_TI, kernel_OI, scale, _written_dtype(x_TI, kernel, out_dtype))
    else:
        y_TO = (by_int4 or multiply_int4)(x_TI, kernel_OI, scale, flat(kernel_offset))
    if bias_O is not None:
        y_TO = y_TO.astype(jnp.float32) + bias_O.astype(jnp.float32)
    halves = jnp.split(y_TO, 2, axis=1) if kernel.ndim == 3 else [y_TO]
    y_TO, *up = (half_TO.astype(jnp.float32) for half_TO in halves)
    y_TO = ACTIVATIONS[activation](y_TO)
    for up_TO in up:
        y_TO *= up_TO
    if residual_TO is not None:
        y_TO += residual_TO.astype(jnp.float32)
    return y_TO.astype(out_dtype)


def _written_dtype(x_TI, kernel, out_dtype):
    """What the sums of a product are rounded to before anything else is done with them.

    Of gate and up to the tokens' dtype, as Hugging Face rounds them, on TPUs and GPUs, where XLA writes them to memory
    first: of 2,048 tokens of Llama-3-8B they are 224 MiB as float32, written and read in each layer.
    """
    is_written = kernel.ndim == 3 and out_dtype == x_TI.dtype and current_platform() != "cpu"
    return x_TI.dtype if is_written else jnp.float32


def _product(x_TI, kernel_OI, scale_O, out_dtype):
    if scale_O is None:
        dtype = jnp.promote_types(x_TI.dtype, kernel_OI.dtype)
        return _dot(x_TI.astype(dtype), kernel_OI.astype(dtype), out_dtype)
    x_TI, step_T1 = rounded_tokens(x_TI)
    y_TO = _dot(x_TI, kernel_OI, jnp.int32).astype(jnp.float32)
    return (y_TO * (scale_O.astype(jnp.float32) * step_T1)).astype(out_dtype)


def rounded_tokens(x_TI):
    """What int8 kernels multiply: tokens rotated, as int8[T, I], and what a step of each is worth, float32[T, 1]."""
    x_TI = rotate(x_TI)
    top_T1 = jnp.max(jnp.abs(x_TI), axis=-1, keepdims=True)
    top_T1 = jnp.where(top_T1 > 0, top_T1, 1)
    return jnp.round(x_TI * (127 / top_T1)).astype(jnp.int8), top_T1 / 127


def int4_floats(kernel, scale, offset):
    """What int4 weights `[..., I]` stand for, float32, by scales and offsets `[..., J]`."""
    groups = kernel.reshape(*scale.shape, -1).astype(jnp.float32)
    scale, offset = (of[..., None].astype(jnp.float32) for of in (scale, offset))
    return (groups * scale + offset).reshape(kernel.shape)


def multiply_int4(x_TI, kernel_OI, scale_OJ, offset_OJ):
    """By the kernel as floats, a few outputs after another: the floats of all would be written and read again."""

    def some(kernel_OI, scale_OJ, offset_OJ):
        return _dot(x_TI, int4_floats(kernel_OI, scale_OJ, offset_OJ).astype(x_TI.dtype), jnp.float32)

    O, I = kernel_OI.shape
    parts = next((n for n in range(max(1, O * I // WIDENED), O) if O % n == 0), 1)
    if parts == 1:
        return some(kernel_OI, scale_OJ, offset_OJ)
    cut = lambda a: a.reshape(parts, O // parts, -1)
    y_PTO = jax.lax.map(lambda part: some(*part), (cut(kernel_OI), cut(scale_OJ), cut(offset_OJ)))
    return y_PTO.swapaxes(0, 1).reshape(-1, O)


def _dot(x_TI, kernel_OI, out_dtype):
    T = x_TI.shape[0]
    # XLA's CPU bfloat16 dot of one row is ten times slower than that of eight (measured, Zen 3, 2026).
    short = 8 - T if T < 8 and current_platform() == "cpu" else 0
    x_TI = jnp.pad(x_TI, ((0, short), (0, 0)))
    return jax.lax.dot_general(x_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)[:T]


def _cpu(x_TI, kernel, num_tokens, in_panels=False, **options):
    from pallas_kernels.cpu import matmul

    return matmul.linear(
        x_TI, kernel, num_tokens, num_threads=cpu.register().num_threads, in_panels=in_panels, **options
    )


def _tpu(x_TI, kernel, num_tokens, **options):
    from pallas_kernels import int4_matmul

    out_dtype = _written_dtype(x_TI, kernel, options["out_dtype"])
    multiply = functools.partial(int4_matmul.multiply, out_dtype=out_dtype)
    return reference(x_TI, kernel, num_tokens, by_int4=multiply, **options)


def _fastest(x_TI, kernel, kernel_scale, in_panels) -> str:
    if current_platform() == "tpu" and kernel.dtype == jnp.int4:
        from pallas_kernels import int4_matmul

        flat = lambda a: jax.ShapeDtypeStruct((math.prod(a.shape[:-1]), a.shape[-1]), a.dtype)
        return "tpu" if int4_matmul.supports(x_TI, flat(kernel), flat(kernel_scale)) else "reference"
    if current_platform() != "cpu" or not cpu.is_available():
        return "reference"
    from pallas_kernels.cpu import matmul

    if kernel.dtype == jnp.int4:
        return "cpu" if in_panels and matmul.supports_groups(x_TI, kernel_scale) else "reference"
    # Matrix units multiply bfloat16 far faster than float32 lanes, once there are rows to fill them.
    if not in_panels and kernel.dtype == jnp.bfloat16 and x_TI.shape[0] >= MATRIX_UNIT_ROWS and cpu.has_matrix_units():
        return "reference"
    return "cpu" if matmul.supports(x_TI, kernel) else "reference"


IMPLEMENTATIONS = {"reference": reference, "cpu": _cpu, "tpu": _tpu}
