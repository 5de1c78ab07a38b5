"""Register tiles: the innermost loops of matrix products, written out in LLVM so that nothing spills.

Every output has an accumulator of its own that walks the contraction in order, so its bits depend on the
contraction's length alone: never on the tile it fell into or on its neighbours.
"""

import functools

from llvmlite import ir
from numba import types

from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.vectors import F32, I64, LANES, VF32, VI16, VI32

PREFETCH_BYTES = 8192  # how far ahead of a narrow tile's weights


def steps(b, address, stride, count):
    """address, address + stride, ...: count of them."""
    addresses = [address]
    for _ in range(count - 1):
        addresses.append(b.add(addresses[-1], stride))
    return addresses


def loop(b, count, start, step):
    """Emits `for i in range(0, count, step): state = body(i, state)`; a decorator for body. Returns its last state.

    Runs at least once.
    """

    def emit(body):
        before, block = b.block, b.append_basic_block("tile")
        b.branch(block)
        b.position_at_end(block)
        index = b.phi(I64)
        state = [b.phi(value.type) for value in start]
        index.add_incoming(ir.Constant(I64, 0), before)
        for phi, value in zip(state, start, strict=True):
            phi.add_incoming(value, before)
        after = body(index, state)
        following = b.add(index, ir.Constant(I64, step))
        index.add_incoming(following, b.block)
        for phi, value in zip(state, after, strict=True):
            phi.add_incoming(value, b.block)
        done = b.append_basic_block("tile_done")
        b.cbranch(b.icmp_signed("<", following, count), block, done)
        b.position_at_end(done)
        return after

    return emit


@functools.cache
def dot_tile(rows, outs, bf16):
    """y[m, o] (+)= sum over k of x[m, k] * w[o, k], for `rows` rows of float32 x and `outs` rows of w.

    The op takes (x, x_stride, w, w_stride, count, y, y_stride, more): addresses, strides in bytes, count a multiple
    of LANES; y is added to when more is 1 and overwritten when it is 0.
    """

    def tile(b, x, x_stride, w, w_stride, count, y, y_stride, more):
        x_rows, w_rows = steps(b, x, x_stride, rows), steps(b, w, w_stride, outs)
        zero = v.constant(VF32, 0.0)
        # The next tile's weights lie behind this one's: fetched meanwhile, memory and arithmetic overlap.
        following = b.add(w_rows[-1], w_stride)

        @loop(b, count, [zero] * (rows * outs), LANES)
        def sums(k, state):
            at_x = b.shl(k, ir.Constant(I64, 2))
            at_w = b.shl(k, ir.Constant(I64, 1)) if bf16 else at_x
            v.prefetch(b, b.add(following, b.mul(at_w, ir.Constant(I64, outs))))
            ws = [v.load(b, b.add(row, at_w), VI16 if bf16 else VF32, 2) for row in w_rows]
            ws = [v.widen_bf16(b, each) if bf16 else each for each in ws]
            after = list(state)
            for m, row in enumerate(x_rows):
                value = v.load(b, b.add(row, at_x), VF32, 4)
                for o, weight in enumerate(ws):
                    after[m * outs + o] = v.fused(b, value, weight, state[m * outs + o])
            return after

        _store_sums(b, [v.fold(b, each, b.fadd) for each in sums], y, y_stride, rows, outs, more)

    tile.__name__ = f"dot_{rows}x{outs}_{'bf16' if bf16 else 'f32'}"
    return v.op(types.none, *[types.intp] * 8)(tile)


