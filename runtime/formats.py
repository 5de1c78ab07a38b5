"""In which layout each weight lies on its devices: the compiler of a decode step chooses, and all else follows.

A decode step reads every weight once and does little beside, so no program loses more by a layout that does not suit
it. The largest one is compiled with the layouts of its weights left open, and what the compiler chose is read from the
executable, whether that was compiled here, or earlier, or on another machine, and kept. The other programs are for
weights that lie so, and weights are placed so as they are read. A CPU wants an order of its own instead, see
pallas_kernels.panels.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from converters.place import in_format

Layouts = dict[str, Layout]  # {weight: how it lies in the memory of each device that has a part of it}
# Layouts that will be known; {} where nothing chooses and all are the usual ones.
Choice = concurrent.futures.Future[Layouts]


def left_open(platform: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Format] | None:
    """{weight: format} for a compiler that may choose the layouts of weights with shardings; None where it may not."""
    return None if platform == "cpu" else {name: Format(Layout.AUTO, shape.sharding) for name, shape in shapes.items()}


def read_back(executable: Any) -> Layouts:
    """Args: executable: a compiled step, whose first argument is the weights."""
    (weights, *_), _ = executable.input_formats
    return {name: found.layout for name, found in weights.items()}


@contextlib.contextmanager
def deciding(choice: Choice) -> Iterator[None]:
    """Whoever waits for the choice gets an error that is raised instead of it."""
    try:
        yield
    except BaseException as error:
        choice.set_exception(error)
        raise


def wheres(shardings: Mapping[str, Any], layouts: Layouts) -> dict[str, Any]:
    """{weight: format, or the sharding alone where no layout is known}."""
    return {name: Format(layouts[name], where) if name in layouts else where for name, where in shardings.items()}


def placed(shapes: Mapping[str, Any], layouts: Layouts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes that know their shardings as shapes that know their formats."""
    found = wheres({name: shape.sharding for name, shape in shapes.items()}, layouts)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=found[name]) for name, s in shapes.items()}


def laid_out(weights: dict[str, jax.Array], layouts: Layouts) -> dict[str, jax.Array]:
    """The same weights in these layouts. What lay otherwise is deleted, so that one part of one weight exists twice."""
    found = wheres({name: array.sharding for name, array in weights.items()}, layouts)
    return {name: in_format(array, found[name]) for name, array in weights.items()}
