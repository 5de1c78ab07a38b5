"""The weight map: a table a family, and the functions that check and apply it.

A Rule reads: this checkpoint tensor, after this change, is that parameter, or that part of it.
    {i}   a layer number; where the model's layers are stacked it becomes the parameter's first index
    {e}   an expert number; it becomes the next index
    part  where in the parameter the tensor goes, for tensors that are fused into one parameter
    target None drops the tensor; several rules on one source split it

All names and shapes are checked before a byte of data is read.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class ConversionError(ValueError):
    """A checkpoint cannot be used as it is; the message names the file, the tensor or field, and the remedy."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorSource(Protocol):
    """Named tensors in files, each read when asked for."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or these rows of its first axis, `rows.start` to `rows.stop`, in memory of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a family's table.

    Attributes:
        source: "model.layers.{i}.mlp.up_proj.weight".
        target: "layers.{i}.mlp.gate_up.kernel", or None.
        change: makes the part from the tensor: a view of it wherever that is possible.
        part: index of the part in the parameter, as made by numpy.s_; () is all of it.
    """

    source: str
    target: str | None
    change: Callable[[np.ndarray], np.ndarray] = lambda w: w
    part: Any = ()

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        pattern = re.escape(self.source).replace(r"\{i\}", r"(?P<i>\d{1,6})").replace(r"\{e\}", r"(?P<e>\d{1,6})")
        return re.compile(pattern)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor's place in a parameter: parameter[index] = change(tensor)."""

    name: str
    change: Callable[[np.ndarray], np.ndarray]
    index: tuple


class Pieces(list[Piece]):
    """The pieces of one parameter, found by where they are: experts of many layers are thousands in one array."""

    @functools.cached_property
    def _by_place(self) -> tuple[int, dict[tuple, list[Piece]]]:
        """How many axes number the pieces, and {numbers: those pieces}."""
        leading = [next((i for i, at in enumerate(p.index) if isinstance(at, slice)), len(p.index)) for p in self]
        depth, places = min(leading, default=0), collections.defaultdict(list)
        for piece in self:
            places[piece.index[:depth]].append(piece)
        return depth, places

    def near(self, box: Sequence[slice]) -> Iterator[Piece]:
        """Those that may meet a part of the parameter, given as one slice with both ends for each axis."""
        depth, places = self._by_place
        for place in itertools.product(*(range(side.start, side.stop) for side in box[:depth])):
            yield from places.get(place, ())


def match_tensors(tensors: Mapping[str, TensorInfo], rules: list[Rule], shapes: Mapping[str, Any]) -> dict[str, Pieces]:
    """Finds the tensors of every parameter, and accounts for every tensor and every element.

    Args:
        shapes: {parameter path: anything with .shape}, from models.interface.abstract.

    Raises:
        ConversionError: no rule for a tensor, a wrong shape, a parameter left empty or filled twice.
    """
    pieces = collections.defaultdict(Pieces)
    for name, info in tensors.items():
        matches = [(rule, match) for rule in rules if (match := rule.pattern.fullmatch(name))]
        if not matches:
            _check_floats(name, info)
            raise ConversionError(
                f"no rule for tensor {name!r} {info.shape}; compare config.json, or add a rule (target None drops it)"
            )
        for rule, match in matches:
            if rule.target is not None:
                _check_floats(name, info)
                path, index = _place(name, rule, match, shapes)
                _check_shape(name, info, rule, path, index, shapes[path].shape)
                pieces[path].append(Piece(name, rule.change, index))
    if missing := sorted(shapes.keys() - pieces.keys()):
        raise ConversionError(f"{len(missing)} parameters got no tensor, first {missing[0]!r}; is a shard missing?")
    for path, parts in pieces.items():
        _check_filled(path, parts, shapes[path].shape)
    return {path: pieces[path] for path in shapes}


def _place(name, rule, match, shapes):
    """The parameter a tensor belongs to, and its index there."""
    numbers = match.groupdict()
    path, index = rule.target.format(**numbers), []
    stacked = rule.target.replace(".{i}", "").format(**numbers)
    if path not in shapes and "i" in numbers and stacked in shapes:
        path, index = stacked, [int(numbers["i"])]
    if path not in shapes:
        raise ConversionError(f"tensor {name!r} belongs to {path!r}, which the model lacks; compare config.json")
    if "e" in numbers:
        index.append(int(numbers["e"]))
    return path, (*index, *(rule.part if isinstance(rule.part, tuple) else (rule.part,)))


def _check_floats(name, info):
    if info.dtype.kind in "iub":
        raise ConversionError(
            f"tensor {name!r} holds {info.dtype.name}: these weights are quantised in a way that is not read; use the "
            "unquantised checkpoint with --quantization int8 or int4, or a GGUF"
        )


def _check_shape(name, info, rule, path, index, shape):
    """Applies the rule to an array of this shape that takes no memory."""
    room = f"a part of {path!r}" if index else repr(path)
    try:
        want = np.broadcast_to(np.False_, shape)[index].shape
    except IndexError:
        raise ConversionError(f"tensor {name!r} is number {index}, beyond {path!r} {shape}; see config.json") from None
    try:
        got = rule.change(np.broadcast_to(np.zeros((), info.dtype), info.shape)).shape
    except ValueError:
        raise ConversionError(
            f"tensor {name!r} is {info.shape} and cannot fill {room} {want}; compare config.json"
        ) from None
    if got != want:
        raise ConversionError(f"tensor {name!r} {info.shape} gives {got}, but {room} is {want}; compare config.json")


def _check_filled(path, parts, shape):
    filled = np.zeros(shape[: max((len(piece.index) for piece in parts), default=0)], np.int8)
    for piece in parts:
        filled[piece.index] += 1
    if (filled > 1).any():
        names = ", ".join(repr(piece.name) for piece in parts[:3])
        raise ConversionError(f"parameter {path!r} is filled more than once, by {names}; drop one of them")
    if (filled < 1).any():
        missing = tuple(int(n) for n in np.argwhere(filled < 1)[0])
        raise ConversionError(f"parameter {path!r} got no tensor for {missing}; is a shard missing?")


def heads(num_kv_heads: int, head_dim: int):
    """[N*H, ...] -> [K, G, H, ...]: query heads by the kv head they share."""
    return lambda w: w.reshape(num_kv_heads, -1, head_dim, *w.shape[1:])


def kv_heads(head_dim: int):
    """[K*H, ...] -> [K, H, ...]."""
    return lambda w: w.reshape(-1, head_dim, *w.shape[1:])
