"""The CPU kernel for int4 weights in groups: tokens times weights that are widened in registers, two from a byte.

Half a byte a weight is all that is read of memory, which is what a decode step waits for. Tokens come as float32 with
the even and the odd inputs of each run of 2 LANES apart, since a register of bytes holds the one in its low halves and
the other in its high ones. A group's products are added up before its scale multiplies them, and its tokens before its
offset does.

An output's bits depend on its own token, its own weights and the number of inputs, and on nothing else.

Dimension key
    T  tokens     I  inputs     O  outputs     J  groups of inputs
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir
from numba import types

from pallas_kernels.cpu import ffi, threads, tiles
from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.vectors import I8, I16, I64, LANES, VF32, VI32

TARGET, CHUNK = "jax_serving_cpu_grouped_1", "jax_serving_cpu_grouped_chunk_1"
GROUP = 32  # inputs
BLOCK_OUTS, BLOCK_ROWS = 32, 64  # of a chunk
RUN = 2 * LANES  # inputs widened together

# The job: one int64 a field.
X, KERNEL, SCALE, OFFSET, Y, TOKENS, INPUTS, OUTPUTS, GROUPS, NUM_BLOCK_OUTS = range(0, 8 * 10, 8)
JOB_WORDS = 32  # float32 words of scratch

chunk_address = v.external(CHUNK)
_compiled = v.inner


def _halves(b, packed):
    """LANES bytes as two vectors of float32: their low halves, signed, and their high ones."""
    wide = b.sext(packed, VI32)
    four, most = v.constant(VI32, 4), v.constant(VI32, 28)
    return b.sitofp(b.ashr(b.shl(wide, most), most), VF32), b.sitofp(b.ashr(wide, four), VF32)


@functools.cache
def _tile(rows, outs):
    """y[m, o] = sum over groups j of scale[o, j] * sum of x[m, i] * w[o, i], and offset[o, j] * sum of x[m, i].

    The op takes (x, x_stride, w, w_stride, scales, offsets, s_stride, groups, y, y_stride): addresses, strides in
    bytes; scales and offsets are bfloat16.
    """

    def tile(b, x, x_stride, w, w_stride, scales, offsets, s_stride, groups, y, y_stride):
        x_rows, w_rows, s_rows, o_rows = (
            [b.add(start, b.mul(stride, ir.Constant(I64, i))) for i in range(count)]
            for start, stride, count in (
                (x, x_stride, rows), (w, w_stride, outs), (scales, s_stride, outs), (offsets, s_stride, outs),
            )
        )  # fmt: skip
        zero, following = v.constant(VF32, 0.0), b.add(w_rows[-1], w_stride)

        @tiles.loop(b, groups, [zero] * (rows * outs), 1)
        def sums(group, state):
            part, total = [zero] * (rows * outs), [zero] * rows
            first = b.mul(group, ir.Constant(I64, GROUP // RUN))
            v.prefetch(b, b.add(following, b.mul(first, ir.Constant(I64, LANES * outs))))
            for run in range(GROUP // RUN):
                at = b.mul(b.add(first, ir.Constant(I64, run)), ir.Constant(I64, LANES))
                weights = [_halves(b, v.load(b, b.add(row, at), ir.VectorType(I8, LANES), 1)) for row in w_rows]
                for m, row in enumerate(x_rows):
                    even = b.add(row, b.mul(at, ir.Constant(I64, 8)))
                    values = [v.load(b, b.add(even, ir.Constant(I64, half * v.WIDTH)), VF32, 4) for half in (0, 1)]
                    for value in values:
                        total[m] = b.fadd(total[m], value)
                    for o, pair in enumerate(weights):
                        for value, weight in zip(values, pair, strict=True):
                            part[m * outs + o] = v.fused(b, value, weight, part[m * outs + o])
            after = list(state)
            here = b.mul(group, ir.Constant(I64, 2))
            for o in range(outs):
                scale, offset = (
                    v.spread(b, _widened_bf16(b, v.load(b, b.add(of[o], here), I16, 2))) for of in (s_rows, o_rows)
                )
                for m in range(rows):
                    scaled = v.fused(b, part[m * outs + o], scale, state[m * outs + o])
                    after[m * outs + o] = v.fused(b, total[m], offset, scaled)
            return after

        for m in range(rows):
            line = b.add(y, b.mul(y_stride, ir.Constant(I64, m)))
            for o in range(outs):
                total = v.fold(b, sums[m * outs + o], b.fadd)
                v.store(b, total, b.add(line, ir.Constant(I64, 4 * o)), 4)

    tile.__name__ = f"grouped_{rows}x{outs}"
    return v.op(types.none, *[types.intp] * 10)(tile)


def _widened_bf16(b, bits):
    return b.bitcast(b.shl(b.zext(bits, v.I32), ir.Constant(v.I32, 16)), v.F32)


def _panel(rows, outs):
    """Compiles the product of `rows` tokens with any number of weight rows, `outs` of them at a time."""
    wide, single = _tile(rows, outs), _tile(rows, 1)

    @_compiled
    def panel(x, x_stride, w, w_stride, scales, offsets, s_stride, groups, num_outs, y, y_stride):
        o = 0
        while o < num_outs:
            weights, steps, starts, target = w + o * w_stride, scales + o * s_stride, offsets + o * s_stride, y + 4 * o
            if o + outs <= num_outs:
                wide(x, x_stride, weights, w_stride, steps, starts, s_stride, groups, target, y_stride)
                o += outs
            else:
                single(x, x_stride, weights, w_stride, steps, starts, s_stride, groups, target, y_stride)
                o += 1

    return panel


_four, _one = _panel(4, 2), _panel(1, 4)


@_compiled
def _chunk(job, chunk, thread):
    inputs, outputs, groups = v.load_i64(job + INPUTS), v.load_i64(job + OUTPUTS), v.load_i64(job + GROUPS)
    token = chunk // v.load_i64(job + NUM_BLOCK_OUTS) * BLOCK_ROWS
    o = chunk % v.load_i64(job + NUM_BLOCK_OUTS) * BLOCK_OUTS
    rows, outs = min(BLOCK_ROWS, v.load_i64(job + TOKENS) - token), min(BLOCK_OUTS, outputs - o)
    x_stride, w_stride, s_stride, y_stride = 4 * inputs, inputs // 2, 2 * groups, 4 * outputs
    w, scales = v.load_i64(job + KERNEL) + o * w_stride, v.load_i64(job + SCALE) + o * s_stride
    offsets = v.load_i64(job + OFFSET) + o * s_stride
    m = 0
    while m < rows:
        x = v.load_i64(job + X) + (token + m) * x_stride
        y = v.load_i64(job + Y) + (token + m) * y_stride + 4 * o
        if m + 4 <= rows:
            _four(x, x_stride, w, w_stride, scales, offsets, s_stride, groups, outs, y, y_stride)
            m += 4
        else:
            _one(x, x_stride, w, w_stride, scales, offsets, s_stride, groups, outs, y, y_stride)
            m += 1
    return 0


@_compiled
def _start(frame):
    """Arguments: x, kernel, scales, offsets, num_tokens; results: y, scratch."""
    y, job = ffi.result(frame, 0), ffi.data(ffi.result(frame, 1))
    for i in range(4):
        v.store_i64(job + (X, KERNEL, SCALE, OFFSET)[i], ffi.data(ffi.argument(frame, i)))
    v.store_i64(job + Y, ffi.data(y))
    tokens = min(v.load_i32(ffi.data(ffi.argument(frame, 4))), ffi.dim(y, 0))
    num_block_outs = (ffi.dim(y, 1) + BLOCK_OUTS - 1) // BLOCK_OUTS
    v.store_i64(job + TOKENS, tokens)
    v.store_i64(job + INPUTS, ffi.dim(ffi.argument(frame, 1), 1))
    v.store_i64(job + OUTPUTS, ffi.dim(y, 1))
    v.store_i64(job + GROUPS, ffi.dim(ffi.argument(frame, 2), 1))
    v.store_i64(job + NUM_BLOCK_OUTS, num_block_outs)
    blocks = (tokens + BLOCK_ROWS - 1) // BLOCK_ROWS
    threads.run(chunk_address(), job, blocks * num_block_outs, ffi.int_in(frame, 0, 0))


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def chunk(job, index, thread):
    return _chunk(job, index, thread)


def supports(kernel_OI, scale_OJ) -> bool:
    return kernel_OI.shape[-1] == GROUP * scale_OJ.shape[-1] and scale_OJ.dtype == jnp.bfloat16


def multiply(x_TI, kernel_OI, scale_OJ, offset_OJ, num_tokens, *, num_threads):
    """float32[T, O]: x times an int4 kernel in groups of GROUP; rows at or past num_tokens hold anything."""
    T, I = x_TI.shape
    # Even inputs of a run before its odd ones.
    x_TI = x_TI.astype(jnp.float32).reshape(T, I // RUN, LANES, 2).swapaxes(2, 3).reshape(T, I)
    y_TO, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((T, kernel_OI.shape[0]), jnp.float32),
            jax.ShapeDtypeStruct((JOB_WORDS,), jnp.float32),
        ],
    )(
        x_TI,
        kernel_OI,
        scale_OJ,
        offset_OJ,
        jnp.int32(T) if num_tokens is None else num_tokens,
        threads=np.array([num_threads], np.int32),
    )
    return y_TO
