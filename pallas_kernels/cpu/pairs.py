"""A block of bfloat16 keys and values as products of pairs want them (AVX512-BF16), half as wide as float32.

Dimension key
    U  keys of a block     H  head dimension     2  a pair: two elements side by side in one 32-bit word
"""

from pallas_kernels.cpu import tiles
from pallas_kernels.cpu import vectors as v

LINE = 64  # bytes in a cache line
BESIDE_KEYS, FETCHED = 24, 40  # tokens of the following block that are fetched beside keys, and beside both
_transpose = tiles.transpose_words()
_interleave = tiles.interleave_rows()


@v.inner
def narrow(line, rows, size):
    """float32 rows of this size become bfloat16 rows, end to end from the same address on."""
    for i in range(0, rows * size, v.LANES):
        v.store_v_bf16(line + 2 * i, v.load_v(line + 4 * i))


@v.inner
def fetch(following, offset, num_bytes, block, turn, turns, first, end):
    """Starts to fetch what one of several turns brings of a block's tokens, each num_bytes from an offset on.

    In memory's order, and to the second level: half as fast again as to the first, head by head (Zen 4, 2026).

    Args:
        first, end: which part of the turn's share, in [0, block].
    """
    for i in range((turn * block + first) // turns, (turn * block + end) // turns):
        token = v.load_i64(following + 8 * i) + offset
        for line in range(0, num_bytes, LINE):
            v.fetch_for_later(token + line)


def unpack(places, following, offset, size, keys, block, k_HU2, v_UH2, fetched, num_bytes, turn, turns):
    """One head's keys to [H / 2, U, 2] and its values to [U / 2, H, 2].

    Meanwhile a part of the following block is fetched, a little at a time: all at once would stall.

    Args:
        places, following: addresses of `block` addresses: where each token of this block, and of the next one, lies.
        offset: bytes from there to the head's key; its value follows.
        keys: how many are used, a multiple of LANES.
        fetched, num_bytes, turn, turns: see `fetch`, there called offset and so on.
    """
    half = 2 * size
    num_tiles, tile = keys // 16 * ((size + 31) // 32), 0
    for u in range(0, keys, 16):
        for h in range(0, size, 32):
            _transpose(places + 8 * u, offset + 2 * h, k_HU2 + 4 * (h // 2 * block + u), 4 * block)
            first, end = tile * BESIDE_KEYS // num_tiles, (tile + 1) * BESIDE_KEYS // num_tiles
            fetch(following, fetched, num_bytes, block, turn, turns, first, end)
            tile += 1
    for u in range(0, keys, 2):
        left = FETCHED - BESIDE_KEYS
        first, end = BESIDE_KEYS + u * left // keys, BESIDE_KEYS + (u + 2) * left // keys
        fetch(following, fetched, num_bytes, block, turn, turns, first, end)
        first, second = v.load_i64(places + 8 * u) + offset + half, v.load_i64(places + 8 * u + 8) + offset + half
        for h in range(0, size, 32):
            _interleave(first + 2 * h, second + 2 * h, v_UH2 + 4 * (u // 2 * size + h))


@v.inner
def _nothing(places, following, offset, size, keys, block, k_HU2, v_UH2, fetched, num_bytes, turn, turns):
    """Stands where the CPU has no products of pairs, and is never called."""


unpack = v.inner(unpack) if v.HAS_BF16_DOT else _nothing
