"""Weights rounded to int8 when they are loaded: one scale an output, the largest element becoming 127.

Source: vector-wise rounding of Dettmers et al. 2022, arXiv 2208.07339, section 2, without outliers kept apart.
"""

import numpy as np


def to_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows, float32[..., in], as int8, and their scales, float32[...]. The rows given are used up."""
    scales = np.maximum(np.maximum(rows.max(-1), -rows.min(-1)), np.finfo(np.float32).tiny) / 127
    rows /= scales[..., None]
    return np.rint(rows, out=rows).astype(np.int8), scales