@functools.cache
def dot_tile_i8(rows, outs):
    """As `dot_tile` for int8 x and w in [-127, 127], count a multiple of 32; exact, for AVX2."""
    bytes_, longs = (ir.VectorType(ir.IntType(bits), 256 // bits) for bits in (8, 32))

    def tile(b, x, x_stride, w, w_stride, count, y, y_stride, more):
        x_rows, w_rows = steps(b, x, x_stride, rows), steps(b, w, w_stride, outs)

        following = b.add(w_rows[-1], w_stride)

        @loop(b, count, [v.constant(longs, 0)] * (rows * outs), 32)
        def sums(k, state):
            v.prefetch(b, b.add(following, b.mul(k, ir.Constant(I64, outs))))
            weights = [v.load(b, b.add(row, k), bytes_, 1) for row in w_rows]
            sizes = [v.call(b, "llvm.abs.v32i8", bytes_, each, ir.Constant(ir.IntType(1), 0)) for each in weights]
            after = list(state)
            for m, row in enumerate(x_rows):
                value = v.load(b, b.add(row, k), bytes_, 1)
                for o in range(outs):
                    fours = multiply_fours(b, sizes[o], weights[o], value)
                    after[m * outs + o] = b.add(state[m * outs + o], fours)
            return after

        totals = [b.sitofp(v.fold(b, each, b.add), F32) for each in sums]
        _store_sums(b, totals, y, y_stride, rows, outs, more)

    tile.__name__ = f"dot_{rows}x{outs}_i8"
    return v.op(types.none, *[types.intp] * 8)(tile)


def multiply_fours(b, sizes, weights, x):
    """Sums of four products each of int8 x and weights, whose absolute values are sizes, in int32 (AVX2).

    The instruction multiplies unsigned by signed and adds pairs in 16 bits: |w| by x with w's sign, which fits.
    """
    words, longs = (ir.VectorType(ir.IntType(bits), 256 // bits) for bits in (16, 32))
    signed = v.call(b, "llvm.x86.avx2.psign.b", x.type, x, weights)
    pairs = v.call(b, "llvm.x86.avx2.pmadd.ub.sw", words, sizes, signed)
    return v.call(b, "llvm.x86.avx2.pmadd.wd", longs, pairs, v.constant(words, 1))


@functools.cache
def dot_tile_pairs(rows, outs):
    """As `dot_tile` for bfloat16 x and w, count a multiple of 32, by products of pairs (AVX512-BF16)."""

    step = lambda b, total, x, w: add_pairs(b, x, w, total)
    return _narrow_tile(rows, outs, f"dot_{rows}x{outs}_pairs", v.constant(VF32, 0.0), step)


def add_pairs(b, x, y, total):
    """total + x[2 i] * y[2 i] + x[2 i + 1] * y[2 i + 1], for registers of bfloat16."""
    return v.call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF32, total, b.bitcast(x, v.VBF16), b.bitcast(y, v.VBF16))


@functools.cache
def dot_tile_bytes(rows, outs):
    """As `dot_tile` for x in [1, 255] that stands for x - 128, and int8 w, count a multiple of 64; exact (AVX512-VNNI).

    The instruction multiplies unsigned by signed. What 128 times w adds up to is taken off again.
    """

    def step(b, total, x, w):
        return v.call(b, "llvm.x86.avx512.vpdpbusd.512", VI32, total, x, w)

    shift = v.constant(VI32, -0x7F7F7F80)  # four bytes of 128
    return _narrow_tile(rows, outs, f"dot_{rows}x{outs}_bytes", v.constant(VI32, 0), step, shift)


def _narrow_tile(rows, outs, name, zero, step, shift=None):
    """A tile of whole registers of x and of w, both narrower than 32 bits; count is in bytes.

    Args:
        step: (builder, total, x, w) -> total, for a register of each.
        shift: an x whose product with the weights is taken off every sum.
    """

    def tile(b, x, x_stride, w, w_stride, count, y, y_stride, more):
        x_rows, w_rows = steps(b, x, x_stride, rows), steps(b, w, w_stride, outs)
        # Rows side by side are no stream that the processor would recognise: what comes is fetched in its order.
        lines = [ir.Constant(I64, PREFETCH_BYTES + v.WIDTH * o) for o in range(outs)] if outs > 1 else []
        num_shifts = outs if shift is not None else 0

        @loop(b, count, [zero] * (rows * outs + num_shifts), v.WIDTH)
        def sums(k, state):
            for line in lines:
                v.prefetch(b, b.add(b.add(w, line), b.mul(k, ir.Constant(I64, outs))))
            weights = [v.load(b, b.add(row, k), VI32, 1) for row in w_rows]
            after = list(state)
            for m, row in enumerate(x_rows):
                value = v.load(b, b.add(row, k), VI32, 1)
                for o, weight in enumerate(weights):
                    after[m * outs + o] = step(b, state[m * outs + o], value, weight)
            for o in range(num_shifts):
                after[rows * outs + o] = step(b, state[rows * outs + o], shift, weights[o])
            return after

        if num_shifts:
            sums = [b.sub(total, sums[rows * outs + i % outs]) for i, total in enumerate(sums[: rows * outs])]
        y_rows = steps(b, y, y_stride, rows)
        adds = b.icmp_signed("!=", more, ir.Constant(I64, 0))
        # Four rows by four outputs at a time: a row's outputs come out side by side.
        for m in range(0, rows, 4):
            for o in range(0, outs, 4):
                values = [ir.Constant(zero.type, ir.Undefined)] * 16
                for i in range(m, min(m + 4, rows)):
                    for j in range(o, min(o + 4, outs)):
                        values[4 * (j - o) + i - m] = sums[i * outs + j]
                total = v.totals(b, values)
                total = total if zero.type == VF32 else b.sitofp(total, VF32)
                for i in range(m, min(m + 4, rows)):
                    lanes = range(4 * (i - m), 4 * (i - m) + min(4, outs - o))
                    part = v.shuffle(b, total, total, lanes)
                    at_y = b.add(y_rows[i], ir.Constant(I64, 4 * o))
                    before = b.select(adds, v.load(b, at_y, part.type, 4), v.constant(part.type, 0.0))
                    v.store(b, b.fadd(part, before), at_y, 4)

    tile.__name__ = name
    return v.op(types.none, *[types.intp] * 8)(tile)


def _store_sums(b, sums, y, y_stride, rows, outs, more):
    adds = b.icmp_signed("!=", more, ir.Constant(I64, 0))
    for m, row in enumerate(steps(b, y, y_stride, rows)):
        for o in range(outs):
            at_y = b.add(row, ir.Constant(I64, 4 * o))
            before = b.select(adds, v.load(b, at_y, F32, 4), ir.Constant(F32, 0.0))
            v.store(b, b.fadd(sums[m * outs + o], before), at_y, 4)


@functools.cache
def outer_tile(rows, vectors, pairs=False):
    """c[m, n] (+)= sum over k of a[m, k] * b[k, n], for `rows` rows and `vectors` registers of n, all float32.

    The op takes (a, a_stride, b, b_stride, count, c, c_stride, more), as `dot_tile` does. With pairs, an element of a
    and of b is a pair of bfloat16.
    """

    def add(b, totals, k, a_rows, matrix, b_stride):
        at_b, at_a = b.add(matrix, b.mul(k, b_stride)), b.shl(k, ir.Constant(I64, 2))
        load_a = [lambda row=row: v.spread(b, v.load(b, b.add(row, at_a), F32, 4)) for row in a_rows]
        load_b = [lambda n=n: v.load(b, b.add(at_b, ir.Constant(I64, n * v.WIDTH)), VF32, 4) for n in range(vectors)]
        add_outer(b, totals, load_a, load_b, add_pairs if pairs else v.fused)

    return _outer_tile(rows, vectors, f"outer_{rows}x{vectors}{'_pairs' if pairs else ''}", add)


@functools.cache
def outer_tile_halves(rows, vectors):
    """As `outer_tile` for float32 a of two elements a k, and b of words of two bfloat16: b[k, n] is a pair."""

    def add(b, totals, k, a_rows, matrix, b_stride):
        at_b, again = (b.add(at, b.mul(k, b_stride)) for at in (matrix, b.add(matrix, hidden_zero(b, a_rows[0]))))
        at_a = b.shl(k, ir.Constant(I64, 3))
        add_halves(b, totals, [b.add(row, at_a) for row in a_rows], [at_b, again])

    return _outer_tile(rows, vectors, f"outer_{rows}x{vectors}_halves", add)


def _outer_tile(rows, vectors, name, add):
    """A tile of c; add(builder, totals, k, a_rows, b, b_stride) adds the products of a k, in place."""

    def tile(b, a, a_stride, matrix, b_stride, count, c, c_stride, more):
        a_rows, c_rows = steps(b, a, a_stride, rows), steps(b, c, c_stride, rows)
        adds = b.icmp_signed("!=", more, ir.Constant(I64, 0))
        places = [b.add(row, ir.Constant(I64, n * v.WIDTH)) for row in c_rows for n in range(vectors)]
        start = [b.select(adds, v.load(b, place, VF32, 4), v.constant(VF32, 0.0)) for place in places]

        @loop(b, count, start, 1)
        def sums(k, state):
            totals = list(state)
            add(b, totals, k, a_rows, matrix, b_stride)
            return totals

        for place, value in zip(places, sums, strict=True):
            v.store(b, value, place, 4)

    tile.__name__ = name
    return v.op(types.none, *[types.intp] * 8)(tile)


def add_halves(b, totals, x_rows, w_halves):
    """Adds, in place, products of words of two bfloat16 with the two float32 at each of the addresses x_rows.

    Args:
        w_halves: the address of the words, for their first elements and for their second ones: the same, but if LLVM
            knew it, it would load words once, run out of 16 registers and spill sums. See `hidden_zero`.
    """
    vectors = len(totals) // len(x_rows)
    for half, w in enumerate(w_halves):
        x_places = [b.add(row, ir.Constant(I64, 4 * half)) for row in x_rows]
        load_x = [lambda at=at: v.spread(b, v.load(b, at, F32, 4)) for at in x_places]
        w_places = [b.add(w, ir.Constant(I64, n * v.WIDTH)) for n in range(vectors)]
        load_w = [lambda at=at, half=half: _half_of_words(b, at, half) for at in w_places]
        add_outer(b, totals, load_x, load_w, v.fused)


def _half_of_words(b, address, half):
    """The first or second bfloat16 of each word of a register, as float32."""
    words = v.load(b, address, VI32, 4)
    bits = b.and_(words, v.constant(VI32, -65536)) if half else b.shl(words, v.constant(VI32, 16))
    return b.bitcast(bits, VF32)


def hidden_zero(b, address):
    """0, which LLVM does not know: no address is that high."""
    return b.lshr(address, ir.Constant(I64, 62))


def add_outer(b, totals, load_x, load_w, step):
    """totals[m, n] = step(x[m], w[n], totals[m, n]), in place: the fewer stay in registers, the others pass by."""
    vectors = len(load_w)
    if len(load_x) <= vectors:
        values = [load() for load in load_x]
        for n, load in enumerate(load_w):
            weight = load()
            for m, value in enumerate(values):
                totals[m * vectors + n] = step(b, value, weight, totals[m * vectors + n])
    else:
        weights = [load() for load in load_w]
        for m, load in enumerate(load_x):
            value = load()
            for n, weight in enumerate(weights):
                totals[m * vectors + n] = step(b, value, weight, totals[m * vectors + n])


@functools.cache
def transpose_tile(dtype):
    """Turns 8 elements of each of 8 rows into 8 float32 rows of 8.

    The op takes (rows, offset, target, stride): the address of 8 row addresses, the bytes into each, and where
    the columns go.
    """

    def tile(b, rows, offset, target, stride):
        lines = []
        for i in range(8):
            row = v.load(b, b.add(rows, ir.Constant(I64, 8 * i)), I64, 8)
            lines.append(v.load_wide(b, b.add(row, offset), dtype, 8))
        for low, high, apart in [
            ((0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15), 1),
            ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15), 2),
            ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15), 4),
        ]:
            after = list(lines)
            for i in range(8):
                if not i & apart:
                    after[i] = v.shuffle(b, lines[i], lines[i + apart], low)
                    after[i + apart] = v.shuffle(b, lines[i], lines[i + apart], high)
            lines = after
        for i, place in enumerate(steps(b, target, stride, 8)):
            v.store(b, lines[TRANSPOSED[i]], place, 4)

    tile.__name__ = f"transpose_{dtype}"
    return v.op(types.none, *[types.intp] * 4)(tile)


