"""Tokens times int4 weights in groups, on a TPU: the weights become floats in fast memory, never in the large one.

XLA would write the whole weight as bfloat16 and read it again. Here a block of integers is fetched, widened and
multiplied while the next one is on its way. How a group's scale gets to its products depends on the tokens:

few     A token's inputs are laid out once for each group of a row of lanes, zero outside of it. One product then has
        a row for each token and group, which the group's scale multiplies: weights are only widened.
many    The scales are spread over the lanes of their groups, and multiply weights.

Scales lie as they are stored, since XLA would turn those of all layers together; a product with ones and zeros turns or
spreads a block of them. Either way offsets meet each group's sum of inputs, in a small product of their own.

Dimension key
    T  tokens     I  inputs     O  outputs     J  groups of inputs     L  128 lanes     C  I / L
    Q  groups in a row of lanes     G  groups of a block of inputs     W  groups whose scales are fetched together
    B  outputs of a block
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


def multiply(x_TI, kernel_OI, scale_OJ, offset_OJ, *, out_dtype=jnp.float32, interpret=False):
    """`[T, O]` in out_dtype, summed in float32.

    Args:
        x_TI: bfloat16.
        kernel_OI: int4.
        scale_OJ, offset_OJ: bfloat16; a weight is kernel * scale + offset.
    """
    T, (O, J), C = len(x_TI), scale_OJ.shape, kernel_OI.shape[1] // LANES
    x_TI = jnp.pad(x_TI, ((0, -T % (16 if T <= MOST_ROWS else MOST_ROWS)), (0, 0)))
    sums_TJ = x_TI.astype(jnp.float32).reshape(len(x_TI), J, -1).sum(-1)
    outs, Q = _divisor(O, 512), J // C
    rows, x = min(len(x_TI), MOST_ROWS), x_TI
    if T <= FEW:
        group_L = jnp.arange(LANES) * Q // LANES
        mine_QL = group_L == jnp.arange(Q)[:, None]
        x_CQTL = jnp.where(mine_QL[:, None], x_TI.reshape(rows, C, 1, LANES).transpose(1, 2, 0, 3), 0)
        x, chunks, add = x_CQTL.reshape(C, Q * rows, LANES), _divisor(C, 16), _few
        x_block = pl.BlockSpec((chunks, Q * rows, LANES), lambda t, o, c: (c, 0, 0))
    else:
        chunks, add = _divisor(C, 8), _many
        x_block = pl.BlockSpec((rows, chunks * LANES), lambda t, o, c: (t, c))
    groups, width = chunks * Q, min(J, LANES)

    def body(x_ref, sums_ref, kernel_ref, scale_ref, offset_ref, y_ref, sum_ref):
        c = pl.program_id(2)

        @pl.when(c == 0)
        def _start():
            offset_BJ = offset_ref[...].astype(jnp.float32)
            sum_ref[...] = lax.dot_general(sums_ref[...], offset_BJ, NT, precision=lax.Precision.HIGHEST)

        scale_BW = scale_ref[...]
        if J % width:  # the last ones fetched may be anything past J
            here_BW = c * groups // width * width + lax.broadcasted_iota(jnp.int32, scale_BW.shape, 1)
            scale_BW = jnp.where(here_BW < J, scale_BW, 0)
        add(sum_ref, x_ref, kernel_ref, scale_BW, c * groups % width, Q)

        @pl.when(c == C // chunks - 1)
        def _finish():
            y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    return pl.pallas_call(
        body,
        grid=(len(x_TI) // rows, O // outs, C // chunks),
        in_specs=[
            x_block,
            pl.BlockSpec((rows, J), lambda t, o, c: (t, 0)),
            pl.BlockSpec((outs, chunks * LANES), lambda t, o, c: (o, c)),
            pl.BlockSpec((outs, width), lambda t, o, c: (o, c * groups // width)),
            pl.BlockSpec((outs, J), lambda t, o, c: (o, 0)),
        ],
        out_specs=pl.BlockSpec((rows, outs), lambda t, o, c: (t, o)),
        out_shape=jax.ShapeDtypeStruct((len(x_TI), O), out_dtype),
        scratch_shapes=[pltpu.VMEM((rows, outs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=f"int4_matmul{add.__name__}",
    )(x, sums_TJ, kernel_OI, scale_OJ, offset_OJ)[:T]


def _few(sum_ref, x_ref, kernel_ref, scale_BW, first, Q):
    """Adds a block of inputs; `first` is where the scales of its groups begin."""
    T, chunks = len(sum_ref), len(x_ref)
    shape_GW = (chunks * Q, scale_BW.shape[1])
    is_own_GW = lax.broadcasted_iota(jnp.int32, shape_GW, 0) + first == lax.broadcasted_iota(jnp.int32, shape_GW, 1)
    scale_GB = lax.dot_general(
        is_own_GW.astype(jnp.float32).astype(jnp.bfloat16), scale_BW, NT, preferred_element_type=jnp.float32
    )
    y_TB = sum_ref[...]
    for c in range(chunks):
        w_BL = kernel_ref[:, c * LANES : (c + 1) * LANES].astype(jnp.bfloat16)
        part_RB = lax.dot_general(x_ref[c], w_BL, NT, preferred_element_type=jnp.float32)
        for q in range(Q):
            y_TB += part_RB[q * T : (q + 1) * T] * scale_GB[c * Q + q : c * Q + q + 1]
    sum_ref[...] = y_TB


def _many(sum_ref, x_ref, kernel_ref, scale_BW, first, Q):
    """As _few."""
    shape_WI = (scale_BW.shape[1], x_ref.shape[1])
    group_WI = first + lax.broadcasted_iota(jnp.int32, shape_WI, 1) * Q // LANES
    is_own_WI = lax.broadcasted_iota(jnp.int32, shape_WI, 0) == group_WI
    scale_BI = jnp.dot(scale_BW, is_own_WI.astype(jnp.float32).astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    w_BI = (kernel_ref[...].astype(jnp.float32) * scale_BI).astype(jnp.bfloat16)
    sum_ref[...] += lax.dot_general(x_ref[...], w_BI, NT, preferred_element_type=jnp.float32)


def _divisor(count, most) -> int:
    """The largest power of two that divides, up to a limit."""
    size = most
    while count % size:
        size //= 2
    return size
