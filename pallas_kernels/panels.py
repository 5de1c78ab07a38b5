"""Weights in panels: the order in memory in which a CPU multiplies them by tokens, with no sum left to fold.

A panel is a few rows of a kernel, as many as two registers have words. Of each row it holds a word of 32 bits in turn:
two bfloat16 or four int8 inputs. A register then has a word of each of 8 or 16 outputs, and a token's word, spread over
a register, goes past them all.

A kernel in panels keeps its shape, `[..., O, I]`; only its bytes stand elsewhere.

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
    if not cpu.is_available() or cpu.has_matrix_units():
        return False
    from pallas_kernels.cpu import matmul

    return num_rows % (2 * num_outs()) == 0 and matmul.multiplies_panels(num_in, dtype)


def pack(kernel):
    """A JAX array `[..., O, I]` in panels."""
    words_PRWE = kernel.reshape(-1, num_outs(), *_words(kernel))
    return words_PRWE.swapaxes(1, 2).reshape(kernel.shape)


def pack_in_place(kernel: np.ndarray):
    """`pack`, where the array lies."""
    num_words = _words(kernel)[0]
    words_PRW = kernel.view(np.uint32).reshape(-1, num_outs(), num_words)
    words_PWR = words_PRW.reshape(-1, num_words, num_outs())
    for start in range(0, len(words_PRW), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        words_PWR[some] = words_PRW[some].copy().swapaxes(1, 2)


def unpack(kernel):
    """The other way round."""
    num_words, width = _words(kernel)
    return kernel.reshape(-1, num_words, num_outs(), width).swapaxes(1, 2).reshape(kernel.shape)


def rows(kernel_OI, indices_T):
    """`[T, I]`: rows of a JAX array in panels, as they were before."""
    num_words, width = _words(kernel_OI)
    words_PWRE = kernel_OI.reshape(-1, num_words, num_outs(), width)
    words_TWE = words_PWRE[indices_T // num_outs(), :, indices_T % num_outs()]
    return words_TWE.reshape(-1, kernel_OI.shape[-1])


def _words(kernel) -> tuple[int, int]:
    width = WORD_BYTES // jnp.dtype(kernel.dtype).itemsize
    return kernel.shape[-1] // width, width
