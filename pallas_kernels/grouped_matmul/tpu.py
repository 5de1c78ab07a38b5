"""Grouped matmul of rounded weights on a TPU: a Pallas kernel over tiles of rows, each visited by every expert in it.

A visit multiplies a tile of rows by some outputs of an expert, all inputs at once, and writes those rows that are the
expert's. Visits of one tile follow each other, so that it stays in fast memory; an expert whose rows go on in the next
tile is not fetched again. Which tiles and experts there are comes from the sizes, as in JAX's megablox, which takes no
rounded weights.

int8    Rows are int8 too, and sums of their products exact.
int4    Weights become floats in fast memory, in either of the ways of `pallas_kernels.int4_matmul`. Scales and offsets
        come with their outputs side by side, since rows of a few groups would be padded to 128 lanes.

Dimension key
    R  rows, sorted by expert     I  inputs     O  outputs     E  experts     G  kernels
    J  groups of inputs     L  128 lanes     C  I / L     Q  groups in a row of lanes     B  outputs of a block
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

ROWS = 128  # of a tile
FEW_ROWS = {
    jnp.dtype(jnp.int8): 32,
    jnp.dtype(jnp.int4): 16,
}  # of one where experts have few: as products have at least
WEIGHTS = 2**22  # of a tile, twice in fast memory
LANES = 128
WIDE = 512  # inputs whose int4 weights are floats at a time
NT, TN = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))  # contract the last axes of both, or the first


def rows_of_tile(num_rows: int, num_experts: int, dtype) -> int:
    few = FEW_ROWS[jnp.dtype(dtype)]
    return few if num_rows <= few * num_experts else ROWS


def refusal(rows_dtype, kernel_GOI, scale_GOJ=None) -> str | None:
    """Why whole lanes of inputs and outputs are not enough for a kernel here; None when they are."""
    if kernel_GOI.dtype == jnp.int8:
        return None if rows_dtype == jnp.int8 else f"rows of {rows_dtype}, and int8 kernels take rows of int8"
    if kernel_GOI.dtype != jnp.int4 or rows_dtype != jnp.bfloat16:
        return f"rows of {rows_dtype} and kernels of {kernel_GOI.dtype}; int4 kernels take rows of bfloat16"
    group = kernel_GOI.shape[-1] // scale_GOJ.shape[-1]
    return f"groups of {group} inputs do not share rows of {LANES}" if LANES % group else None


def multiply_int8(x_RI, kernel_GOI, group_sizes_E, first, out_dtype, *, scale_EO, step_R1, interpret=False):
    """See `pallas_kernels.grouped_matmul`: x is int8, in steps of step_R1. Padding rows hold anything."""

    def visit(x_ref, step_ref, kernel_ref, scale_ref):
        sums = lax.dot_general(x_ref[...], kernel_ref[...], NT, preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * (scale_ref[...] * step_ref[...])

    scales = scale_EO[:, None], lambda kernel, expert, part: expert
    of_rows, of_outs = (x_RI, step_R1), (scales,)
    return _run(visit, of_rows, kernel_GOI, of_outs, group_sizes_E, first, out_dtype, interpret=interpret)


def multiply_int4(
    x_RI, kernel_GOI, group_sizes_E, first, out_dtype, *, scale_GOJ, offset_GOJ, sums_RJ, parts=1, interpret=False
):
    """The same of int4 kernels and rows of bfloat16.

    Args:
        sums_RJ: of each row's groups of inputs, see sums_of_groups.
        parts: how many parts outputs have; scales and offsets of one lie side by side where that costs no copy.
    """
    R, (_, O, J) = len(x_RI), scale_GOJ.shape
    turned = lambda of_GOJ: of_GOJ.reshape(-1, O // parts, J).swapaxes(1, 2)
    place = lambda kernel, expert, part: kernel * parts + part
    add = _many if rows_of_tile(R, len(group_sizes_E), jnp.int4) == ROWS else _few

    def visit(x_ref, sums_ref, kernel_ref, scale_ref, offset_ref, sum_ref, step_ref):
        offset_JB = offset_ref[...].astype(jnp.float32)
        sum_ref[...] = jnp.dot(sums_ref[...], offset_JB, precision=lax.Precision.HIGHEST)
        add(sum_ref, x_ref, kernel_ref, scale_ref, step_ref)
        return sum_ref[...]

    of_rows, of_outs = (x_RI, sums_RJ), ((turned(scale_GOJ), place), (turned(offset_GOJ), place))
    options = {"parts": parts, "scratch": J, "interpret": interpret}
    return _run(visit, of_rows, kernel_GOI, of_outs, group_sizes_E, first, out_dtype, **options)


def sums_of_groups(x_TI, J):
    """Each group's sum of inputs: float32 `[T, J]`."""
    # As a product: groups are no whole lanes, so that XLA would lay out all inputs anew, in float32, to add them up.
    I = x_TI.shape[1]
    is_own_IJ = jnp.arange(I)[:, None] * J // I == jnp.arange(J)
    return jnp.dot(x_TI, is_own_IJ.astype(x_TI.dtype), preferred_element_type=jnp.float32)