# Where each column ends up after the three exchanges: the first two work on pairs, so bits 0 and 1 trade places.
TRANSPOSED = [0, 2, 1, 3, 4, 6, 5, 7]


@functools.cache
def transpose_words():
    """Turns LANES words of 32 bits of each of LANES rows into LANES rows of LANES.

    The op takes (rows, offset, target, stride), as that of `transpose_tile` does.
    """

    def tile(b, rows, offset, target, stride):
        lines = []
        for i in range(LANES):
            row = v.load(b, b.add(rows, ir.Constant(I64, 8 * i)), I64, 8)
            lines.append(v.load(b, b.add(row, offset), VI32, 2))
        # Words, pairs and so on trade places: each time half of a row with half of the row `apart` from it.
        for apart in [1 << i for i in range(LANES.bit_length() - 1)]:
            low = [i if not i & apart else LANES + (i ^ apart) for i in range(LANES)]
            high = [i ^ apart if not i & apart else LANES + i for i in range(LANES)]
            after = list(lines)
            for i in range(LANES):
                if not i & apart:
                    after[i] = v.shuffle(b, lines[i], lines[i + apart], low)
                    after[i + apart] = v.shuffle(b, lines[i], lines[i + apart], high)
            lines = after
        for line, place in zip(lines, steps(b, target, stride, LANES), strict=True):
            v.store(b, line, place, 4)

    return v.op(types.none, *[types.intp] * 4)(tile)


@functools.cache
def interleave_rows():
    """The op (first, second, target) writes 2 LANES elements of 16 bits of two rows in turn: one of each."""
    size = 2 * LANES

    def tile(b, first, second, target):
        x, y = (v.load(b, row, ir.VectorType(v.I16, size), 2) for row in (first, second))
        for half in range(2):
            places = [i // 2 + LANES * half + size * (i % 2) for i in range(size)]
            v.store(b, v.shuffle(b, x, y, places), b.add(target, ir.Constant(I64, v.WIDTH * half)), 4)

    return v.op(types.none, *[types.intp] * 3)(tile)
