"""Safetensors folders, read tensor by tensor without torch and without trust.

Format: https://huggingface.co/docs/safetensors: eight bytes of header length, a JSON header, the tensors' bytes.
Every size and offset is checked against the file before anything is allocated. Pickled weights are never opened.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TypeGuard

import ml_dtypes
import numpy as np

from converters.rules import ConversionError, TensorInfo

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
MAX_JSON_BYTES = 64_000_000
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Where a tensor lies: bytes [start, end) of a file."""

    path: Path
    start: int
    end: int


class Shards:
    """All tensors of a folder's safetensors files. A rules.TensorSource."""

    def __init__(self, folder: Path):
        self.files = shard_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._stretches: dict[str, Stretch] = {}
        for path in self.files:
            for name, (info, stretch) in read_header(path).items():
                if name in self.tensors:
                    raise ConversionError(f"tensor {name!r} is in {self._stretches[name].path.name} and {path.name}")
                self.tensors[name], self._stretches[name] = info, stretch
        if not self.tensors:
            raise ConversionError(f"{folder}: the safetensors files hold no tensors; download them again")

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        info, stretch = self.tensors[name], self._stretches[name]
        shape = info.shape if rows is None else (rows.stop - rows.start, *info.shape[1:])
        array = np.empty(shape, info.dtype)
        before = 0 if rows is None else rows.start * math.prod(info.shape[1:]) * info.dtype.itemsize
        try:
            with open(stretch.path, "rb") as file:
                file.seek(stretch.start + before)
                got = file.readinto(array.reshape(-1).view(np.uint8)) if array.size else 0
        except OSError as error:
            raise ConversionError(f"{stretch.path}: cannot read tensor {name!r}: {error.strerror}") from error
        if got != array.nbytes:
            raise ConversionError(f"{stretch.path}: tensor {name!r} ends after {got:,} of {array.nbytes:,} bytes")
        return array


def shard_files(folder: Path) -> list[Path]:
    """The files to read: those the index names, else model.safetensors, else the only ones there are.

    Raises:
        ConversionError: none, one missing, one outside the folder, or only pickled weights.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed_names(index)
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ConversionError(f"{index}: names the shard {name!r}, which is no safetensors file in this folder")
            if not (folder / name).is_file():
                raise ConversionError(f"{folder}: shard {name!r} of {index.name} is missing; download it")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    if files:
        return files
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ConversionError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when opened, so it is not read; "
            "use a checkpoint with .safetensors files, or convert it once with safetensors' own converter"
        )
    raise ConversionError(f"{folder}: no .safetensors file; is the download complete?")


def _indexed_names(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConversionError(f"{index}: weight_map is not an object of file names; download it again")
    return sorted(set(weight_map.values()))


def read_json(path: Path) -> dict:
    """A JSON object from a file of reasonable size.

    Raises:
        ConversionError: not there, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConversionError(f"{path}: {path.stat().st_size:,} bytes is too large for a JSON file of a model")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}; is the download complete?") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds a {type(value).__name__}, not an object; download it again")
    return value


def read_header(path: Path) -> dict[str, tuple[TensorInfo, Stretch]]:
    """What a safetensors file holds and where, checked to the byte.

    Raises:
        ConversionError: anything that does not fit the format or the file's size.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise ConversionError(
                    f"{path}: is a pointer of git-lfs, not the weights; run git lfs pull in that folder"
                )
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ConversionError(f"{path}: a header of {length:,} bytes in a file of {size:,}; download it again")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path}: the header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: the header is not an object; download it again")
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, (_, stretch) in sorted(found.items(), key=lambda item: (item[1][1].start, item[1][1].end)):
        if stretch.start != end:
            raise ConversionError(
                f"{path}: tensor {name!r} begins at byte {stretch.start:,}, not {end:,}, where the last ended"
            )
        end = stretch.end
    if end != size:
        raise ConversionError(f"{path}: the tensors end at byte {end:,} and the file at {size:,}; download it again")
    return found


def _unique(pairs):
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(path, name, entry, base):
    if not isinstance(entry, dict):
        raise ConversionError(f"{path}: tensor {name!r} is described by a {type(entry).__name__}, not an object")
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ConversionError(f"{path}: tensor {name!r} has dtype {kind!r}; known: {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if not _is_sizes(shape) or len(shape) > 8:
        raise ConversionError(f"{path}: tensor {name!r} has shape {shape!r}, not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConversionError(f"{path}: tensor {name!r} has data_offsets {offsets!r}, not [begin, end]")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ConversionError(
            f"{path}: tensor {name!r} {tuple(shape)} of {kind} is {nbytes:,} bytes, "
            f"data_offsets hold {offsets[1] - offsets[0]:,}"
        )
    if base + offsets[1] > os.path.getsize(path):
        raise ConversionError(f"{path}: tensor {name!r} ends beyond the file; it was cut short, download it again")
    return TensorInfo(tuple(shape), dtype), Stretch(path, base + offsets[0], base + offsets[1])


def _is_sizes(values) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
