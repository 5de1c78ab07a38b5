"""Weights in panels: the order in memory in which a CPU multiplies them by tokens, with no sum left to fold.

A panel is a few rows of a kernel, as many as two registers have words. Of each row it holds a word of 32 bits in turn:
two bfloat16, four int8 or eight int4 inputs. A register then has a word of each of 8 or 16 outputs, and a token's word,
spread over a register, goes past them all. The scales and offsets of an int4 kernel stand one in turn.

An array in panels keeps its shape, `[..., O, I]`; only its elements stand elsewhere.

Dimension key
    O  outputs     I  inputs     P  panels, O / R     R  a panel's outputs     W  words of a row
    E  inputs in a word
"""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu

WORD_BYTES = 4
AT_ONCE = 64  # panels packed in place: a few megabytes beside them


@functools.cache
def num_outs() -> int:
    """Outputs of a panel on this CPU: 16 or 32."""
    from pallas_kernels.cpu import panels

    return panels.OUTS


def suits(num_rows: int, num_in: int, dtype) -> bool:
    """Whether kernels of this many rows, or of two halves of half as many, are multiplied faster in panels here."""
    if not cpu.is_available() or (cpu.has_matrix_units() and dtype != jnp.int4):
        return False
    from pallas_kernels.cpu import matmul

    return num_rows % (2 * num_outs()) == 0 and matmul.multiplies_panels(num_in, dtype)


def pack(array, width=None):
    """A JAX array `[..., O, I]` in panels.

    Args:
        width: elements of a row side by side; as many as a word has when None, 1 for scales and offsets of int4.
    """
    words_PRWE = array.reshape(-1, num_outs(), *_words(array, width))
    return words_PRWE.swapaxes(1, 2).reshape(array.shape)


def pack_in_place(kernel: np.ndarray):
    """`pack`, where the array of bfloat16 or int8 lies."""
    num_words = _words(kernel)[0]
    words_PRW = kernel.view(np.uint32).reshape(-1, num_outs(), num_words)
    words_PWR = words_PRW.reshape(-1, num_words, num_outs())
    for start in range(0, len(words_PRW), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        words_PWR[some] = words_PRW[some].copy().swapaxes(1, 2)


def unpack(array, width=None):
    """The other way round."""
    num_words, width = _words(array, width)
    return array.reshape(-1, num_words, num_outs(), width).swapaxes(1, 2).reshape(array.shape)


def rows(kernel_OI, indices_T):
    """`[T, I]`: rows of a JAX array in panels, as they were before."""
    num_words, width = _words(kernel_OI)
    words_PWRE = kernel_OI.reshape(-1, num_words, num_outs(), width)
    words_TWE = words_PWRE[indices_T // num_outs(), :, indices_T % num_outs()]
    return words_TWE.reshape(-1, kernel_OI.shape[-1])


def _words(array, width=None) -> tuple[int, int]:
    if width is None:
        width = 8 if array.dtype == jnp.int4 else WORD_BYTES // jnp.dtype(array.dtype).itemsize
    return array.shape[-1] // width, width
