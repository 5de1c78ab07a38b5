"""Converted weights on disk, so that the next start reads them as the devices want them, on whatever mesh.

An entry is a folder named by what its weights were made from. In it are orbax checkpoints of a few hundred megabytes
each, and a file `complete`: which part of which array is in which of them, and the SHA-256 of every file. Orbax does
not notice a changed byte in an array, so every file's digest is compared before the weights are used.

Orbax would read each device's part whole, into memory beside the one that the part is to lie in. What it wrote is
therefore read with tensorstore, which it is made of, straight to the place, in whatever boxes the mesh needs.

Of a model on several hosts each has an entry of its own, with the parts that its devices hold: for the same mesh only.
Orbax leaves to the first process what several hold, and takes no array of one process among many, so these parts are
written with tensorstore too, in the form that orbax gives them.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.parts import meeting
from converters.place import Made, part_of, place
from runtime import entries, malloc

log = logging.getLogger(__name__)
COMPLETE = "complete"
BATCH_BYTES = 128_000_000  # of one orbax checkpoint, and so on the host at once when devices have memory of their own
CHUNK_BYTES = 8_000_000  # of one file, which is always read whole


class Damaged(ValueError):
    """An entry is not what was written."""


def restore(
    folder: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    wheres: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
    rooms: Mapping[str, np.ndarray] | None = None,
) -> dict[str, jax.Array] | None:
    """The weights of an entry, placed as `wheres` says; None when there is none, or none that can be trusted.

    An entry that cannot be trusted is said and removed. For progress and rooms see converters.place.
    """
    if not exists(folder):
        return None
    try:
        arrays, files = _read_index(folder / COMPLETE)
        _compare(arrays, shapes)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            check = beside.submit(_check_files, folder, files)
            weights = _read(folder, arrays, shapes, wheres, progress, rooms)
            check.result()
        return weights
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("kept weights %s are not used: %s; converting again", folder.name, error)
        entries.discard(folder)
        return None


def exists(folder: Path) -> bool:
    """Whether there is an entry, and it may be looked at: another user's folder holds nothing for this one."""
    return os.path.exists(folder / COMPLETE)


def of_this_process(folder: Path, shapes: Mapping[str, Any], wheres: Mapping[str, Any]) -> Path:
    """The entry for what this process holds: `folder` where that is all, else one beside it, named by the parts."""
    if jax.process_count() == 1:
        return folder
    held = {name: [_ends(box) for box, _ in _distinct(part_of(wheres[name], shapes[name].shape))] for name in shapes}
    return folder.with_name(f"{folder.name}-{hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]}")


def keep(folder: Path, weights: Mapping[str, jax.Array], *, batch_bytes: int = BATCH_BYTES) -> None:
    """Makes an entry of what this process holds; a full disk, or any other reason why not, costs a warning only."""
    is_alone = jax.process_count() == 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        entries.sweep(folder.parent)
        held = [array.nbytes if is_alone else sum(p.nbytes for _, p in _held(array)) for array in weights.values()]
        needs, free = sum(held), shutil.disk_usage(folder.parent).free
        if free < needs:
            log.warning("converted weights are not kept: %s has %s bytes free of %s", folder.parent, free, needs)
            return
        with entries.workspace(folder) as work:
            arrays = (_write if is_alone else _write_parts)(work, weights, batch_bytes)
            _write_index(work, arrays)
            with contextlib.suppress(FileExistsError):  # another server was quicker, with the same weights
                entries.rename(work, folder)
    except Exception as error:  # orbax and tensorstore raise many types for a disk that cannot be written
        log.warning("converted weights are not kept in %s: %s", folder.parent, _first_line(error))


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _write(work, weights, batch_bytes) -> dict[str, Any]:
    """Writes the arrays and returns {name: {shape, dtype, parts: [[where it begins, folder of the part]]}}."""
    import orbax.checkpoint as ocp  # half a second, which only a cold start pays

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of each folder that it is no OCDBT, as wanted
    found: dict[str, Any] = {}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)  # bfloat16 hardly gets smaller
    with ocp.Checkpointer(handler) as writer:
        for number, batch in enumerate(_batches(weights, batch_bytes)):
            tree = {f"{name}@{start}": slab for name, start, slab in batch}
            chunks = {key: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for key in tree}
            writer.save(work / f"{number:04}", args=ocp.args.PyTreeSave(tree, save_args=chunks))
            for name, start, slab in batch:
                _note(found, name, weights[name], _rows_from(start, slab), f"{number:04}/{name}@{start}")
            malloc.trim()  # each of many threads has its own, and batch by batch they would come to a few hundred MB
    return found


