"""A block of bfloat16 keys and values as products of pairs want them (AVX512-BF16), half as wide as float32.

Dimension key
    U  keys of a block     H  head dimension     2  a pair: two elements side by side in one 32-bit word
"""

from pallas_kernels.cpu import tiles
from pallas_kernels.cpu import vectors as v

LINE = 64  # bytes in a cache line
_transpose = tiles.transpose_words()
_interleave = tiles.interleave_rows()


@v.inner
def narrow(line, rows, size):
    """float32 rows of this size become bfloat16 rows, end to end from the same address on."""
    for i in range(0, rows * size, v.LANES):
        v.store_v_bf16(line + 2 * i, v.load_v(line + 4 * i))


@v.inner
def unpack(places, following, offset, size, keys, block, k_HU2, v_UH2):
    """One head's keys to [H / 2, U, 2] and its values to [U / 2, H, 2].

    Meanwhile the following block is fetched, a little at a time: all at once would stall.

    Args:
        places, following: addresses of `block` addresses: where each token of this block, and of the next one, lies.
        offset: bytes from there to the head's key; its value follows.
        keys: how many are used, a multiple of LANES.
    """
    half = 2 * size
    tokens = max(1, 16 * 32 // size)  # to fetch beside each tile
    for u in range(0, keys, 16):
        for h in range(0, size, 32):
            _transpose(places + 8 * u, offset + 2 * h, k_HU2 + 4 * (h // 2 * block + u), 4 * block)
            for i in range(h * 16 // size, min(h * 16 // size + tokens, 16)):
                ahead = v.load_i64(following + 8 * (u + i)) + offset
                for line in range(0, 2 * half, LINE):
                    v.fetch(ahead + line)
    for u in range(0, keys, 2):
        first, second = v.load_i64(places + 8 * u) + offset + half, v.load_i64(places + 8 * u + 8) + offset + half
        for h in range(0, size, 32):
            _interleave(first + 2 * h, second + 2 * h, v_UH2 + 4 * (u // 2 * size + h))
