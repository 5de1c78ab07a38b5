"""Accelerators by name: what is publicly known of each, and how many of them a host or a slice of hosts has.

Sources: the system-architecture pages of Google's Cloud TPU documentation and NVIDIA's data sheets (H100 SXM5 80 GB,
H200 SXM5, HGX B200, A100 SXM4 80 GB). FLOPs are dense peaks, of one device as JAX counts them: a TPU7x chip is two.
Memory is what a program may use: on TPUs what the compiler states as available, on GPUs 95% of what the driver reports;
rounded down, so that a plan does not depend on a driver's version.
"""

import dataclasses
import difflib
import re

from runtime.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        name: as in a target, "v6e".
        kind: what JAX calls it, its device_kind.
        counts: {number in a target: topology} of one host; on TPUs as Google names slices.
        memory_bytes: usable, of one device.
        bandwidth: bytes a second between a device and its memory.
        flops: {operand's dtype: multiplications and additions a second}.
        slices: as counts, of several hosts with HOST chips each.
        options: what its compiler is told about every program.
    """

    name: str
    platform: str
    kind: str
    counts: dict[int, str]
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float]
    slices: dict[int, str] = dataclasses.field(default_factory=dict)
    options: dict[str, str] = dataclasses.field(default_factory=dict)

    def topology(self, count: int) -> tuple[str, tuple[int, ...]]:
        """(name, chips of one host along each axis) of the topology of so many."""
        if count in self.slices:
            return self.slices[count], HOST
        name = self.counts[count]
        return name, (*map(int, name.split("x")), 1)[:3]

    def peak(self, dtype: str) -> float:
        """Operations a second on operands of this dtype; those of bfloat16 where it has no figure of its own."""
        return self.flops.get(dtype, self.flops["bfloat16"])


HOST = 2, 2, 1  # chips of each host of a slice, along its axes
# Larger ones are no use to a model that is split by its heads.
FLAT = {16: "4x4", 32: "4x8", 64: "8x8"}
CUBIC = {16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"}
GPUS = {1: "1x1x1", 2: "1x1x2", 4: "1x1x4", 8: "1x1x8"}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", "tpu", "TPU v5 lite", {1: "1x1", 4: "2x2", 8: "2x4"},
            int(15.7 * GIB), 819e9, {"bfloat16": 197e12, "int8": 394e12}, FLAT,
        ),
        # Slices of v5p and TPU7x are named by their TensorCores, two a chip.
        Chip(
            "v5p", "tpu", "TPU v5", {2: "1x1x1", 4: "2x1x1", 8: "2x2x1"},
            int(95.7 * GIB), 2765e9, {"bfloat16": 459e12, "int8": 918e12}, CUBIC,
        ),
        Chip(
            "v6e", "tpu", "TPU v6 lite", {1: "1x1", 4: "2x2", 8: "2x4"},
            int(31.2 * GIB), 1640e9, {"bfloat16": 918e12, "int8": 1836e12}, FLAT,
        ),
        Chip(
            "tpu7x", "tpu", "TPU7x", {2: "1x1x1", 8: "2x2x1"},
            int(94.7 * GIB), 3690e9, {"bfloat16": 1153.5e12, "float8_e4m3fn": 2307e12}, CUBIC,
            # Otherwise products want bfloat16 in tiles of 16 rows, and a program gets its arguments in tiles of 8: each
            # dispatch would copy the weights first.
            {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"},
        ),
        Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", GPUS, 80 * 10**9, 3350e9, {"bfloat16": 989e12, "int8": 1979e12}),
        Chip("h200", "gpu", "NVIDIA H200", GPUS, 141 * 10**9, 4800e9, {"bfloat16": 989e12, "int8": 1979e12}),
        Chip("b200", "gpu", "NVIDIA B200", GPUS, 180 * 10**9, 8000e9, {"bfloat16": 2250e12, "int8": 4500e12}),
        Chip("a100", "gpu", "NVIDIA A100-SXM4-80GB", GPUS, 80 * 10**9, 2039e9, {"bfloat16": 312e12, "int8": 624e12}),
    )
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls so."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def targets() -> tuple[list[str], list[str]]:
    """All that `named` knows: of one host, and of several."""
    alone = [f"{chip.name}-{count}" for chip in CHIPS.values() for count in chip.counts]
    slices = [f"{chip.name}-{count}" for chip in CHIPS.values() for count in chip.slices]
    return alone, slices


def named(target: str) -> tuple[Chip, int]:
    """ "v6e-8" -> the chip, and the number.

    Raises:
        ConfigError: there is no such target; the message names the nearest and all there are.
    """
    match = re.fullmatch(r"([a-z0-9]+?)-(\d+)", target.strip().lower())
    name = ALIASES.get(match[1], match[1]) if match else ""
    counts = CHIPS[name].counts | CHIPS[name].slices if name in CHIPS else {}
    if match and int(match[2]) in counts:
        return CHIPS[name], int(match[2])
    alone, slices = targets()
    if match and counts:
        close = [f"{name}-{min(counts, key=lambda n: abs(n - int(match[2])))}"]
    else:
        close = difflib.get_close_matches(target.lower(), alone + slices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(
        f"target {target!r} is not known{hint} Known, of one host: {', '.join(alone)}; of several: {', '.join(slices)}"
    )
