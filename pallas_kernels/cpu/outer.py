"""A few rows times a matrix that lies in the cache: c[rows, columns] (+)= a[rows, count] @ b[count, columns].

A sum walks `count` in order, whatever the rows beside it, so its bits depend on its own row alone.
"""

import functools

from pallas_kernels.cpu import tiles
from pallas_kernels.cpu import vectors as v


def _panel(tile, rows, vectors):
    """Compiles the product of `rows` rows with any number of columns, a multiple of LANES."""
    wide, single = tile(rows, vectors), tile(rows, 1)

    @v.inner
    def panel(a, a_stride, b, b_stride, count, columns, c, c_stride, more):
        n = 0
        while n + vectors * v.LANES <= columns:
            wide(a, a_stride, b + 4 * n, b_stride, count, c + 4 * n, c_stride, more)
            n += vectors * v.LANES
        while n < columns:
            single(a, a_stride, b + 4 * n, b_stride, count, c + 4 * n, c_stride, more)
            n += v.LANES

    return panel


def _any_rows(tile, shapes):
    """Compiles the product for any number of rows: tiles of 6, 4, 3, 2 and 1 rows, by so many registers each."""
    six, four, three, two, one = (_panel(tile, rows, vectors) for rows, vectors in shapes)

    @v.inner
    def product(rows, a, a_stride, b, b_stride, count, columns, c, c_stride, more):
        while rows >= 6:
            six(a, a_stride, b, b_stride, count, columns, c, c_stride, more)
            a, c, rows = a + 6 * a_stride, c + 6 * c_stride, rows - 6
        if rows == 4:
            four(a, a_stride, b, b_stride, count, columns, c, c_stride, more)
            return
        if rows >= 3:
            three(a, a_stride, b, b_stride, count, columns, c, c_stride, more)
            a, c, rows = a + 3 * a_stride, c + 3 * c_stride, rows - 3
        if rows == 2:
            two(a, a_stride, b, b_stride, count, columns, c, c_stride, more)
        elif rows == 1:
            one(a, a_stride, b, b_stride, count, columns, c, c_stride, more)

    return product


floats = _any_rows(tiles.outer_tile, [(6, 2), (4, 2), (3, 4), (2, 4), (1, 8)])
# An element of b is a pair of bfloat16, and count is of pairs: of a, two float32.
halves = _any_rows(tiles.outer_tile_halves, [(6, 2), (4, 2), (3, 4), (2, 4), (1, 4)])
# So is an element of a. Never called where the CPU has no such product, or a slow one.
_pair_tile = functools.partial(tiles.outer_tile, pairs=True)
pairs = _any_rows(_pair_tile, [(6, 4), (4, 4), (3, 4), (2, 4), (1, 4)]) if v.MULTIPLIES_PAIRS else halves
