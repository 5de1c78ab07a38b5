"""The GGUF container: metadata and tensors, checked to the byte.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Values are taken apart here rather than by the
gguf package's reader, which makes an array of each token (4.4 s for a vocabulary of 49,152 on two cores, 2026) and
believes the lengths it reads; the quantised blocks are the package's own.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from converters.rules import ConversionError, TensorInfo

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_DEPTH, MAX_DIMS = 4, 4
# What we know how to turn into numbers; the rest of the package's types are refused by name.
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


class GgufFile:
    """An opened file. A rules.TensorSource under GGUF's own names.

    Attributes:
        metadata: {key: number, bool, str or list}.
        tensors: shapes as numpy has them (GGUF lists axes backwards); quantised ones become float32.
        types: {tensor: its type's name}.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._parse(_Cursor(data, path), len(data))
        except (OSError, ValueError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{path}: cannot be read ({error}); download it again") from error

    def read(self, name: str, rows: slice | None = None, part: int | None = None) -> np.ndarray:
        """As rules.TensorSource has it; with a part, of that element of the first axis."""
        info, kind, (start, nbytes) = self.tensors[name], self.types[name], self._stretches[name]
        shape = info.shape
        if part is not None:
            count, *shape = shape
            nbytes //= count
            start += part * nbytes
        if rows is not None and len(shape) == 1 and kind not in PLAIN:  # its blocks are not rows
            return self.read(name, None, part)[rows]
        if rows is not None:
            row = nbytes // shape[0]
            start, nbytes = start + rows.start * row, (rows.stop - rows.start) * row
            shape = (rows.stop - rows.start, *shape[1:])
        raw = np.empty(nbytes, np.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                got = file.readinto(raw)
        except OSError as error:
            raise ConversionError(f"{self.path}: cannot read tensor {name!r}: {error.strerror}") from error
        if got != nbytes:
            raise ConversionError(f"{self.path}: tensor {name!r} ends after {got:,} of {nbytes:,} bytes")
        if kind in PLAIN:
            return raw.view(info.dtype).reshape(shape)
        blocks = raw.reshape(*shape[:-1], -1)
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(shape)

    def _parse(self, cursor, size):
        if cursor.take(4) != b"GGUF":
            raise ConversionError(f"{self.path}: does not begin with GGUF; is it a GGUF file?")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise ConversionError(f"{self.path}: GGUF version {version} is not known; versions 2 and 3 are")
        num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.string()
            if key in self.metadata:
                raise ConversionError(f"{self.path}: key {key!r} occurs twice")
            self.metadata[key] = cursor.value(cursor.number("<I"))
        self.tensors: dict[str, TensorInfo] = {}
        self.types: dict[str, str] = {}
        self._stretches: dict[str, tuple[int, int]] = {}
        for _ in range(num_tensors):
            self._tensor(cursor)
        self._place(cursor.offset, size)

    def _tensor(self, cursor):
        name, num_dims = cursor.string(), cursor.number("<I")
        if name in self.tensors:
            raise ConversionError(f"{self.path}: tensor {name!r} occurs twice")
        if not 1 <= num_dims <= MAX_DIMS:
            raise ConversionError(f"{self.path}: tensor {name!r} has {num_dims} axes; at most {MAX_DIMS} are known")
        shape = tuple(reversed([cursor.number("<Q") for _ in range(num_dims)]))
        kind, offset = _type_name(cursor.number("<I")), cursor.number("<Q")
        if kind not in PLAIN and kind not in QUANTISED:
            known = ", ".join([*PLAIN, *QUANTISED])
            raise ConversionError(f"{self.path}: tensor {name!r} is of type {kind}; known: {known}")
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        if shape[-1] % block or not all(shape):
            raise ConversionError(f"{self.path}: tensor {name!r} {shape} does not hold whole blocks of {kind}")
        self.tensors[name] = TensorInfo(shape, PLAIN.get(kind, np.dtype(np.float32)))
        self.types[name] = kind
        self._stretches[name] = (offset, math.prod(shape) // block * block_bytes)

    def _place(self, end, size):
        """Turns offsets into the data section into offsets into the file."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ConversionError(f"{self.path}: general.alignment {alignment!r} is not a power of two")
        base = -(-end // alignment) * alignment
        for name, (offset, nbytes) in self._stretches.items():
            if base + offset + nbytes > size:
                raise ConversionError(
                    f"{self.path}: tensor {name!r} ends at byte {base + offset + nbytes:,} of a file of {size:,}; "
                    "it was cut short, download it again"
                )
            self._stretches[name] = (base + offset, nbytes)


class _Cursor:
    """Reads forward through the file's head; a length that goes past the end is an error, never an allocation."""

    def __init__(self, data, path):
        self.data, self.path, self.offset = data, path, 0

    def take(self, count) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            raise ConversionError(
                f"{self.path}: byte {self.offset:,} announces {count:,} more bytes, the file has {len(self.data):,}; "
                "it was cut short or is damaged, download it again"
            )
        self.offset, start = end, self.offset
        return self.data[start:end]

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind, depth=0):
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY or depth == MAX_DEPTH:
            raise ConversionError(f"{self.path}: a value of type {kind} at byte {self.offset:,} is not known")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in SCALARS:
            form = SCALARS[inner]
            raw = self.take(count * struct.calcsize(form))
            return np.frombuffer(raw, np.bool_ if inner == BOOL else np.dtype(form)).tolist()
        # Each element takes eight bytes or more, so a lying count ends at the end of the file.
        return [self.value(inner, depth + 1) for _ in range(count)]


def _type_name(number) -> str:
    try:
        return gguf.GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}"
