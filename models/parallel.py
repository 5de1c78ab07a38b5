"""Layers that are split over devices: while a step is traced, which logical axes are, and over which mesh axis.

The whole step runs inside one `shard_map`. Each device holds its part of the weights and of the cache and runs the
ordinary layers on it with the ordinary kernels; where a product's inputs are split, the devices' sums are added up
here. Outside of `split_over` nothing is split and these functions do nothing.

Source: Shoeybi et al. 2019, arXiv 1909.08053: a layer's two products in, split by outputs; two out, split by inputs.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Split:
    """Which logical axes of weights are split, over which axis of the mesh, on how many devices."""

    mesh_axis: str
    size: int
    names: frozenset[str]


_split: contextvars.ContextVar[Split | None] = contextvars.ContextVar("split", default=None)


@contextlib.contextmanager
def split_over(split: Split | None) -> Iterator[None]:
    """What is traced inside runs on one device's part."""
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


def splits(name: str | None) -> Split | None:
    """The split of a logical axis, or None when each device has all of it."""
    split = _split.get()
    return split if split is not None and name in split.names else None


def add_up(part: jax.Array, split: Split) -> jax.Array:
    """The sum of every device's part, on every device."""
    return jax.lax.psum(part, split.mesh_axis)


def place(split: Split) -> jax.Array:
    """Which part this device has, int32."""
    return jax.lax.axis_index(split.mesh_axis)
