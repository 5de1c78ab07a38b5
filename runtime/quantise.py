"""Weights rounded to few bits when they are loaded, without data to try them on.

int8: rotated, so that no input of a layer stands out (pallas_kernels.rotation), with one scale an output, the largest
element becoming 127. int4: a scale and an offset for each group of a row's inputs, those of several that leave the
smallest squared error.

Source: for int8 vector-wise rounding of Dettmers et al. 2022, arXiv 2208.07339, section 2, without outliers kept
apart. For int4 groups as in Frantar et al. 2022, arXiv 2210.17323, section 4, each with its own search.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from models.layers.linear import group_size
from pallas_kernels.rotation import rotate_rows

TINY = np.finfo(np.float32).tiny
# How much of a group's range the 16 steps span at first: what lies outside is cut off, which the rest may gain by.
SPANS = (1.0, 0.92, 0.84)
BLOCK = 2**17  # elements worked on at once: they and what is made from them stay in a core's cache


def to_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows, float32[..., in], rotated, as int8, and their scales, float32[...]."""
    rows = rotate_rows(rows)
    scales = np.maximum(np.maximum(rows.max(-1), -rows.min(-1)), TINY) / 127
    rows /= scales[..., None]
    return np.rint(rows, out=rows).astype(np.int8), scales


def to_int4(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows, float32[..., in], as int4, and the scales and offsets of their groups, bfloat16[..., in / group]."""
    size = group_size(rows.shape[-1])
    groups = rows.reshape(-1, size)
    values = np.empty(groups.shape, ml_dtypes.int4)
    scales, offsets = (np.empty(len(groups), ml_dtypes.bfloat16) for _ in range(2))
    for part in _blocks(len(groups), size):
        # A column a group: numpy reduces many columns far faster than many short rows.
        best, scales[part], offsets[part] = _best_of_group(np.ascontiguousarray(groups[part].T))
        values[part] = best.T
    shape = (*rows.shape[:-1], -1)
    return values.reshape(rows.shape), scales.reshape(shape), offsets.reshape(shape)


def _blocks(count: int, size: int) -> Iterator[slice]:
    step = max(1, BLOCK // size)
    return (slice(start, start + step) for start in range(0, count, step))


def _best_of_group(groups):
    """Each column in the steps that suit it best: (int8 values, scales, offsets)."""
    low, high = groups.min(0, keepdims=True), groups.max(0, keepdims=True)
    best_error = np.full_like(low, np.inf)
    best = [np.zeros_like(groups), np.zeros_like(low), np.zeros_like(low)]
    for span in SPANS:
        scales = (high - low) * np.float32(span / 15)
        found = _refined(groups, scales, (high + low + scales) / 2)  # the 16 steps -8 .. 7 lie around -1/2
        error = np.square(groups - _meant(*found)).sum(0, keepdims=True)
        better = error < best_error
        for kept, new in zip((*best, best_error), (*found, error), strict=True):
            np.copyto(kept, new, where=better)
    values, scales, offsets = best
    return values.astype(np.int8), scales[0], offsets[0]


def _refined(groups, scales, offsets):
    """The steps that fit by least squares what these steps make of a group, in bfloat16; and the values in them."""
    values = _steps(groups, scales, offsets)
    mean, middle = groups.mean(0, keepdims=True), values.mean(0, keepdims=True)
    energy = np.square(values - middle).sum(0, keepdims=True)
    scales = ((groups - mean) * (values - middle)).sum(0, keepdims=True) / np.maximum(energy, TINY)
    scales = _in_bfloat16(scales)
    offsets = _in_bfloat16(mean - scales * middle)
    return _steps(groups, scales, offsets), scales, offsets


def _steps(groups, scales, offsets):
    """The nearest of 16 steps, float32; 0 where the scale is 0."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > TINY)
    values = (groups - offsets) * inverse
    return np.clip(np.rint(values, out=values), -8, 7, out=values)


def _meant(values, scales, offsets):
    return values * scales + offsets


def _in_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


ROUNDINGS = {"int8": to_int8, "int4": to_int4}  # by the dtype of what they make
