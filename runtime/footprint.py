"""What a compiled program takes of each device and says to the others: read from the executable itself.

The optimised HLO is text: computations of instructions, which call each other. An instruction counts as often as its
computation runs in one call of the program: a loop of known length as often as it turns, any other loop once (a window
of decode steps then counts as one step), and of a conditional's branches all.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# Instructions that write an array, or a part of it, in another place and compute nothing; and those that do not even.
MOVES = {"copy", "transpose", "slice", "dynamic-slice", "gather", "concatenate", "pad"}
PASSIVE = {"parameter", "constant", "bitcast", "reshape", "get-tuple-element", "tuple", "convert"}
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# TPUs do not say it there; a scan's condition is `ROOT %x = pred[] compare(%i, %n), direction=LT`, from 0 on.
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"^\s+%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_COUNTS_UP = re.compile(r"^\s+ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT")
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]+m[0-9]+[a-z]*)?)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """One result of an instruction.

    Attributes:
        dtype: HLO's name: "bf16".
        is_main: it lies in the device's main memory, not in one that is on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    is_main: bool

    @property
    def num_bytes(self) -> int:
        bits = BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype) or 32)
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One that matters: a collective or a move.

    Attributes:
        op: its name, without -start; "fusion" is one of nothing but moves.
        arrays: its results. What starts a copy has two: where it goes, and where it comes from.
        times: how often it runs in one call.
    """

    op: str
    arrays: tuple[Array, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes are of one device.

    Attributes:
        arguments: weights, state and inputs. aliased: results that took the memory of arguments.
        outputs: results, the aliased ones included. temporaries: what the program needs beside.
        code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    instructions: tuple[Instruction, ...]

    @classmethod
    def of(cls, compiled: Any) -> "Footprint":
        """Args: compiled: what jit(...).lower(...).compile() returns."""
        memory = compiled.memory_analysis()
        return cls(
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
            tuple(instructions(compiled.as_text())),
        )

    @property
    def beside_arguments(self) -> int:
        """Memory that a call takes beside its arguments."""
        return self.temporaries + self.outputs - self.aliased + self.code

    def collectives(self) -> dict[str, int]:
        """{kind: how many one call runs}; kinds that do not occur are left out."""
        counts = collections.Counter()
        for instruction in self.instructions:
            if instruction.op in COLLECTIVES:
                counts[instruction.op] += instruction.times
        return dict(counts)

    def moved(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[Instruction]:
        """What is copied from main memory to main memory and is as large as one of these (HLO dtype, shape).

        An array may be copied in another order of its axes, and be a part of another; axes of one element do not count.
        """
        alike = lambda dtype, shape: (dtype, tuple(sorted(side for side in shape if side > 1)))
        wanted = {alike(*shape) for shape in shapes}
        return [
            move for move in self.moves() if any(alike(a.dtype, a.shape) in wanted for a in move.arrays if a.is_main)
        ]

    def moves(self) -> list[Instruction]:
        """What is copied from main memory to main memory."""
        found = [found for found in self.instructions if found.op not in COLLECTIVES]
        return [f for f in found if any(a.is_main for a in f.arrays) and (f.op != "copy" or _stays(f.arrays))]

    def gathered(self) -> list[Array]:
        """The results of all-gathers."""
        return [array for found in self.instructions if found.op == "all-gather" for array in found.arrays]


def instructions(hlo: str, unknown_turns: int = 1) -> list[Instruction]:
    """The collectives and moves of an optimised HLO module; loops of unknown length turn `unknown_turns` times."""
    found = []
    contents: dict[str, set[str]] = collections.defaultdict(set)
    for line in executed(hlo, unknown_turns):
        arrays, op = _arrays(line.result), line.op.removesuffix("-start")
        does = {op}
        if op == "fusion":  # what it calls stands before it
            does = set[str]().union(*(contents[callee] for callee, _ in _CALLED.findall(line.text)))
        if any(array.shape for array in arrays):  # the others are indices
            contents[line.computation] |= does
        if line.op == f"{op}-start" and op in MOVES - {"copy"}:  # names what it reads, what it writes, and a context
            arrays = tuple(array for array in arrays if array.shape)[-1:]
        # Inside of a fusion a copy is an index, and nothing is written.
        is_move = does & MOVES and does <= MOVES | PASSIVE and not line.is_fused
        if line.times and (op in COLLECTIVES or is_move):
            found.append(Instruction(op, arrays, line.times))
    return found


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction as it is written.

    Attributes:
        times: how often it runs in one call.
        is_fused: it is a part of another instruction.
    """

    text: str
    result: str
    op: str
    computation: str
    times: int
    is_fused: bool


def executed(hlo: str, unknown_turns: int = 1) -> list[Line]:
    """All instructions of an optimised HLO module; loops of unknown length turn `unknown_turns` times."""
    found: list[tuple[str, re.Match, str]] = []
    calls: dict[str, list[tuple[str, int | str]]] = collections.defaultdict(list)  # callee, and turns or its condition
    constants: dict[str, int] = {}
    limits: dict[str, int] = {}
    fused: set[str] = set()
    name = entry = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
            constants = {}
            continue
        if match := _CONSTANT.match(line):
            constants[match[1]] = int(match[2])
        elif (match := _COUNTS_UP.match(line)) and match[1] in constants:
            limits[name] = constants[match[1]]
        if not (match := _INSTRUCTION.match(line)):
            continue
        found.append((line, match, name))
        turns: int | str = 1
        if match[2] == "while":
            known, condition = _TURNS.search(line), _CONDITION.search(line)
            turns = int(known[1]) if known else condition[1] if condition else unknown_turns
        for one, several in _CALLED.findall(line):
            for callee in [one] if one else re.findall(r"[\w.-]+", several):
                calls[name].append((callee, turns))
                if match[2] == "fusion":
                    fused.add(callee)
    times: dict[str, int] = collections.Counter()

    def visit(computation, count):
        times[computation] += count
        for callee, turns in calls[computation]:
            visit(callee, count * (turns if isinstance(turns, int) else limits.get(turns, unknown_turns)))

    visit(entry, 1)
    return [Line(line, match[1], match[2], name, times[name], name in fused) for line, match, name in found]


def _stays(arrays) -> bool:
    """Whether a copy goes from main memory to main memory: the context after these two has no shape."""
    return all(array.is_main for array in arrays[:2] if array.shape)


def _arrays(result: str) -> tuple[Array, ...]:
    """Of an instruction's result type, as `f32[8,128]{1,0:T(8,128)S(1)}`; S(n) names memory that is not main."""
    return tuple(
        Array(dtype, tuple(int(side) for side in sides.split(",") if side), "S(" not in layout)
        for dtype, sides, layout in _ARRAY.findall(result)
    )
