"""Each row's likeliest token, straight from the hidden states: greedy rows need none of their other scores.

Dimension key
    S  rows     I  inputs     V  vocabulary
"""

import jax.numpy as jnp

from pallas_kernels import cpu
from pallas_kernels.choose import best
from pallas_kernels.linear import linear
from pallas_kernels.platform import current_platform


def likeliest(x_SI, kernel_VI, num_rows=None, *, kernel_scale=None, in_panels=False, implementation=None):
    """Scores the vocabulary and keeps the highest score of each row.

    Args:
        x_SI: hidden states, bfloat16 or float32.
        kernel_VI, kernel_scale, in_panels: as `linear` has them; not of int4.
        num_rows: int32 scalar array: rows at or past it are padding, and come out as anything. None when all are real.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        (token_S, best_S, is_finite_S): int32, the first of equals; float32, the scores of `linear` bit for bit; and
        whether every score of the row is a finite number.

    Raises:
        ValueError: the widths differ, an int8 kernel has no scale, or the implementation is unknown.
    """
    if x_SI.shape[1] != kernel_VI.shape[1]:
        raise ValueError(f"x has {x_SI.shape[1]} inputs and the kernel {kernel_VI.shape[1]}; kernels are [out, in]")
    if (kernel_VI.dtype == jnp.int8) != (kernel_scale is not None):
        raise ValueError(f"a {kernel_VI.dtype} kernel and kernel_scale {kernel_scale}; int8, and only it, has one")
    name = implementation or ("cpu" if finds(x_SI, kernel_VI, in_panels) else "reference")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](x_SI, kernel_VI, num_rows, kernel_scale=kernel_scale, in_panels=in_panels)


def finds(x_SI, kernel_VI, in_panels: bool) -> bool:
    """Whether there is a kernel here that writes no scores."""
    if not in_panels or current_platform() != "cpu" or not cpu.is_available():
        return False
    from pallas_kernels.cpu import matmul

    return kernel_VI.dtype in (jnp.bfloat16, jnp.int8) and matmul.supports(x_SI, kernel_VI)


def reference(x_SI, kernel_VI, num_rows, *, kernel_scale, in_panels):
    """All scores, and then the best of each row."""
    options = {"kernel_scale": kernel_scale, "out_dtype": jnp.float32, "in_panels": in_panels}
    scores_SV = linear(x_SI, kernel_VI, num_rows, **options)
    best_S, token_S = best(scores_SV)
    return token_S, best_S, jnp.isfinite(scores_SV.sum(-1))


def _cpu(x_SI, kernel_VI, num_rows, *, kernel_scale, in_panels):
    from pallas_kernels.cpu import likeliest

    if not in_panels:
        raise ValueError("the cpu implementation multiplies kernels in panels; pack this one")
    threads = cpu.register().num_threads
    return likeliest.likeliest(x_SI, kernel_VI, num_rows, kernel_scale=kernel_scale, num_threads=threads)


IMPLEMENTATIONS = {"reference": reference, "cpu": _cpu}
