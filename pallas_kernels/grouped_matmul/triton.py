"""Grouped matmul on a GPU other than Hopper's: a Triton kernel over tiles of rows of one expert each.

A tile reads its rows where their tokens stand and writes their answers where they belong, so nothing is laid out before
or after; Triton's compiler makes asynchronous copies of the loads. Where experts have few rows each, as in decode
steps, tiles have 16 rows, the least that tensor cores multiply. Products of int8 are exact sums of int32.

Of int4 two weights share a byte, and stay together on the way: even inputs are multiplied with the lower halves, odd
ones with the upper. Weights become floats in registers.

Compared with the grouped GEMM of Triton's tutorials, which finds each tile's expert by a loop inside the kernel.

Dimension key
    T  tokens     R  rows, sorted by expert     I  inputs     O  outputs     E  experts     G  kernels     N  tiles
    J  groups of an int4 kernel's inputs     X  inputs of a block, or pairs of them
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.grouped_matmul.xla import experts_of, in_steps
from pallas_kernels.platform import is_past_tritons_offsets

ROWS, FEW_ROWS = 64, 16  # of a tile
OUTPUTS = (128, 64, 32, 16)  # of a tile: the first that divides a kernel's
BYTES = 128  # of a kernel's inputs that are multiplied at once, or half or a quarter of it
STAGES = 4  # blocks in flight: with a whole tile of 16-bit numbers 96 KiB


def refusal(rows_dtype, kernel_GOI, scale_GOJ=None) -> str | None:
    """Why the kernel cannot run this; None when it can."""
    (O, I), dtype = kernel_GOI.shape[1:], kernel_GOI.dtype
    if O % OUTPUTS[-1]:
        return f"{O} outputs are not whole blocks of {OUTPUTS[-1]}"
    num_bytes = kernel_GOI.size // (2 if dtype == jnp.int4 else 1)
    if dtype.itemsize == 1 and is_past_tritons_offsets(num_bytes):
        return f"kernels of {num_bytes} bytes are between 2 and 4 GiB"
    if dtype == jnp.int4:
        if rows_dtype not in (jnp.bfloat16, jnp.float16):
            return f"rows of {rows_dtype}; with int4 kernels it takes bfloat16 or float16"
        group = I // scale_GOJ.shape[-1]
        return None if group % 32 == 0 else f"groups of {group} inputs are not whole blocks of 32"
    if rows_dtype != dtype or dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8):
        return f"rows of {rows_dtype} and kernels of {dtype}; it takes both in bfloat16, float16, float32 or int8"
    least = BYTES // 4 // dtype.itemsize
    return f"{I} inputs are not whole blocks of {least}" if I % least else None


def multiply(
    x_TI, kernel_GOI, group_sizes_E, first, out_dtype,
    *, token_R=None, scale_EO=None, step_R1=None, scale_GOJ=None, offset_GOJ=None, interpret=False,
):  # fmt: skip
    """See `pallas_kernels.grouped_matmul`; first is the number of expert 0's kernel. Padding rows hold anything.

    Args:
        step_R1: of rows, as x_TI is of tokens.
    """
    (T, I), (_, O, _) = x_TI.shape, kernel_GOI.shape
    token_R = jnp.arange(T, dtype=jnp.int32) if token_R is None else token_R.astype(jnp.int32)
    R, E = len(token_R), len(group_sizes_E)
    rows = FEW_ROWS if R <= FEW_ROWS * E else ROWS
    tiles = Tiles.of(group_sizes_E, R, rows)
    kernel_N = jnp.minimum(tiles.expert_N, E - 1) + first
    tiles_N3 = jnp.stack([kernel_N, tiles.start_N, tiles.end_N], axis=1).astype(jnp.int32)
    outputs = next(size for size in OUTPUTS if O % size == 0)
    if scale_GOJ is not None:
        inputs, block = [*_pairs(x_TI), _packed(kernel_GOI), scale_GOJ, offset_GOJ], 16 if I % 64 else 32
        pairs_of_group = I // scale_GOJ.shape[-1] // 2
    else:
        inputs = [x_TI, kernel_GOI]
        widths = (BYTES // n // kernel_GOI.dtype.itemsize for n in (1, 2, 4))
        block, pairs_of_group = next(width for width in widths if I % width == 0), 0
    sums_dtype = out_dtype if scale_EO is None else jnp.int32
    tile = _Tile(rows, outputs, block, pairs_of_group)
    y_RO = pl.pallas_call(
        tile.body,
        grid=(len(tiles_N3), O // outputs),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (2 + len(inputs)),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((R, O), sums_dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=STAGES),
        interpret=interpret,
        name="grouped_matmul",
    )(tiles_N3, token_R, *inputs)
    return in_steps(y_RO, experts_of(group_sizes_E, R), scale_EO, step_R1).astype(out_dtype)


def _pairs(x_TI):
    """Even inputs, and odd ones."""
    x_TX2 = x_TI.reshape(len(x_TI), -1, 2)
    return x_TX2[..., 0], x_TX2[..., 1]


def _packed(kernel_GOI):
    """Int4 weights as bytes, of two inputs each: uint8[G, O, I / 2], the first in the lower half."""
    G, O, I = kernel_GOI.shape
    return lax.bitcast_convert_type(kernel_GOI.reshape(G, O, I // 2, 2), jnp.uint8)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The kernel for one tile and some outputs.

    Attributes:
        rows, outputs: of the tile.
        block: X.
        pairs_of_group: pairs of inputs that share an int4 weight's scale and offset; 0 of others.
    """

    rows: int
    outputs: int
    block: int
    pairs_of_group: int

    def body(self, tiles, tokens, *refs):
        *inputs, out = refs
        tile, column = pl.program_id(0), pl.program_id(1)
        number, start, end = (plt.load(tiles.at[tile, jnp.int32(i)]) for i in range(3))
        row_R = start + jnp.arange(self.rows, dtype=jnp.int32)
        output_O = column * self.outputs + jnp.arange(self.outputs, dtype=jnp.int32)
        is_mine_R1 = (row_R < end)[:, None]
        token_R = plt.load(tokens.at[row_R], mask=row_R < end, other=0)
        product = self.of_int4 if self.pairs_of_group else self.of_floats
        num_inputs = inputs[0].shape[1]

        def add(step, sums_RO):
            input_X = step * self.block + jnp.arange(self.block, dtype=jnp.int32)
            return sums_RO + product(token_R, is_mine_R1, number, output_O, input_X, *inputs)

        is_int = jnp.issubdtype(inputs[0].dtype, jnp.integer)
        nothing = jnp.zeros((self.rows, self.outputs), jnp.int32 if is_int else jnp.float32)
        steps = jnp.where(start < end, jnp.int32(num_inputs // self.block), jnp.int32(0))
        sums_RO = lax.fori_loop(jnp.int32(0), steps, add, nothing)
        at = out.at[row_R[:, None], output_O[None]]
        plt.store(at, sums_RO.astype(out.dtype), mask=jnp.broadcast_to(is_mine_R1, sums_RO.shape))

    def of_floats(self, token_R, is_mine_R1, number, output_O, input_X, x, kernel):
        x_RX = plt.load(x.at[token_R[:, None], input_X[None]], mask=is_mine_R1, other=0)
        kernel_OX = plt.load(kernel.at[number, output_O[:, None], input_X[None]])
        return dot(x_RX, kernel_OX)

    def of_int4(self, token_R, is_mine_R1, number, output_O, input_X, even, odd, kernel, scale, offset):
        bytes_OX = plt.load(kernel.at[number, output_O[:, None], input_X[None]]).astype(jnp.int32)
        group_X = lax.div(input_X, self.pairs_of_group)
        scale_OX, offset_OX = (
            plt.load(of.at[number, output_O[:, None], group_X[None]]).astype(jnp.float32) for of in (scale, offset)
        )
        # Shifts of a signed number carry its sign.
        halves = (bytes_OX << 28) >> 28, (bytes_OX << 24) >> 28
        total = 0
        for x, half_OX in zip((even, odd), halves, strict=True):
            x_RX = plt.load(x.at[token_R[:, None], input_X[None]], mask=is_mine_R1, other=0)
            total += dot(x_RX, (half_OX.astype(jnp.float32) * scale_OX + offset_OX).astype(x_RX.dtype))
        return total


def dot(x_RX, kernel_OX):
    """Their products summed: int32 of int8, else float32."""
    precision = lax.Precision.HIGHEST if x_RX.dtype == jnp.float32 else None
    return plt.dot(x_RX, kernel_OX, trans_b=True, precision=precision)
