"""Any part of a parameter, read from no more of the checkpoint than it needs.

A Rule's change is a view wherever that is possible, so it can be undone: it is applied to an array that is never
touched, whose addresses then say which element of the tensor lies where. From these come the rows to read, a few
megabytes at a time, and the strides in which they are copied to their place.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from converters.rules import ConversionError, Pieces, Rule, TensorSource, match_tensors

Box = tuple[slice, ...]  # a part of an array: one slice with both ends for each axis
BLOCK_BYTES = 4_000_000  # read at once; with what is made from it, what a thread holds beside the part
ALIGNMENT = 64  # bytes, as XLA wants it to take over an array of the host's without a copy
# {dtype: (unsigned of the same width, bits of infinity); anything above in magnitude is not a number
EXPONENTS = {
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}


def convert(source: TensorSource, rules: list[Rule], shapes: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each parameter whole and in its dtype, in the order of `shapes`: {name: shape and dtype}.

    Raises:
        ConversionError: as match_tensors, before anything is read; and as fill.
    """
    for name, pieces in match_tensors(source.tensors, rules, shapes).items():
        whole = empty(shapes[name].shape, shapes[name].dtype)
        fill(whole, source, pieces, tuple(slice(0, size) for size in whole.shape))
        yield name, whole


def fill(part: np.ndarray, source: TensorSource, pieces: Pieces, box: Box) -> None:
    """Sets part to parameter[box], in part's own dtype.

    Args:
        pieces: the parameter's, from rules.match_tensors.

    Raises:
        ConversionError: a tensor cannot be read, or holds what is no number or none that the dtype can hold.
    """
    for piece in pieces.near(box):
        if (met := meeting(piece.index, box)) is not None:
            inside, wanted = met
            _copy(part[(*inside, ...)], source, piece, wanted)


def boxes(box: Box, is_small: Callable[[tuple[int, ...]], bool]) -> Iterator[Box]:
    """The box in halves of halves, along its first axes, until is_small(sizes)."""
    sizes = tuple(side.stop - side.start for side in box)
    axis = next((axis for axis, size in enumerate(sizes) if size > 1), None)
    if axis is None or is_small(sizes):
        yield box
        return
    middle = box[axis].start + (sizes[axis] + 1) // 2
    for side in (slice(box[axis].start, middle), slice(middle, box[axis].stop)):
        yield from boxes((*box[:axis], side, *box[axis + 1 :]), is_small)


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array without values that a device of the host can take over as it is."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


def meeting(index, box) -> tuple[tuple, tuple] | None:
    """Where a piece at parameter[index] meets the box: (index into the box's part, index into the piece); or None."""
    inside, wanted = [], []
    for axis, side in enumerate(box):
        at = index[axis] if axis < len(index) else slice(None)
        if not isinstance(at, slice):
            if not side.start <= at < side.stop:
                return None
            inside.append(at - side.start)
            continue
        first, last = at.start or 0, side.stop if at.stop is None else at.stop
        low, high = max(first, side.start), min(last, side.stop)
        if low >= high:
            return None
        inside.append(slice(low - side.start, high - side.start))
        wanted.append(slice(low - first, high - first))
    return tuple(inside), tuple(wanted)


def _copy(out, source, piece, wanted):
    """out = piece.change(tensor)[wanted]."""
    shape = source.tensors[piece.name].shape
    addresses = np.empty(shape, np.uint8)  # one byte an element, of which none is ever touched
    changed = piece.change(addresses)
    if not np.may_share_memory(changed, addresses) or min(changed.strides, default=0) < 0:
        out[...] = _cast(piece.change(_checked(source.read(piece.name), piece.name))[wanted], out.dtype, piece.name)
        return
    row = math.prod(shape[1:])
    base = addresses.ctypes.data
    itemsize = source.tensors[piece.name].dtype.itemsize

    def walk(view, place):
        first = view.ctypes.data - base
        last = first + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        rows = slice(first // row, last // row + 1)
        if (rows.stop - rows.start) * row * itemsize <= BLOCK_BYTES or rows.stop - rows.start == 1:
            values = source.read(piece.name, rows) if shape else source.read(piece.name)
            flat = _checked(values, piece.name).reshape(-1)[first - rows.start * row :]
            strides = [stride * itemsize for stride in view.strides]
            found = np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)
            place[...] = _cast(found, place.dtype, piece.name)
            return
        axis = max(range(view.ndim), key=lambda axis: view.strides[axis] if view.shape[axis] > 1 else -1)
        halves = [(slice(None),) * axis + (half,) for half in _halves(view.shape[axis])]
        for half in halves:
            walk(view[half], place[half])

    if out.size:
        walk(changed[wanted], out)


def _halves(size):
    return slice(0, size // 2), slice(size // 2, size)


def _checked(values, name):
    """The values, all of them numbers."""
    unsigned, infinity = EXPONENTS.get(values.dtype, (None, 0))
    if unsigned is not None and values.size:
        magnitude = values.view(unsigned) & unsigned(np.iinfo(unsigned).max >> 1)
        if magnitude.max() >= infinity:
            raise ConversionError(f"tensor {name!r} holds values that are infinite or no numbers; download it again")
    return values


def _cast(values, dtype, name):
    if dtype != np.float16 or values.dtype == np.float16:
        return values.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if np.isinf(cast).any():
        raise ConversionError(f"tensor {name!r} has values beyond float16; use dtype bfloat16 or float32")
    return cast
