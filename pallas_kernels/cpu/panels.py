"""Products of a few tokens with weights in panels: a few registers of outputs, against a tile of tokens.

A panel is read once for a tile of tokens. What a register of weights holds belongs to as many outputs as it has words,
so sums stay where they are and none has to be folded; a sum takes its products in the inputs' order, whatever the tile.
"""

import functools

from llvmlite import ir
from numba import types

from pallas_kernels.cpu import tiles
from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.ffi import BF16
from pallas_kernels.cpu.vectors import I64, VF32, VI32

VECTORS = 2  # registers of outputs
OUTS = VECTORS * v.LANES
LINE = 64  # bytes in a cache line
# Tokens a tile: two sums each, beside the weights and one token's word, in 32 registers or in 16.
TILES = (12, 8, 6, 4, 3, 2, 1) if v.LANES == 16 else (6, 4, 3, 2, 1)
HAS_BYTES = v.HAS_BYTE_DOT or (v.HAS_AVX2 and v.LANES == 8)  # whether there is a product of int8
MOST_OF_BYTES = TILES[0] if v.HAS_BYTE_DOT else 4  # of int8, whose weights and their sizes take registers too
DEPTH_BYTES = 2048  # of a token's inputs at a time: a tile's tokens then fit the first level of caches
CHUNK_BYTES = 32768  # of weights that a thread claims at a time: the less, the sooner all threads are done


@functools.cache
def panel_tile_pairs(rows):
    """y[m, o] (+)= sum over k of x[m, k] * w[o, k], for `rows` rows of bfloat16 x and a panel of w (AVX512-BF16).

    The op takes (x, x_stride, w, count, y, y_stride, more, fetch, fetch_step): addresses, a row's stride in bytes,
    count the bytes of a row of x, y and more as `dot_tile` has them. What lies at `fetch` is brought near meanwhile,
    fetch_step bytes a word of x. Every output's products are added in their order, one pair after the other.
    """
    step = _by_words(lambda b, total, x, w: tiles.add_pairs(b, x, w, total))
    return _panel_tile(rows, f"panel_{rows}_pairs", VF32, step)


@functools.cache
def panel_tile_bytes(rows):
    """As `panel_tile_pairs` for x in [1, 255] that stands for x - 128, and int8 w; exact (AVX512-VNNI)."""

    def add(b, total, x, w):
        return v.call(b, "llvm.x86.avx512.vpdpbusd.512", VI32, total, x, w)

    shift = lambda b, total, word: add(b, total, v.constant(VI32, -0x7F7F7F80), word)
    return _panel_tile(rows, f"panel_{rows}_bytes", VI32, _by_words(add), shift)


@functools.cache
def panel_tile_signed(rows):
    """As `panel_tile_pairs` for int8 x and w in [-127, 127]; exact, for AVX2. See `tiles.dot_tile_i8`."""
    bytes_ = ir.VectorType(v.I8, 32)

    def with_sizes(b, word):
        weights = b.bitcast(word, bytes_)
        return v.call(b, "llvm.abs.v32i8", bytes_, weights, ir.Constant(ir.IntType(1), 0)), weights

    def add(b, total, x, w):
        return b.add(total, tiles.multiply_fours(b, *w, b.bitcast(x, bytes_)))

    return _panel_tile(rows, f"panel_{rows}_signed", VI32, _by_words(add, with_sizes))


def _by_words(add, prepared=lambda b, word: word):
    """A step that adds products of whole words: add(builder, total, x, prepared(builder, w)) -> total."""

    def step(b, totals, x_rows, k, w):
        load_x = [lambda row=row: v.spread(b, v.load(b, b.add(row, k), v.I32, 4)) for row in x_rows]
        load_w = [lambda n=n: prepared(b, _word(b, w, n)) for n in range(VECTORS)]
        tiles.add_outer(b, totals, load_x, load_w, lambda b, x, w, total: add(b, total, x, w))

    return step


def _word(b, w, n):
    """The n-th register of words from an address on."""
    return v.load(b, b.add(w, ir.Constant(I64, n * v.WIDTH)), VI32, 4)