def _run(
    visit, of_rows, kernel_GOI, of_outs, group_sizes_E, first, out_dtype, *, parts=1, scratch=None, interpret=False
):
    """The answers of all rows.

    Args:
        visit: visit(refs of a tile of of_rows, of a kernel's block, of blocks of of_outs, scratch) -> `[rows, outs]`.
        of_rows: arrays of a vector a row.
        of_outs: (array `[any, any, outputs of a part]`, which of its first axis a visit needs, given the number of a
            kernel, of an expert and of a part).
        scratch: J, where there is one of float32[rows, outs] and of float32[J, outs].
    """
    (_, O, I), E, R = kernel_GOI.shape, len(group_sizes_E), len(of_rows[0])
    rows = rows_of_tile(R, E, kernel_GOI.dtype)
    of_rows = [jnp.pad(a, ((0, -R % rows), (0, 0))) for a in of_rows]
    (ends, expert_V, tile_V), num_visits = make_group_metadata(
        group_sizes=group_sizes_E, m=len(of_rows[0]), tm=rows, start_group=jnp.int32(0), num_nonzero_groups=E,
        visit_empty_groups=False,
    )  # fmt: skip
    fits = lambda n: O // parts % n == 0 and (n == LANES or n * I <= WEIGHTS)
    outs = max(n for n in range(LANES, O // parts + 1, LANES) if fits(n))
    blocks = O // parts // outs  # of a part
    by_tile = lambda o, v, ends, expert_V, tile_V, first: (tile_V[v], 0)
    kernel_place = lambda o, v, ends, expert_V, tile_V, first: (first[0] + expert_V[v], o, 0)

    def out_place(number):
        def place(o, v, ends, expert_V, tile_V, first):
            return number(first[0] + expert_V[v], expert_V[v], o // blocks), 0, o % blocks

        return place

    def body(ends, expert_V, tile_V, first, *refs):
        *args, y_ref = refs if scratch is None else (*refs[:-3], *refs[-2:], refs[-3])
        v = pl.program_id(1)
        y = visit(*args)
        row = lax.broadcasted_iota(jnp.int32, y.shape, 0) + tile_V[v] * rows
        is_own = (row >= ends[expert_V[v]]) & (row < ends[expert_V[v] + 1])
        y_ref[...] = jnp.where(is_own, y, y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(O // outs, num_visits),
            in_specs=[
                *(pl.BlockSpec((rows, a.shape[1]), by_tile) for a in of_rows),
                pl.BlockSpec((None, outs, I), kernel_place),
                *(pl.BlockSpec((None, a.shape[1], outs), out_place(number)) for a, number in of_outs),
            ],
            out_specs=pl.BlockSpec((rows, outs), lambda o, v, ends, expert_V, tile_V, first: (tile_V[v], o)),
            scratch_shapes=[pltpu.VMEM((n, outs), jnp.float32) for n in ((rows, scratch) if scratch else ())],
        ),
        out_shape=jax.ShapeDtypeStruct((len(of_rows[0]), O), out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"grouped_{kernel_GOI.dtype.name}",
    )(ends, expert_V, tile_V, jnp.asarray(first, jnp.int32)[None], *of_rows, kernel_GOI, *(a for a, _ in of_outs))[:R]


def _few(sum_ref, x_ref, kernel_ref, scale_ref, step_ref):
    """Adds the products of a row of lanes after another: of each group apart, times its scale."""
    (rows, I), J = x_ref.shape, len(scale_ref)
    C = I // LANES
    Q = J // C
    step_ref[...] = scale_ref[...].astype(jnp.float32)
    group_RL = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) * Q // LANES

    def lanes(c, y_RB):
        at = pl.ds(pl.multiple_of(c * LANES, LANES), LANES)
        x_RL = x_ref[:, at].astype(jnp.float32)
        x_QRL = jnp.concatenate([jnp.where(group_RL == q, x_RL, 0) for q in range(Q)]).astype(x_ref.dtype)
        part = lax.dot_general(x_QRL, kernel_ref[:, at].astype(x_ref.dtype), NT, preferred_element_type=jnp.float32)
        for q in range(Q):
            y_RB += part[q * rows : (q + 1) * rows] * step_ref[pl.ds(c * Q + q, 1), :]
        return y_RB

    sum_ref[...] = lax.fori_loop(0, C, lanes, sum_ref[...])


def _many(sum_ref, x_ref, kernel_ref, scale_ref, step_ref):
    """The same with scales spread over the lanes of their groups: they multiply weights."""
    (_, I), J = x_ref.shape, len(scale_ref)
    width = max(n for n in range(LANES, WIDE + 1, LANES) if I % n == 0)
    place_JI, group_JI = (lax.broadcasted_iota(jnp.int32, (J, width), axis) for axis in (1, 0))

    def inputs(i, _):
        at = pl.ds(pl.multiple_of(i * width, width), width)
        is_own_JI = ((place_JI + i * width) * J // I == group_JI).astype(jnp.float32).astype(jnp.bfloat16)
        scale_BI = lax.dot_general(scale_ref[...], is_own_JI, TN, preferred_element_type=jnp.float32)
        w_BI = (kernel_ref[:, at].astype(jnp.float32) * scale_BI).astype(jnp.bfloat16)
        sum_ref[...] += lax.dot_general(x_ref[:, at], w_BI, NT, preferred_element_type=jnp.float32)

    lax.fori_loop(0, I // width, inputs, None)
