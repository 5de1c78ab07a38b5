"""Grouped matmul in plain XLA: what is computed, and what runs where there is no kernel.

Dimension key
    R  rows, sorted by expert     I  inputs     O  outputs     E  experts     G  kernels
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear import int4_floats, multiply_int4


def reference(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, *, scale_GOJ=None, offset_GOJ=None, **of_int8):
    """Every expert on every row, then each row picks its own."""
    kernel_EOI, group_R = _cut(kernel_GOI, first, group_sizes_E), experts_of(group_sizes_E, len(x_RI))
    if scale_GOJ is not None:
        kernel_EOI = int4_floats(kernel_EOI, *(_cut(of, first, group_sizes_E) for of in (scale_GOJ, offset_GOJ)))
    sums = jnp.int32 if of_int8 else jnp.float32
    all_ERO = jnp.einsum("RI,EOI->ERO", x_RI, kernel_EOI, preferred_element_type=sums, precision="highest")
    y_RO = jnp.take_along_axis(all_ERO, group_R[None, :, None], axis=0)[0]
    return in_steps(y_RO, group_R, **of_int8).astype(out_dtype)


def ragged_dot(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, *, scale_GOJ=None, offset_GOJ=None, **of_int8):
    group_R = experts_of(group_sizes_E, len(x_RI))
    if scale_GOJ is not None:
        weights = kernel_GOI, scale_GOJ, offset_GOJ
        return _one_by_one(x_RI, weights, group_sizes_E, group_R, 0 if first is None else first).astype(out_dtype)
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    kernel_EOI, sums = _cut(kernel_GOI, first, group_sizes_E), jnp.int32 if of_int8 else jnp.float32
    y_RO = lax.ragged_dot_general(x_RI, kernel_EOI, group_sizes_E, numbers, preferred_element_type=sums)
    return in_steps(y_RO, group_R, **of_int8).astype(out_dtype)


def _one_by_one(x_RI, weights, group_sizes_E, group_R, first):
    """Every row by each expert that has some: the floats of all at once would be as many bytes as they once were."""

    def one(expert, y_RO):
        def add(y_RO):
            own = (lax.dynamic_index_in_dim(of, first + expert, keepdims=False) for of in weights)
            return jnp.where((group_R == expert)[:, None], multiply_int4(x_RI, *own), y_RO)

        return lax.cond(group_sizes_E[expert] > 0, add, lambda y_RO: y_RO, y_RO)

    nothing = jnp.zeros((len(x_RI), weights[0].shape[1]), jnp.float32)
    return lax.fori_loop(0, len(group_sizes_E), one, nothing)


def in_steps(sums_RO, expert_R, scale_EO=None, step_R1=None):
    """Sums of int8 products as float32 in the unit of each output and each row; floats as they are."""
    return sums_RO if scale_EO is None else sums_RO.astype(jnp.float32) * (scale_EO[expert_R] * step_R1)


def experts_of(group_sizes_E, num_rows):
    """Whose each row is; of padding the last one's."""
    # All ends at once: bisecting would be a loop of gathers, which accelerators are slow at.
    ends_E, row_R = jnp.cumsum(group_sizes_E), jnp.arange(num_rows)
    expert_R = jnp.searchsorted(ends_E, row_R, side="right", method="compare_all")
    return jnp.minimum(expert_R, len(group_sizes_E) - 1)


def _cut(of_G, first, group_sizes_E):
    return of_G if first is None else lax.dynamic_slice_in_dim(of_G, first, len(group_sizes_E))
