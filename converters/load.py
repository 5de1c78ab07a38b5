"""A checkpoint's tensors -> the model's weights on the devices that hold them."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from converters.checkpoint import Checkpoint
from converters.parts import fill
from converters.place import Made, place
from converters.rules import ConversionError, Pieces, match_tensors

Rounding = Callable[[np.ndarray], tuple[np.ndarray, ...]]


def load_weights(
    checkpoint: Checkpoint,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    wheres: Mapping[str, Any] | None = None,
    roundings: Mapping[str, Rounding] | None = None,
    progress: Callable[[int, int], None] | None = None,
    by_slabs: bool | None = None,
    rooms: Mapping[str, np.ndarray] | None = None,
) -> dict[str, jax.Array]:
    """Reads, converts and places every weight: of each tensor only what this process's devices hold of it.

    Beside the weights themselves the host holds a few tens of megabytes a thread, of at most eight.

    Args:
        shapes: from models.interface.abstract, which settles names, stacking and dtypes.
        wheres: {name: sharding or format}; the first device when None.
        roundings: {dtype: float32 rows -> (rows in that dtype, their scales)}, for weights "x" beside which is an
            "x_scale", and perhaps an "x_offset", which it then gives too; the rows given are used up.
        progress: called as progress(bytes done, bytes in all).
        by_slabs, rooms: see converters.place.

    Raises:
        ConversionError: the checkpoint does not fit the model, or a file cannot be read.
    """
    if wheres is None:
        wheres = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    beside = _beside(shapes)
    pieces = check_fits(checkpoint, shapes)

    def made(name):
        def whole(box, arrays):
            fill(arrays[name], checkpoint.source, pieces[name], box)

        def rounded(box, arrays):
            assert roundings is not None
            rounding, sizes = roundings[shapes[name].dtype.name], [side.stop - side.start for side in box]
            rows = np.empty((*sizes, shapes[name].shape[-1]), np.float32)
            fill(rows, checkpoint.source, pieces[name], (*box, slice(0, rows.shape[-1])))
            for made_name, found in zip((name, *beside[name]), rounding(rows), strict=True):
                arrays[made_name][...] = found

        if name not in beside:
            return Made((name,), len(shapes[name].shape), whole)
        *common, width = shapes[name].shape
        return Made((name, *beside[name]), len(common), rounded, step_bytes=16 * width)  # and what rounding makes

    with _named(checkpoint):
        work = [made(name) for name in pieces]
        return place(work, shapes, wheres, progress=progress, by_slabs=by_slabs, rooms=rooms)


def check_fits(checkpoint: Checkpoint, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Pieces]:
    """{weight: its tensors}, by names and shapes alone: no weight is read.

    Raises:
        ConversionError: the checkpoint does not fit the model.
    """
    made = {name for names in _beside(shapes).values() for name in names}
    stored = {name: shape for name, shape in shapes.items() if name not in made}
    with _named(checkpoint):
        return match_tensors(checkpoint.source.tensors, checkpoint.rules, stored)


def _beside(shapes):
    """{weight: its scales, and its offsets where it has some}."""
    found = {name: (f"{name}_scale", f"{name}_offset") for name in shapes if f"{name}_scale" in shapes}
    return {name: tuple(other for other in others if other in shapes) for name, others in found.items()}


@contextlib.contextmanager
def _named(checkpoint):
    """Errors name the checkpoint."""
    try:
        yield
    except ConversionError as error:
        where = str(checkpoint.path)
        raise (error if where in str(error) else ConversionError(f"{where}: {error}")) from error.__cause__