def _panel_tile(rows, name, sums_type, step, shift=None):
    """A tile of a panel.

    Args:
        step: (builder, totals, x_rows, k, w) adds the products of the words at w, byte k of a kernel's row, in place.
        shift: (builder, total, word) -> total, what is taken off every sum in the end.
    """

    def tile(b, x, x_stride, w, count, y, y_stride, more, fetch, fetch_step):
        x_rows, y_rows = tiles.steps(b, x, x_stride, rows), tiles.steps(b, y, y_stride, rows)
        places = [b.add(row, ir.Constant(I64, n * v.WIDTH)) for row in y_rows for n in range(VECTORS)]
        adds = b.icmp_signed("!=", more, ir.Constant(I64, 0))
        zero = v.constant(sums_type, 0 if sums_type == VI32 else 0.0)
        before = [b.select(adds, v.load(b, place, VF32, 4), v.constant(VF32, 0.0)) for place in places]
        start = [zero] * len(places) if sums_type == VI32 else before
        num_shifts = VECTORS if shift is not None else 0

        @tiles.loop(b, count, [*start, *[zero] * num_shifts, w, fetch], 4)
        def sums(k, state):
            *totals, at_w, at_fetch = state
            for line in range(0, 4 * OUTS, LINE):
                v.prefetch(b, b.add(at_fetch, ir.Constant(I64, line)), level=2)
            products = totals[: rows * VECTORS]
            step(b, products, x_rows, k, at_w)
            shifts = [shift(b, total, _word(b, at_w, n)) for n, total in enumerate(totals[rows * VECTORS :])]
            totals = products + shifts
            return [*totals, b.add(at_w, ir.Constant(I64, 4 * OUTS)), b.add(at_fetch, fetch_step)]

        for i, place in enumerate(places):
            total = sums[i]
            if num_shifts:
                total = b.sub(total, sums[rows * VECTORS + i % VECTORS])
            if sums_type == VI32:
                total = b.fadd(b.sitofp(total, VF32), before[i])
            v.store(b, total, place, 4)

    tile.__name__ = name
    return v.op(types.none, *[types.intp] * 9)(tile)


@functools.cache
def panel_tile_halves(rows):
    """As `panel_tile_pairs` for float32 x and bfloat16 w, whose words are widened half by half, on any CPU."""

    def step(b, totals, x_rows, k, w):
        at_x, again = b.shl(k, ir.Constant(I64, 1)), b.add(w, tiles.hidden_zero(b, x_rows[0]))
        tiles.add_halves(b, totals, [b.add(row, at_x) for row in x_rows], [w, again])

    return _panel_tile(rows, f"panel_{rows}_halves", VF32, step)


def by_tokens(tile, sizes):
    """Compiles the product of a panel with as many tokens as one of the sizes says: called with them and tile's own."""
    size, *others = sizes
    run = tile(size)
    other = by_tokens(tile, others) if others else None

    @v.inner
    def multiply(rows, *args):
        if other is None or rows == size:
            run(*args)
        else:
            other(rows, *args)

    return multiply


@v.inner
def _nothing(rows, x, x_stride, w, count, y, y_stride, more, fetch, fetch_step):
    """Stands where the CPU has no such product, and is never called."""


_bf16 = by_tokens(panel_tile_pairs if v.MULTIPLIES_PAIRS else panel_tile_halves, TILES)
_tile_of_bytes = panel_tile_bytes if v.HAS_BYTE_DOT else panel_tile_signed
_bytes = by_tokens(_tile_of_bytes, [size for size in TILES if size <= MOST_OF_BYTES]) if HAS_BYTES else _nothing


@v.inner
def _tile(dtype, left):
    """How many of the tokens left go into one tile."""
    for size in TILES:
        if left >= size and (dtype == BF16 or size <= MOST_OF_BYTES):
            return size
    return 1


@v.inner
def num_tiles(dtype, rows):
    count = 0
    while rows > 0:
        rows -= _tile(dtype, rows)
        count += 1
    return count


@v.inner
def multiply(dtype, rows, x, x_stride, w, count, y, y_stride, more, fetch, fetch_step):
    """Any number of tokens times a panel; see `panel_tile_pairs`. Each tile fetches on where that before it ended."""
    m = 0
    while m < rows:
        tile = _tile(dtype, rows - m)
        at_x, at_y = x + m * x_stride, y + m * y_stride
        if dtype == BF16:
            _bf16(tile, at_x, x_stride, w, count, at_y, y_stride, more, fetch, fetch_step)
        else:
            _bytes(tile, at_x, x_stride, w, count, at_y, y_stride, more, fetch, fetch_step)
        m += tile
        fetch += fetch_step * (count // 4)
