"""Scales in the pages of an int8 cache: one for each key and each value, beside the token or behind the page's tokens.

A key's largest element differs several times over between tokens and heads, so one scale for all would leave most of
them a few of int8's 255 steps. A token's scales, float32, fill the last of its C vectors; so wherever a page goes,
they go. A cache without room for them has one scale for all keys and one for all values, as its caller says.

On a TPU a token is whole tiles, and one vector more would mostly be padded to as many again. There the scales of a page
stand behind its tokens, as BYTES planes for every LANES tokens: plane i has byte i of each, those of vector c in row c,
a token's in one lane.

Source: Dettmers et al. 2022, arXiv 2208.07339, section 2: the largest element of a vector becomes 127.

Dimension key as in the package, and
    E  vectors of a token that hold its scales     W  width of a vector in the cache, H padded
    L  planes of a page that hold its scales
"""

import jax
import jax.numpy as jnp

BYTES = 4  # of a scale
LANES = 128
PAGE_SIZES = (16, 32, 64, 128, 256)  # that may have scales behind their tokens


def num_vectors(num_kv_heads, width) -> int:
    """E: vectors that hold the scales of all keys and values of a token."""
    return -(-2 * num_kv_heads * BYTES // width)


def are_in(cache_PBCW, num_kv_heads) -> bool:
    """Whether these pages hold scales beside their tokens: int8, with exactly the room for them."""
    C, width = cache_PBCW.shape[2:]
    return cache_PBCW.dtype == jnp.int8 and C == 2 * num_kv_heads + num_vectors(num_kv_heads, width)


def rounded(x_TKH) -> tuple[jax.Array, jax.Array]:
    """Keys or values as int8, and their scales, float32[T, K]; a vector of zeros has scale 0."""
    x_TKH = x_TKH.astype(jnp.float32)
    scale_TK = jnp.max(jnp.abs(x_TKH), axis=-1) / 127
    steps_TKH = x_TKH * jnp.where(scale_TK > 0, 1 / scale_TK, 0)[..., None]
    return jnp.clip(jnp.round(steps_TKH), -127, 127).astype(jnp.int8), scale_TK


def as_vectors(scale_TC, width) -> jax.Array:
    """Scales as int8[T, E, W]."""
    T, C = scale_TC.shape
    bytes_TX = jax.lax.bitcast_convert_type(scale_TC.astype(jnp.float32), jnp.int8).reshape(T, BYTES * C)
    E = num_vectors(C // 2, width)
    return jnp.pad(bytes_TX, ((0, 0), (0, E * width - BYTES * C))).reshape(T, E, width)


def of_tokens(kv_UCW, num_kv_heads) -> jax.Array:
    """The scales of tokens out of the cache, float32[U, 2 K]: of key and value of head 0, then of head 1, ..."""
    U, C = len(kv_UCW), 2 * num_kv_heads
    bytes_UX = kv_UCW[:, C:].reshape(U, -1)[:, : BYTES * C]
    return jax.lax.bitcast_convert_type(bytes_UX.reshape(U, C, BYTES), jnp.float32)


def num_planes(page_size) -> int:
    """L: as large as a token each, behind a page's tokens."""
    return BYTES * -(-page_size // LANES)


def page_size(cache_PBCW) -> int:
    """Tokens of a page; B of a cache whose scales stand behind them is L more."""
    B = cache_PBCW.shape[1]
    if cache_PBCW.dtype != jnp.int8:
        return B
    return next((size for size in PAGE_SIZES if size + num_planes(size) == B), B)


def are_behind(cache_PBCW, num_kv_heads) -> bool:
    """Whether these pages hold scales behind their tokens."""
    return page_size(cache_PBCW) < cache_PBCW.shape[1] and not are_in(cache_PBCW, num_kv_heads)


def as_planes(scale_TC) -> jax.Array:
    """Scales as bytes, int8[T, BYTES, C]: what each has in its lane of BYTES planes."""
    return jax.lax.bitcast_convert_type(scale_TC.astype(jnp.float32), jnp.int8).swapaxes(1, 2)


def of_planes(planes_MLCW, page_size) -> jax.Array:
    """The scales of all tokens of pages, float32[M B, C]."""
    M, L, C, _ = planes_MLCW.shape
    bytes_ = planes_MLCW[..., :LANES].reshape(M, L // BYTES, BYTES, C, LANES).transpose(0, 1, 4, 3, 2)
    scale_MBC = jax.lax.bitcast_convert_type(bytes_, jnp.float32).reshape(M, -1, C)[:, :page_size]
    return scale_MBC.reshape(M * page_size, C)