def _write_parts(work, weights, batch_bytes) -> dict[str, Any]:
    """The same of the parts that this process holds, a slab of each after the other."""
    import tensorstore as ts

    found: dict[str, Any] = {}
    for name, array in weights.items():
        for number, (box, part) in enumerate(_held(array)):
            for start, slab in _slabs(part, batch_bytes):
                folder, values = f"{name}@{number}.{start}", np.asarray(slab)
                stored = ts.open(
                    {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{work / folder}/"}},
                    create=True,
                    dtype=ts.dtype(values.dtype),
                    shape=values.shape,
                    chunk_layout=ts.ChunkLayout(chunk_shape=_chunk(values)),
                ).result()
                stored.write(values).result()
                origin = [side.start for side in box]
                if origin:
                    origin[0] += start
                _note(found, name, array, origin, folder)
        malloc.trim()
    return found


def _note(found, name, array, origin, folder):
    entry = found.setdefault(name, {"shape": array.shape, "dtype": array.dtype.name, "parts": []})
    entry["parts"].append([origin, folder])


def _rows_from(start, slab):
    return [start] + [0] * (slab.ndim - 1) if slab.ndim else []


def _held(array):
    """(box, one device's array) of each different part that this process holds."""
    parts = {part.device: part.data for part in array.addressable_shards}
    return [(box, parts[device]) for box, device in _distinct(part_of(array.sharding, array.shape))]


def _distinct(parts):
    """(box, a device that holds it) for each box, in order."""
    found = {tuple(map(tuple, _ends(box))): (box, device) for device, box in parts.items()}
    return [found[ends] for ends in sorted(found)]


def _ends(box):
    return [[side.start, side.stop] for side in box]


def _chunk(values):
    """The shape of one file's part of an array: halves of halves, along the first axes."""
    sizes = list(values.shape)
    for axis in range(len(sizes)):
        while math.prod(sizes) * values.itemsize > CHUNK_BYTES and sizes[axis] > 1:
            sizes[axis] = -(-sizes[axis] // 2)
    return sizes


def _batches(weights, batch_bytes):
    """Lists of (name, first row, rows), each list of about so many bytes."""
    batch, size = [], 0
    for name, array in weights.items():
        for start, slab in _slabs(array, batch_bytes):
            if batch and size + slab.nbytes > batch_bytes:
                yield batch
                batch, size = [], 0
            batch.append((name, start, slab))
            size += slab.nbytes
    if batch:
        yield batch


def _slabs(array, batch_bytes):
    """(first row, rows) of an array that is too large for a batch and can be cut without the devices' help."""
    parts = part_of(array.sharding, array.shape).values()
    is_cut = any(box[0] != slice(0, len(array)) for box in parts)
    if array.nbytes <= batch_bytes or is_cut or all(d.platform == "cpu" for d in array.sharding.device_set):
        yield 0, array
        return
    step = max(1, len(array) * batch_bytes // array.nbytes)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def _read(folder, arrays, shapes, wheres, progress, rooms):
    import tensorstore as ts

    # Each read is of one chunk: few at once keep the host's memory small.
    context = ts.Context({"file_io_concurrency": {"limit": 4}, "data_copy_concurrency": {"limit": 4}})

    @functools.cache
    def opened(part):
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / part}/"}}
        return ts.open(spec, read=True, context=context).result()

    def work(name):
        def make(box, into):
            filled = 0
            for origin, part in arrays[name]["parts"]:
                stored = opened(part)
                index = tuple(slice(first, first + size) for first, size in zip(origin, stored.shape, strict=True))
                if (met := meeting(index, box)) is not None:
                    inside, wanted = met
                    target = into[name][(*inside, ...)]
                    ts.array(target).write(stored[wanted][ts.d[:].translate_to[0]]).result()
                    filled += target.size
            if filled != into[name].size:
                raise Damaged(f"of {name} a part is missing")

        return Made((name,), len(shapes[name].shape), make)

    return place([work(name) for name in shapes], shapes, wheres, progress=progress, rooms=rooms)


def _compare(arrays, shapes):
    for name, shape in shapes.items():
        kept = arrays[name]
        if tuple(kept["shape"]) != shape.shape or kept["dtype"] != np.dtype(shape.dtype).name:
            raise Damaged(f"{name} is {kept['dtype']}{kept['shape']}, and {shape.dtype}{list(shape.shape)} is wanted")


def _write_index(work, arrays):
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    body = json.dumps({"arrays": arrays, "files": dict(zip(names, _digests(work, names), strict=True))})
    (work / COMPLETE).write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")


def _read_index(path):
    digest, _, body = path.read_text().partition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise Damaged(f"{path.name} is damaged")
    index = json.loads(body)
    return index["arrays"], index["files"]


def _check_files(folder, files):
    for name, wanted, found in zip(files, files.values(), _digests(folder, files), strict=True):
        if found != wanted:
            raise Damaged(f"{name} is damaged")


def _digests(folder, names):
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(lambda name: _digest(folder / name), names))


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
