"""Tokens times int4 weights in groups, on a TPU: the weights become floats in fast memory, never in the large one.

XLA would write the whole weight as bfloat16 and read it again. Here a block of integers is fetched, widened and
multiplied while the next one is on its way. How a group's scale gets to its products depends on the tokens:

few     A token's inputs are laid out once for each group of a row of lanes, zero outside of it. One product then has
        a row for each token and group, which the group's scale multiplies: weights are only widened.
many    The scales are spread over the lanes of their groups, by a product with ones and zeros, and multiply weights.

Either way offsets meet each group's sum of inputs, in a small product of their own.

Dimension key
    T  tokens     I  inputs     O  outputs     J  groups of inputs     L  128 lanes     C  I / L
    Q  groups in a row of lanes
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
FEW = 64  # tokens; beyond, multiplying the products costs more than multiplying the weights
NT = (((1,), (1,)), ((), ()))  # contracts the last axes of both
MOST_ROWS = 512  # tokens worked on together


def supports(x_TI, kernel_OI, scale_OJ) -> bool:
    O, I = kernel_OI.shape
    return x_TI.dtype == jnp.bfloat16 and I % LANES == O % LANES == LANES % (I // scale_OJ.shape[1]) == 0


def multiply(x_TI, kernel_OI, scale_OJ, offset_OJ, *, interpret=False):
    """float32[T, O].

    Args:
        x_TI: bfloat16.
        kernel_OI: int4.
        scale_OJ, offset_OJ: bfloat16; a weight is kernel * scale + offset.
    """
    T, J = x_TI.shape[0], scale_OJ.shape[1]
    sums_TJ = x_TI.astype(jnp.float32).reshape(T, J, -1).sum(-1)
    y_TO = lax.dot_general(sums_TJ, offset_OJ.astype(jnp.float32), NT, precision=lax.Precision.HIGHEST)
    x_TI = jnp.pad(x_TI, ((0, -T % (16 if T <= MOST_ROWS else MOST_ROWS)), (0, 0)))
    product = _few if T <= FEW else _many
    return y_TO + product(x_TI, kernel_OI, scale_OJ, interpret=interpret)[:T]


def _few(x_TI, kernel_OI, scale_OJ, *, interpret):
    T, I = x_TI.shape
    O, J = scale_OJ.shape
    C, Q = I // LANES, LANES * J // I
    group_L = jnp.arange(LANES) * Q // LANES
    mine_QL = group_L == jnp.arange(Q)[:, None]
    x_CQTL = jnp.where(mine_QL[:, None], x_TI.reshape(T, C, 1, LANES).transpose(1, 2, 0, 3), 0)
    outs, chunks = _divisor(O, 512), _divisor(C, 16)

    def body(x_ref, kernel_ref, scale_ref, y_ref):
        @pl.when(pl.program_id(1) == 0)
        def _start():
            y_ref[...] = jnp.zeros_like(y_ref)

        y_TO = y_ref[...]
        for c in range(chunks):
            w_OL = kernel_ref[:, c * LANES : (c + 1) * LANES].astype(jnp.bfloat16)
            part_RO = lax.dot_general(x_ref[c], w_OL, NT, preferred_element_type=jnp.float32)
            for q in range(Q):
                y_TO += part_RO[q * T : (q + 1) * T] * scale_ref[c * Q + q : c * Q + q + 1, :]
        y_ref[...] = y_TO

    return pl.pallas_call(
        body,
        grid=(O // outs, C // chunks),
        in_specs=[
            pl.BlockSpec((chunks, Q * T, LANES), lambda o, c: (c, 0, 0)),
            pl.BlockSpec((outs, chunks * LANES), lambda o, c: (o, c)),
            pl.BlockSpec((chunks * Q, outs), lambda o, c: (c, o)),
        ],
        out_specs=pl.BlockSpec((T, outs), lambda o, c: (0, o)),
        out_shape=jax.ShapeDtypeStruct((T, O), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="int4_matmul_few",
    )(x_CQTL.reshape(C, Q * T, LANES), kernel_OI, scale_OJ.T.astype(jnp.float32))


def _many(x_TI, kernel_OI, scale_OJ, *, interpret):
    T, I = x_TI.shape
    O, J = scale_OJ.shape
    C, Q = I // LANES, LANES * J // I
    rows, outs, chunks = min(T, MOST_ROWS), _divisor(O, 512), _divisor(C, 8)
    groups, inputs = chunks * Q, chunks * LANES
    # One block's scales side by side in a row of lanes: the blocks' own axis comes first.
    scale_BOG = scale_OJ.reshape(O, C // chunks, groups).transpose(1, 0, 2)
    spread_GI = jnp.asarray(jnp.arange(groups)[:, None] == jnp.arange(inputs) * Q // LANES, jnp.bfloat16)

    def body(x_ref, kernel_ref, scale_ref, spread_ref, y_ref):
        @pl.when(pl.program_id(2) == 0)
        def _start():
            y_ref[...] = jnp.zeros_like(y_ref)

        scale_OI = jnp.dot(scale_ref[0], spread_ref[...], preferred_element_type=jnp.float32)
        w_OI = (kernel_ref[...].astype(jnp.float32) * scale_OI).astype(jnp.bfloat16)
        y_ref[...] += lax.dot_general(x_ref[...], w_OI, NT, preferred_element_type=jnp.float32)

    return pl.pallas_call(
        body,
        grid=(T // rows, O // outs, C // chunks),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda t, o, c: (t, c)),
            pl.BlockSpec((outs, inputs), lambda t, o, c: (o, c)),
            pl.BlockSpec((1, outs, groups), lambda t, o, c: (c, o, 0)),
            pl.BlockSpec((groups, inputs), lambda t, o, c: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, outs), lambda t, o, c: (t, o)),
        out_shape=jax.ShapeDtypeStruct((T, O), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="int4_matmul_many",
    )(x_TI, kernel_OI, scale_BOG, spread_GI)


def _divisor(count, most) -> int:
    """The largest power of two that divides, up to a limit."""
    size = most
    while count % size:
        size //= 2
    return size
