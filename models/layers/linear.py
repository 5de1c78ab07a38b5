"""A linear layer whose weights are stored as checkpoints have them: `[*out, in]`.

Dimension key
    T  tokens in the step     I  inputs     O  outputs
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models import parallel
from pallas_kernels import panels
from pallas_kernels.linear import linear

GROUP_SIZES = (32, 16)  # the first that divides a layer's inputs


class Linear(nnx.Module):
    """x times kernel, plus a bias when it has one.

    Args:
        out: the output's shape: `(D,)`, or several axes for a fused projection.
        num_in: inputs, I.
        axes: logical names of the output's axes, then of the input's.
        bias: whether there is one, shaped as `out`.
        is_rounded: whether `quantise` rounds it; for the few weights by which much is decided, not.
    """

    def __init__(
        self,
        out: tuple[int, ...],
        num_in: int,
        *,
        axes: tuple,
        bias: bool = False,
        is_rounded: bool = True,
        rngs: nnx.Rngs,
    ):
        self.inside = axes[-1]  # the logical axis that the products are summed over
        self.is_rounded = is_rounded
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (*out, num_in), jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros(out, jnp.float32), axes=axes[:-1]) if bias else None
        self.kernel_scale, self.kernel_offset = nnx.data(None), nnx.data(None)
        self.in_panels = False

    def quantise(self, method: str):
        """Turns a layer of shapes into its int8 or int4 form, in place; scores of a vocabulary stay int8."""
        if not self.is_rounded:
            return
        if method == "int4" and self.kernel.axes[0] != "vocab":
            self.kernel_scale, self.kernel_offset = int4_form(self.kernel)
        else:
            self.kernel_scale = int8_form(self.kernel)

    def put_in_panels(self, dtype) -> bool:
        """Makes a layer of shapes expect its kernel, of this dtype, in panels where that is faster; whether it is."""
        *out, num_in = self.kernel.get_value().shape
        self.in_panels = panels.suits(math.prod(out), num_in, dtype)
        return self.in_panels

    def __call__(self, x_TI, num_tokens=None, *, norm=None, residual=None, activation=None, out_dtype=None):
        """residual + activation(norm(x) times kernel + bias), in one pass over the weights; what is None is left out.

        Args:
            num_tokens: int32 scalar, rows past it are padding and need not be computed; None when all count.
            norm: an RMSNorm of x.
            residual: `[T, *out]`.
            activation: a name the kernel knows, for a layer of two halves: activation(gate) * up.
            out_dtype: x's when None.

        Returns:
            `[T, *out]`, or `[T, *out[1:]]` with an activation.
        """
        if (split := parallel.splits(self.inside)) is not None:
            return self._summed(x_TI, num_tokens, split, residual=residual, out_dtype=out_dtype)
        kernel = self.kernel[...]
        before, out = (kernel.shape[:1], kernel.shape[1:-1]) if activation else ((), kernel.shape[:-1])
        bias = None if self.bias is None else self.bias[...].reshape(*before, -1)
        groups = () if self.kernel_offset is None else self.kernel_offset.shape[-1:]
        flat = lambda of: None if of is None else of[...].reshape(*before, -1, *groups)
        y_TO = linear(
            x_TI,
            kernel.reshape(*before, -1, kernel.shape[-1]),
            num_tokens,
            kernel_scale=flat(self.kernel_scale),
            kernel_offset=flat(self.kernel_offset),
            norm_I=None if norm is None else norm.scale[...],
            norm_eps=0.0 if norm is None else norm.eps,
            norm_offset=0.0 if norm is None else float(norm.unit_offset),
            residual_TO=residual,
            bias=bias,
            activation=activation,
            out_dtype=out_dtype,
            in_panels=self.in_panels,
        )
        return y_TO.reshape(-1, *out)

    def _summed(self, x_TI, num_tokens, split, *, residual, out_dtype):
        """The same where each device has a part of the inputs; what is added to the product is added once."""
        kernel_OI = self.kernel[...]
        scale, offset = (None if of is None else of[...] for of in (self.kernel_scale, self.kernel_offset))
        part_TO = linear(x_TI, kernel_OI, num_tokens, kernel_scale=scale, kernel_offset=offset)
        y_TO = parallel.add_up(part_TO, split)
        for term in (None if self.bias is None else self.bias[...], residual):
            if term is not None:
                y_TO = y_TO.astype(jnp.float32) + term.astype(jnp.float32)
        return y_TO.astype(out_dtype or x_TI.dtype)


def int8_form(kernel: nnx.Param) -> nnx.Param:
    """Makes a parameter of shapes int8, and gives its scales: float32, without the last axis."""
    shape = kernel.get_value().shape
    kernel.set_value(jax.ShapeDtypeStruct(shape, jnp.int8))
    return nnx.Param(jax.ShapeDtypeStruct(shape[:-1], jnp.float32), axes=kernel.axes[:-1])


def int4_form(kernel: nnx.Param) -> tuple[nnx.Param, nnx.Param]:
    """Makes a parameter of shapes int4, and gives its scales and offsets: bfloat16, one a group along the last axis.

    They are of the parameter's own type.
    """
    *out, num_in = kernel.get_value().shape
    kernel.set_value(jax.ShapeDtypeStruct((*out, num_in), jnp.int4))
    of_groups = jax.ShapeDtypeStruct((*out, num_in // group_size(num_in)), jnp.bfloat16)
    return type(kernel)(of_groups, axes=kernel.axes), type(kernel)(of_groups, axes=kernel.axes)


def group_size(num_in: int) -> int:
    """How many inputs in a row share the scale and the offset of an int4 weight.

    Raises:
        ValueError: the inputs are no whole groups.
    """
    for size in GROUP_SIZES:
        if num_in % size == 0:
            return size
    raise ValueError(f"a layer of {num_in} inputs has no whole groups of {GROUP_SIZES[-1]}; use int8")
