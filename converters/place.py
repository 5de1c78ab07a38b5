"""Arrays made where they will live: box by box, each device's part, with little on the host at any time.

A part for a device whose memory is the host's is made in place and taken over without a copy. Elsewhere small parts
go over whole, and large ones a slab at a time, each written into the part that already lies on the device.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format

from converters.parts import Box, boxes, empty

MAX_THREADS = 8
SLAB_BYTES = 16_000_000  # a thread holds one, and what is made from it


@dataclasses.dataclass(frozen=True)
class Made:
    """Arrays that are made together, cut by the axes they begin with.

    Attributes:
        names: of the arrays; they have the first num_axes axes in common, split over the devices in the same way.
        num_axes: along these the work may be cut; what comes after is always made whole.
        make: make(box, {name: array}) fills each array with its part in the box, a slice for each common axis.
        step_bytes: what making one element of the common axes takes on the host beside the arrays.
    """

    names: tuple[str, ...]
    num_axes: int
    make: Callable[[Box, Mapping[str, np.ndarray]], None]
    step_bytes: int = 0


def place(
    work: Sequence[Made],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    wheres: Mapping[str, Any],
    *,
    progress: Callable[[int, int], None] | None = None,
    by_slabs: bool | None = None,
    rooms: Mapping[str, np.ndarray] | None = None,
) -> dict[str, jax.Array]:
    """All arrays of the work, in the order of `shapes`.

    Args:
        wheres: {name: sharding, or a format: a sharding with a layout}. Only this process's parts are made.
        progress: called as progress(bytes done, bytes in all).
        by_slabs: whether large parts are written to the device a slab at a time; None: where it has memory of its own.
        rooms: memory in which an array is made that lies whole on devices of the host; it becomes the array's own.
    """
    lock, done = threading.Lock(), 0
    total = sum(_nbytes(shapes[name].shape, shapes[name].dtype) for made in work for name in made.names)

    def one(made):
        nonlocal done
        arrays = _arrays(made, shapes, wheres, by_slabs, rooms or {})
        with lock:
            done += sum(array.nbytes for array in arrays.values())
            if progress:
                progress(done, total)
        return arrays

    found: dict[str, jax.Array] = {}
    pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS))
    try:
        for arrays in pool.map(one, work):
            found |= arrays
    finally:
        pool.shutdown(cancel_futures=True)
    return {name: found[name] for name in shapes if name in found}


def sharding_of(where: Any) -> Any:
    """The sharding of a sharding, or of a format."""
    return where.sharding if isinstance(where, Format) else where


def in_format(array: jax.Array, where: Any) -> jax.Array:
    """The array as a format says, or a sharding that is its own; deleted where it lay otherwise.

    Each device turns its own part and asks no other, nor another process.
    """
    if not isinstance(where, Format) or array.format.layout == where.layout:  # type: ignore[attr-defined]
        return array
    parts = [jax.device_put(part.data, _place_of(where, part.device), donate=True) for part in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, jax.block_until_ready(parts))


def part_of(where: Any, shape: Sequence[int]) -> dict[Any, Box]:
    """{device of this process: its part of an array of this shape}."""
    found = sharding_of(where).addressable_devices_indices_map(tuple(shape))
    whole = lambda index: tuple(slice(*side.indices(size)[:2]) for side, size in zip(index, shape, strict=True))
    return {device: whole(index or ()) for device, index in found.items()}


def _arrays(made, shapes, wheres, by_slabs, rooms):
    """The arrays of one piece of work."""
    parts = {name: part_of(wheres[name], shapes[name].shape) for name in made.names}
    # Devices that hold the same of the common axes are served at once. Python 3.11 cannot hash a slice.
    groups: dict[tuple, dict[tuple, _Part]] = collections.defaultdict(dict)
    for name, devices in parts.items():
        for device, box in devices.items():
            key = tuple((side.start, side.stop) for side in box)
            targets = groups[key[: made.num_axes]]
            if (name, key) not in targets:
                targets[name, key] = _Part(name, box[made.num_axes :], shapes[name].dtype, key)
            targets[name, key].places.append(_place_of(wheres[name], device))
    found = collections.defaultdict(list)
    for key, targets in groups.items():
        _fill(made, tuple(slice(*ends) for ends in key), list(targets.values()), shapes, by_slabs, rooms)
        for part in targets.values():
            found[part.name] += part.buffer.arrays()
    assemble = jax.make_array_from_single_device_arrays
    return {name: assemble(shapes[name].shape, sharding_of(wheres[name]), found[name]) for name in made.names}


def _fill(made, outer, parts, shapes, by_slabs, rooms):
    """Makes every part that begins with the box `outer` of the common axes."""
    for part in parts:
        part.begin(by_slabs, rooms.get(part.name))
    is_whole = all(part.is_on_host for part in parts) and not made.step_bytes
    per_element = made.step_bytes + sum(
        _nbytes(shapes[name].shape[made.num_axes :], shapes[name].dtype) for name in made.names
    )
    for box in boxes(outer, lambda sizes: is_whole or math.prod(sizes) * per_element <= SLAB_BYTES):
        inside = tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))
        rooms = [part.buffer.room(inside) for part in parts]
        if len(parts) == len(made.names) == 1:
            made.make(box, {parts[0].name: rooms[0]})
        else:
            sizes = tuple(side.stop - side.start for side in box)
            whole = {n: np.empty(sizes + shapes[n].shape[made.num_axes :], shapes[n].dtype) for n in made.names}
            made.make(box, whole)
            for part, room in zip(parts, rooms, strict=True):
                room[...] = whole[part.name][(..., *part.rest)]
        for part, room in zip(parts, rooms, strict=True):
            part.buffer.take(inside, room)


@dataclasses.dataclass
class _Part:
    """One part of one array, and the devices that hold it."""

    name: str
    rest: Box  # of the axes that are not common
    dtype: Any
    ends: tuple
    places: list[Any] = dataclasses.field(default_factory=list)
    buffer: Any = None

    def begin(self, by_slabs, room):
        shape = tuple(stop - start for start, stop in self.ends)
        if by_slabs is None:
            by_slabs = _device(self.places[0]).platform != "cpu"
        is_large = _nbytes(shape, self.dtype) > SLAB_BYTES
        if by_slabs and is_large:
            self.buffer = _OnDevice(shape, self.dtype, self.places)
        else:
            is_given = room is not None and room.shape == shape
            self.buffer = _OnHost(room if is_given else empty(shape, self.dtype), self.places)

    @property
    def is_on_host(self):
        return isinstance(self.buffer, _OnHost)


class _OnHost:
    """A part made on the host, then handed to its devices whole."""

    def __init__(self, part, places):
        self.part, self.places = part, places

    def room(self, inside):
        return self.part[(*inside, ...)]

    def take(self, inside, room):
        pass

    def arrays(self):
        return jax.block_until_ready([jax.device_put(self.part, place) for place in self.places])


class _OnDevice:
    """A part that grows on its devices."""

    def __init__(self, shape, dtype, places):
        self.shape, self.dtype, self.places = shape, dtype, places
        self.parts = [_zeros(shape, dtype, place) for place in places]

    def room(self, inside):
        sizes = [side.stop - side.start for side in inside]
        return np.empty((*sizes, *self.shape[len(sizes) :]), self.dtype)

    def take(self, inside, room):
        starts = [np.int32(side.start) for side in inside] + [np.int32(0)] * (len(self.shape) - len(inside))
        for i, place in enumerate(self.places):
            self.parts[i] = _writer(place)(self.parts[i], jax.device_put(room, _device(place)), starts)
        jax.block_until_ready(self.parts)  # the room is free again, and no more than one is ever on its way

    def arrays(self):
        return self.parts


def _zeros(shape, dtype, place):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()


@functools.cache
def _writer(place):
    return jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=place)


def _place_of(where, device):
    alone = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding_of(where).memory_kind)
    return Format(where.layout, alone) if isinstance(where, Format) else alone


def _device(place):
    (device,) = sharding_of(place).device_set
    return device


def _nbytes(shape, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize
