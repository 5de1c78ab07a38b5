"""Linear layers over the real tokens of a step: x times a kernel stored `[out, in]`, with what stands around it.

A decoder block is a few of these and an attention: normalise and project, add to the residual, gate. Each is one
call here, because on a CPU it is one pass over the weights; elsewhere the reference leaves the fusing to XLA.

Dimension key
    T  tokens in the step     I  inputs     O  outputs
"""

import jax
import jax.numpy as jnp

from pallas_kernels import cpu
from pallas_kernels.platform import current_platform

MATRIX_UNIT_ROWS = 32  # a guess: no machine with AMX was at hand to measure

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
    norm_I=None,
    norm_eps=1e-6,
    norm_offset=0.0,
    residual_TO=None,
    bias=None,
    activation=None,
    out_dtype=None,
    implementation=None,
):
    """Multiplies each token by the kernel, accumulating in float32.

    y = residual + activation(rms_norm(x) @ kernel.T + bias); or, for a kernel of two halves,
    residual + activation(gate) * up. What is None is left out.

    Args:
        x_TI: tokens, bfloat16 or float32.
        kernel: weights `[O, I]`, or gate and up `[2, O, I]`, any float dtype, or int8 in [-127, 127].
        kernel_scale: what one step of an int8 kernel is worth, `[O]` or `[2, O]`. Tokens are then rounded to int8
            too, each by its own largest element, and products are exact.
        num_tokens: int32 scalar array: rows at or past it are padding. None when all are real.
        norm_I: weights of an RMS norm of x; norm_offset is added to them (Gemma's 1), norm_eps to the mean square.
        residual_TO: added to the result, after the activation.
        bias: `[O]`, or `[2, O]` for a kernel of two halves.
        activation: a name in ACTIVATIONS.
        out_dtype: dtype of the result; x's when None.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        `[T, O]`; padding rows hold anything.

    Raises:
        ValueError: the widths differ, an int8 kernel has no scale, or the implementation or activation is unknown.
    """
    if x_TI.shape[-1] != kernel.shape[-1]:
        raise ValueError(f"x has {x_TI.shape[-1]} inputs and the kernel {kernel.shape[-1]}; kernels are [out, in]")
    if (kernel.dtype == jnp.int8) != (kernel_scale is not None):
        raise ValueError(
            f"a {kernel.dtype} kernel and kernel_scale {kernel_scale}; int8 kernels, and only they, have one"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {sorted(filter(None, ACTIVATIONS))}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    run = IMPLEMENTATIONS[implementation or _fastest(x_TI, kernel)]
    return run(
        x_TI,
        kernel,
        num_tokens,
        kernel_scale=kernel_scale,
        norm_I=norm_I,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        residual_TO=residual_TO,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype or x_TI.dtype,
    )


def reference(
    x_TI, kernel, num_tokens, *, kernel_scale, norm_I, norm_eps, norm_offset, residual_TO, bias, activation, out_dtype
):
    """Plain jnp over all rows, padding too."""
    if norm_I is not None:
        x = x_TI.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + norm_eps)
        x_TI = (x * (norm_I.astype(jnp.float32) + norm_offset)).astype(x_TI.dtype)
    # Both halves in one product: cut out of stacked layers one by one, XLA would copy each before it multiplies.
    flat = lambda a: None if a is None else a.reshape(-1)
    y_TO = _product(x_TI, kernel.reshape(-1, kernel.shape[-1]), flat(kernel_scale), flat(bias))
    y_TO, *up = jnp.split(y_TO, 2, axis=1) if kernel.ndim == 3 else [y_TO]
    y_TO = ACTIVATIONS[activation](y_TO)
    for up_TO in up:
        y_TO *= up_TO
    if residual_TO is not None:
        y_TO += residual_TO.astype(jnp.float32)
    return y_TO.astype(out_dtype)


def _product(x_TI, kernel_OI, scale_O, bias_O):
    if scale_O is None:
        dtype = jnp.promote_types(x_TI.dtype, kernel_OI.dtype)
        y_TO = _dot(x_TI.astype(dtype), kernel_OI.astype(dtype), jnp.float32)
    else:
        x_TI = x_TI.astype(jnp.float32)
        top_T1 = jnp.max(jnp.abs(x_TI), axis=-1, keepdims=True)
        top_T1 = jnp.where(top_T1 > 0, top_T1, 1)
        y_TO = _dot(jnp.round(x_TI * (127 / top_T1)).astype(jnp.int8), kernel_OI, jnp.int32).astype(jnp.float32)
        y_TO *= scale_O.astype(jnp.float32) * (top_T1 / 127)
    return y_TO if bias_O is None else y_TO + bias_O.astype(jnp.float32)


def _dot(x_TI, kernel_OI, sums):
    T = x_TI.shape[0]
    # XLA's CPU bfloat16 dot of one row is ten times slower than that of eight (measured, Zen 3, 2026).
    short = 8 - T if T < 8 and current_platform() == "cpu" else 0
    x_TI = jnp.pad(x_TI, ((0, short), (0, 0)))
    return jax.lax.dot_general(x_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=sums)[:T]


def _cpu(x_TI, kernel, num_tokens, **options):
    from pallas_kernels.cpu import matmul

    return matmul.linear(x_TI, kernel, num_tokens, num_threads=cpu.register().num_threads, **options)


def _fastest(x_TI, kernel) -> str:
    if current_platform() != "cpu" or not cpu.is_available():
        return "reference"
    from pallas_kernels.cpu import matmul

    # Matrix units multiply bfloat16 far faster than float32 lanes, once there are rows to fill them.
    if kernel.dtype == jnp.bfloat16 and x_TI.shape[0] >= MATRIX_UNIT_ROWS and cpu.has_matrix_units():
        return "reference"
    return "cpu" if matmul.supports(x_TI, kernel) else "reference"


IMPLEMENTATIONS = {"reference": reference, "cpu": _cpu}
