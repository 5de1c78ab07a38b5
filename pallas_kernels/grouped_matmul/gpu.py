"""Grouped matmul on a Hopper GPU: a Mosaic GPU kernel over tiles of rows of one expert each.

Rows are laid out so that no tile has rows of two experts: a tile then reads one expert's weights, as they lie, and what
it writes is its own. Rows and weights come by TMA into a ring of buffers, a product of them is a `wgmma`. XLA lays the
rows out before, and picks each row's answer afterwards.

A `wgmma` takes 64 rows of its first operand and as few as 8 columns of its second. Where experts have few rows each, as
in decode steps, the weights are the first: tiles have 16 rows, and answers come out turned. Products of int8 are exact
sums of int32, which XLA brings into their unit as it picks the rows.

Compared with ragged_dot_mgpu of jax.experimental.pallas.ops.gpu, which finds each tile's expert by a chain of
selections as long as there are experts.

Dimension key
    T  rows, sorted by expert     I  inputs     O  outputs     E  experts     G  kernels     N  tiles
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.grouped_matmul.xla import experts_of, in_steps

ROWS, FEW_ROWS = 64, 16  # of a tile
LINE = 128  # bytes of inputs in a buffer: a swizzled line
OUTPUTS = (128, 64)  # of a tile: the first that divides a kernel's
STAGES = 6  # buffers of the ring: of 128 outputs 144 KiB, beside 16 of answers
NO_EXPERT = -1


def inputs_of(dtype) -> int:
    """Inputs in a buffer."""
    return LINE // jnp.dtype(dtype).itemsize


def refusal(rows_dtype, kernel_GOI) -> str | None:
    """Why the kernel cannot run this on a Hopper GPU; None when it can."""
    (O, I), dtype = kernel_GOI.shape[1:], kernel_GOI.dtype
    if rows_dtype != dtype or dtype not in (jnp.bfloat16, jnp.float16, jnp.int8):
        return f"rows of {rows_dtype} and kernels of {dtype}; it takes both in bfloat16, float16 or int8"
    if I % inputs_of(dtype) or O % OUTPUTS[-1]:
        return f"{I} inputs and {O} outputs are not whole blocks of {inputs_of(dtype)} and {OUTPUTS[-1]}"
    return None


def multiply(x_TI, kernel_GOI, group_sizes_E, first, out_dtype, *, scale_EO=None, step_R1=None, interpret=False):
    """See `pallas_kernels.grouped_matmul`; first is the number of expert 0's kernel. Padding rows hold anything."""
    (T, I), O, E = x_TI.shape, kernel_GOI.shape[1], len(group_sizes_E)
    turned = T <= FEW_ROWS * E
    rows = FEW_ROWS if turned else ROWS
    tiles, expert_T = Tiles.of(group_sizes_E, T, rows), experts_of(group_sizes_E, T)
    # Each place's row, and each row's place; of padding any.
    row_NR = jnp.clip(tiles.start_N[:, None] + jnp.arange(rows), 0, T - 1)
    place_T = tiles.first_tile_E[expert_T] * rows + jnp.arange(T) - tiles.first_row_E[expert_T]
    place_T = jnp.minimum(place_T, row_NR.size - 1)
    outputs = next(size for size in OUTPUTS if O % size == 0)
    kernel_N = jnp.where(tiles.expert_N < E, tiles.expert_N + first, NO_EXPERT).astype(jnp.int32)
    sums_dtype = out_dtype if scale_EO is None else jnp.int32
    run = _kernel(*row_NR.shape, I, O, outputs, turned, x_TI.dtype, sums_dtype, interpret)
    y = run(kernel_N, x_TI[row_NR.reshape(-1)], kernel_GOI)
    y_TO = y[:, place_T].T if turned else y[place_T]
    return in_steps(y_TO, expert_T, scale_EO, step_R1).astype(out_dtype)


# Layers share one trace of this, and so one lowering of the kernel.
@functools.cache
def _kernel(num_tiles, rows, I, O, outputs, turned, dtype, out_dtype, interpret):
    inputs, width = inputs_of(dtype), LINE // jnp.dtype(out_dtype).itemsize
    tiled = plgpu.TilingTransform((8, inputs)), plgpu.SwizzleTransform(LINE)
    out_tiled = () if turned else (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(LINE))
    stages, shape = min(STAGES, I // inputs), (num_tiles * rows, O)
    return plgpu.kernel(
        functools.partial(_multiply_tile, steps=I // inputs, stages=stages, turned=turned),
        out_type=jax.ShapeDtypeStruct(shape[::-1] if turned else shape, out_dtype),
        grid=(O // outputs, num_tiles),
        grid_names=("column", "tile"),
        scratch_types=dict(
            x_smem=plgpu.SMEM((stages, rows, inputs), dtype, transforms=tiled),
            kernel_smem=plgpu.SMEM((stages, outputs, inputs), dtype, transforms=tiled),
            out_smem=plgpu.SMEM((outputs, rows) if turned else (rows, outputs), out_dtype, transforms=out_tiled),
            barriers=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        interpret=interpret,
    )


def _multiply_tile(kernels_N, x, kernel, out, *, x_smem, kernel_smem, out_smem, barriers, steps, stages, turned):
    tile, column = lax.axis_index("tile"), lax.axis_index("column")
    number, block = kernels_N[tile], lambda i, size: pl.ds(pl.multiple_of(i * size, size), size)
    rows, outs = block(tile, x_smem.shape[1]), block(column, kernel_smem.shape[1])

    def fetch(step, slot):
        inputs = block(step, x_smem.shape[2])
        plgpu.copy_gmem_to_smem(x.at[rows, inputs], x_smem.at[slot], barriers.at[slot])
        plgpu.copy_gmem_to_smem(kernel.at[number, outs, inputs], kernel_smem.at[slot], barriers.at[slot])

    @pl.when(number != NO_EXPERT)
    def _tile():
        for slot in range(stages):
            fetch(jnp.int32(slot), slot)

        def multiply(sums_ref):
            def one(step, _):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(barriers.at[slot])
                first, second = (kernel_smem, x_smem) if turned else (x_smem, kernel_smem)
                plgpu.wgmma(sums_ref, first.at[slot], second.at[slot].T)
                plgpu.wgmma_wait(1)  # the product before is done, and its buffer free

                @pl.when((step > 0) & (step - 1 + stages < steps))
                def _next():
                    fetch(step - 1 + stages, lax.rem(step - 1, stages))

            lax.fori_loop(0, steps, one, None)
            return sums_ref[...]

        is_int = jnp.issubdtype(x_smem.dtype, jnp.integer)
        sums = pl.run_scoped(multiply, plgpu.ACC(out_smem.shape, jnp.int32 if is_int else jnp.float32))
        out_smem[...] = sums.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out.at[outs, rows] if turned else out.at[rows, outs])
        plgpu.wait_smem_to_gmem(0)
