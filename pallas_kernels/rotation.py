"""Inputs turned so that none of them stands out: int8 layers round tokens and weights in these axes.

A token's largest element sets the steps of all its elements, and in language models a few elements are far larger
than the rest. Times a Hadamard matrix, a block of inputs at a time, these are spread over their block; and as weights
are turned in the same way when they are loaded, products are what they were: (x H) (w H)^T = x w^T.

Source: Ashkboos et al. 2024, arXiv 2404.00456, section 3; in blocks, so that devices that share the inputs of a layer
turn their own.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # inputs turned together, where it divides them; 32 and 128 do as well on the demo model
AT_ONCE = 2048  # blocks of weights: in float64 they stay in a core's cache
LANES = 128  # of a TPU: whole rows of them are multiplied at once


def block_size(num_in: int) -> int:
    """The largest power of two up to BLOCK that divides the inputs of a layer."""
    return math.gcd(num_in, BLOCK)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """float32[size, size] of +-1, size a power of two, with H H = size I."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


def rotate(x_TI: jax.Array) -> jax.Array:
    """float32: each block of inputs times its Hadamard matrix, in the unit that keeps lengths. Twice it is x again."""
    *_, num_in = x_TI.shape
    size, width = block_size(num_in), math.gcd(num_in, LANES)
    signs = np.kron(np.eye(width // size), hadamard(size)).astype(x_TI.dtype)  # zeros change no sum
    turned = jnp.dot(
        x_TI.reshape(-1, num_in // width, width), signs, precision="highest", preferred_element_type=jnp.float32
    )
    return turned.reshape(x_TI.shape) * np.float32(size**-0.5)


def rotate_rows(rows: np.ndarray) -> np.ndarray:
    """The same of weights on the host, float32[..., in]; of a row it does not matter which others are there.

    By sums and differences of halves, log2(size) times, a column a block: a sixth of the time of products with the
    matrix (Zen 4). In float64 they are made without an error that float32 would show.
    """
    size = block_size(rows.shape[-1])
    blocks = rows.reshape(-1, size)
    found = np.empty_like(blocks)
    for start in range(0, len(blocks), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        columns = np.array(blocks[some].T, np.float64, order="C")
        turned = np.empty_like(columns)
        for apart in (2**i for i in range(size.bit_length() - 1)):
            halves = columns.reshape(-1, 2, apart, columns.shape[1])
            sums = turned.reshape(halves.shape)
            np.add(halves[:, 0], halves[:, 1], out=sums[:, 0])
            np.subtract(halves[:, 0], halves[:, 1], out=sums[:, 1])
            columns, turned = turned, columns
        np.multiply(columns.T, size**-0.5, out=found[some], casting="same_kind")
    return found.reshape(rows.shape)
