"""Scales in the pages of an int8 cache: one for each key and each value, behind the token's own vectors.

A key's largest element differs several times over between tokens and heads, so one scale for all would leave most of
them a few of int8's 255 steps. A token's scales, float32, fill the last of its C vectors; so wherever a page goes,
they go. A cache without room for them has one scale for all keys and one for all values, as its caller says.

Source: Dettmers et al. 2022, arXiv 2208.07339, section 2: the largest element of a vector becomes 127.

Dimension key as in the package, and
    E  vectors of a token that hold its scales     W  width of a vector in the cache, H padded
"""

import jax
import jax.numpy as jnp

BYTES = 4  # of a scale


def num_vectors(num_kv_heads, width) -> int:
    """E: vectors that hold the scales of all keys and values of a token."""
    return -(-2 * num_kv_heads * BYTES // width)


def are_in(cache_PBCW, num_kv_heads) -> bool:
    """Whether these pages hold scales: int8, with exactly the room for them."""
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
