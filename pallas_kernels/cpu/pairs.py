"""A block of bfloat16 keys and values in words of two, half as wide as float32, and what comes next fetched meanwhile.

Dimension key
    U  keys of a block     H  head dimension     2  a pair: two elements side by side in one 32-bit word
"""

from pallas_kernels.cpu import tiles
from pallas_kernels.cpu import vectors as v

LINE = 64  # bytes in a cache line
WIDE = 2 * v.LANES  # elements of 16 bits in a register
# Of the tokens that a head's turn fetches: what is fetched until keys, values, scores and weights are done, in 1/64.
AFTER_KEYS, AFTER_VALUES, AFTER_SCORES, AFTER_WEIGHTS = 24, 40, 44, 60
_transpose = tiles.transpose_words()
_interleave = tiles.interleave_rows()


@v.inner
def narrow(line, rows, size):
    """float32 rows of this size become bfloat16 rows, end to end from the same address on."""
    for i in range(0, rows * size, v.LANES):
        v.store_v_bf16(line + 2 * i, v.load_v(line + 4 * i))


@v.inner
def fetch(following, offset, num_bytes, first, end):
    """Starts to fetch tokens [first, end) of a block, of each num_bytes from an offset on.

    In memory's order, and to the second level: half as fast again as to the first, head by head (Zen 4, 2026).
    """
    for i in range(first, end):
        token = v.load_i64(following + 8 * i) + offset
        for line in range(0, num_bytes, LINE):
            v.fetch_for_later(token + line)


@v.inner
def unpack(places, following, offset, size, keys, block, k_HU2, v_UH2, fetched, num_bytes, first, middle, end):
    """One head's keys to [H / 2, U, 2] and its values to [U / 2, H, 2].

    Meanwhile tokens of the following block are fetched, a few at a time: all at once would stall.

    Args:
        places, following: addresses of `block` addresses: where each token of this block, and of the next one, lies.
        offset: bytes from there to the head's key; its value follows.
        keys: how many are used, a multiple of LANES.
        fetched, num_bytes: see `fetch`, there called offset and so on.
        first, middle, end: tokens [first, middle) are fetched beside the keys, [middle, end) beside the values.
    """
    half = 2 * size
    # Where fetching is, in 1/256 of a token.
    at, step = 256 * first, 256 * (middle - first) // (keys // v.LANES * (size // WIDE))
    for u in range(0, keys, v.LANES):
        for h in range(0, size, WIDE):
            _transpose(places + 8 * u, offset + 2 * h, k_HU2 + 4 * (h // 2 * block + u), 4 * block)
            if at // 256 < (at + step) // 256:
                fetch(following, fetched, num_bytes, at // 256, (at + step) // 256)
            at += step
    step = (256 * end - at) // (keys // 2)
    for u in range(0, keys, 2):
        if at // 256 < (at + step) // 256:
            fetch(following, fetched, num_bytes, at // 256, (at + step) // 256)
        at += step
        first, second = v.load_i64(places + 8 * u) + offset + half, v.load_i64(places + 8 * u + 8) + offset + half
        for h in range(0, size, WIDE):
            _interleave(first + 2 * h, second + 2 * h, v_UH2 + 4 * (u // 2 * size + h))
    fetch(following, fetched, num_bytes, at // 256, end)
