"""Products of tokens with int4 weights in panels, in groups with a scale and an offset: widened in registers.

Half a byte a weight is all that is read of memory. A register has a word, eight inputs, of each of LANES outputs, and a
group's scales and offsets stand in the same order: in three instructions a weight becomes the float32 it stands for,
and every token of a tile is multiplied by it. A sum takes its products in the inputs' order, whatever the tile.
"""

import functools

from llvmlite import ir
from numba import types

from pallas_kernels.cpu import tiles
from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.panels import LINE, OUTS, VECTORS, by_tokens
from pallas_kernels.cpu.vectors import F32, I64, LANES, VF32, VI32

GROUP = 32  # inputs
WORD = 8  # inputs
# Tokens a tile: sums of two registers each, beside weights, their words, scales and offsets, in 32 registers or in 16.
TILES = (8, 4, 2, 1) if LANES == 16 else (4, 2, 1)
DEPTH = 1024  # inputs at a time: a tile's tokens then fit the first level of caches


@functools.cache
def _tile(rows):
    """y[m, o] (+)= sum over k of x[m, k] * (w[o, k] * scale[o, group of k] + offset[o, group of k]), for a panel of w.

    The op takes (x, x_stride, w, scales, offsets, count, y, y_stride, more, fetch): addresses, strides in bytes, count
    the inputs, whole groups; y is added to when more is 1, overwritten when it is 0. Scales and offsets are bfloat16, a
    group's side by side. What lies at fetch is brought near meanwhile, as many bytes as the panel has.
    """
    words_of_group = GROUP // WORD

    def tile(b, x, x_stride, w, scales, offsets, count, y, y_stride, more, fetch):
        x_rows, y_rows = tiles.steps(b, x, x_stride, rows), tiles.steps(b, y, y_stride, rows)
        places = [b.add(row, ir.Constant(I64, n * v.WIDTH)) for row in y_rows for n in range(VECTORS)]
        adds = b.icmp_signed("!=", more, ir.Constant(I64, 0))
        start = [b.select(adds, v.load(b, place, VF32, 4), v.constant(VF32, 0.0)) for place in places]

        @tiles.loop(b, b.sdiv(count, ir.Constant(I64, WORD)), start, 1)
        def sums(word, state):
            at_w = b.mul(word, ir.Constant(I64, 4 * OUTS))
            for line in range(0, 4 * OUTS, LINE):
                v.prefetch(b, b.add(b.add(fetch, at_w), ir.Constant(I64, line)), level=2)
            at_group = b.mul(b.sdiv(word, ir.Constant(I64, words_of_group)), ir.Constant(I64, 2 * OUTS))
            words = [v.load(b, b.add(b.add(w, at_w), ir.Constant(I64, n * v.WIDTH)), VI32, 4) for n in range(VECTORS)]
            steps, zeros = (
                [
                    v.load_wide(b, b.add(b.add(of, at_group), ir.Constant(I64, 2 * LANES * n)), "bf16", LANES)
                    for n in range(VECTORS)
                ]
                for of in (scales, offsets)
            )
            totals, at_x = list(state), b.mul(word, ir.Constant(I64, 4 * WORD))
            for i in range(WORD):
                at = b.add(at_x, ir.Constant(I64, 4 * i))
                load_x = [lambda row=row, at=at: v.spread(b, v.load(b, b.add(row, at), F32, 4)) for row in x_rows]
                load_w = [
                    lambda n=n, i=i: v.fused(b, _nibbles(b, words[n], i), steps[n], zeros[n]) for n in range(VECTORS)
                ]
                tiles.add_outer(b, totals, load_x, load_w, v.fused)
            return totals

        for place, value in zip(places, sums, strict=True):
            v.store(b, value, place, 4)

    tile.__name__ = f"grouped_{rows}"
    return v.op(types.none, *[types.intp] * 10)(tile)


def _nibbles(b, words, i):
    """The i-th four bits of each word, signed, as float32."""
    if LANES == 16:  # looked up in a register: of an index only the four lowest bits count
        table = ir.Constant(VF32, [float(n) for n in (*range(8), *range(-8, 0))])
        index = b.lshr(words, v.constant(VI32, 4 * i))
        return v.call(b, "llvm.x86.avx512.permvar.sf.512", VF32, table, index)
    bits = b.shl(words, v.constant(VI32, 28 - 4 * i))
    return b.sitofp(b.ashr(bits, v.constant(VI32, 28)), VF32)


_product = by_tokens(_tile, TILES)


@v.inner
def multiply(rows, x, x_stride, w, scales, offsets, inputs, y, y_stride, fetch):
    """Any number of tokens times a panel; see `_tile`."""
    m = 0
    while m < rows:
        size = _tile_rows(rows - m)
        for k in range(0, inputs, DEPTH):
            group = k // GROUP * 2 * OUTS
            _product(
                size, x + m * x_stride + 4 * k, x_stride, w + k // WORD * 4 * OUTS, scales + group, offsets + group,
                min(DEPTH, inputs - k), y + m * y_stride, y_stride, min(k, 1), fetch + k // WORD * 4 * OUTS,
            )  # fmt: skip
        m += size


@v.inner
def _tile_rows(left):
    for size in TILES:
        if left >= size:
            return size
    return 1
