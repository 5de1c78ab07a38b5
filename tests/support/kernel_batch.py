"""Batches for the accelerator kernels: padded arrays of a fixed shape, so that one compilation serves many batches.

Pages hold keys and values of random history; everything that no kernel may use is NaN (or the dtype's largest
value), and table entries past a row's last page point outside the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import scales

OUTSIDE = 2**20  # a page id that no pool has
MIXED = [
    (7, 1),
    (50, 1),
    (30, 12),
    (0, 0),
    (31, 31),
]  # decodes, chunks, an empty row: (tokens in the cache, of which new)
LONG = [(397, 1), (512, 1), (290, 3)]  # in a batch of `long_shape`
SHARING = [(40, 1), (49, 1), (60, 20), (48, 16)]  # with two pages of a prefix in common


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static side of a batch; letters as in pallas_kernels.ragged_paged_attention."""

    num_tokens: int = 48
    num_rows: int = 6
    num_columns: int = 5
    num_pages: int = 24
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 128
    dtype: str = "float32"
    cache_dtype: str = "float32"


def long_shape(dtype, head_dim) -> Shape:
    return Shape(
        num_tokens=16,
        num_rows=4,
        num_columns=8,
        num_pages=24,
        page_size=64,
        kv_heads=1,
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=dtype,
    )


def batch(shape: Shape, rows, cache_shape, *, seed=0, share=0):
    """Arrays for the door, rows given as (tokens in the cache, of which new); decodes lead.

    Args:
        cache_shape: of (num_pages, page_size, num_kv_heads, head_dim), as the platform pads it.
        share: whole pages at the start of each row that are the first row's own, where its history allows.
    """
    rng = np.random.default_rng(seed)
    K, H, B = shape.kv_heads, shape.head_dim, shape.page_size
    table_SM = _table(shape, rows, rng, share)
    cache = rng.normal(size=cache_shape(shape.num_pages, B, K, H)).astype(np.float32)
    if jnp.dtype(shape.cache_dtype).itemsize == 1:
        cache = np.round(cache * 20)
    cache[:, :, 2 * K :] = 0
    cache[..., H:] = 0
    used = np.zeros((shape.num_pages, B), bool)
    for s, (length, new) in enumerate(rows):
        for position in range(length - new):
            used[table_SM[s, position // B], position % B] = True
    cache[:, :B][~used] = 127 if shape.cache_dtype == "int8" else np.nan
    if shape.cache_dtype == "int8":
        _fill_scales(cache, used, K, rng)
    lengths_S = np.zeros(shape.num_rows, np.int32)
    lengths_S[: len(rows)] = [length for length, _ in rows]
    new_S = np.zeros(shape.num_rows, np.int32)
    new_S[: len(rows)] = [new for _, new in rows]
    num_decode = next((s for s, (_, new) in enumerate(rows) if new != 1), len(rows))
    heads = [K * shape.group, K, K]
    q, k, v = (jnp.asarray(rng.normal(size=(shape.num_tokens, n, H)), shape.dtype) for n in heads)
    return (
        q,
        k,
        v,
        jnp.asarray(cache).astype(shape.cache_dtype),
        jnp.asarray(lengths_S),
        jnp.asarray(table_SM),
        jnp.asarray(np.concatenate([[0], np.cumsum(new_S)]), jnp.int32),
        jnp.asarray([num_decode, len(rows)], jnp.int32),
    )


def _fill_scales(cache, used, K, rng):
    """Random scales of used tokens where the cache holds such; of others the bytes of a NaN."""
    (P, B), C, width = used.shape, cache.shape[2], cache.shape[3]
    array = jax.ShapeDtypeStruct(cache.shape, jnp.int8)
    are_in, are_behind = scales.are_in(array, K), scales.are_behind(array, K)
    if not are_in and not are_behind:
        return
    scale = rng.uniform(0.02, 0.06, (P * B, 2 * K)).astype(np.float32)
    if are_in:
        cache[:, :, 2 * K :] = np.asarray(scales.as_vectors(jnp.asarray(scale), width)).reshape(P, B, -1, width)
        cache[~used, 2 * K :] = -1
        return
    cache[:, B:] = -1
    for page, token in np.argwhere(used):
        number = np.zeros(C, np.float32)
        number[: 2 * K] = scale[page * B + token]
        plane = B + 4 * (token // 128)
        cache[page, plane : plane + 4, :, token % 128] = number.view(np.int8).reshape(C, 4).T


def _table(shape, rows, rng, share):
    B = shape.page_size
    free = list(rng.permutation(shape.num_pages))
    table_SM = np.full((shape.num_rows, shape.num_columns), OUTSIDE, np.int32)
    for s, (length, new) in enumerate(rows):
        pages = -(-length // B)
        shared = min(share, (length - new) // B, (rows[0][0] - rows[0][1]) // B) if s else 0
        table_SM[s, :shared] = table_SM[0, :shared]
        for m in range(shared, pages):
            table_SM[s, m] = free.pop()
    return table_SM


def random_rows(shape: Shape, seed):
    """Some decodes, then some chunks, empty ones among them, within the shape's tokens, rows and columns.

    Of four lengths one fills its last page, and one is a token longer than whole pages.
    """
    rng = np.random.default_rng(seed)
    B = shape.page_size
    longest = min(shape.num_columns, shape.num_pages // shape.num_rows) * B

    def length(least):
        n = int(rng.integers(least, longest + 1))
        choices = [n, n, -(-n // B) * B, max(least, n // B * B + 1)]
        return choices[rng.integers(4)]

    rows = [(length(1), 1) for _ in range(rng.integers(0, shape.num_rows))]
    room = shape.num_tokens - len(rows)
    while len(rows) < shape.num_rows and room > 0:
        new = int(rng.integers(0, min(room, longest) + 1))
        rows.append((length(max(new, 1)), new))
        room -= new
    return rows


def with_another_layer(args):
    """The batch with its pages behind those of a layer that nobody may read, and the offset of its own."""
    q, k, v, cache, *rest = args
    other = jnp.full_like(cache, -1 if cache.dtype == jnp.int8 else jnp.nan)  # of a scale the bytes of a NaN
    return (q, k, v, jnp.concatenate([other, cache]), *rest), jnp.int32(len(cache))


def with_fewer_rows(args, num_rows):
    """The batch with rows past a count, which nobody may answer or write."""
    *rest, counts = args
    return (*rest, jnp.minimum(counts, num_rows))
