"""What `runtime.plan` and `runtime.build` print: the plan, what each program takes, and the floors of its speed."""

import dataclasses

from runtime import banner, chips
from runtime.buckets import Bucket
from runtime.config import MIB
from runtime.errors import ConfigError
from runtime.executables import Built
from runtime.footprint import Footprint
from runtime.preparation import Prepared
from runtime.roofline import Floor, floor

CONTEXT = 1024  # tokens of each decoding row, in the estimates


@dataclasses.dataclass(frozen=True)
class Report:
    """An engine and its compiled programs.

    Attributes:
        footprints: {key: Footprint} of every program; empty until they are compiled.
    """

    prepared: Prepared
    footprints: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, prepared: Prepared, built: Built) -> "Report":
        return cls(prepared, {key: Footprint.of(built.table[key]) for key in prepared.programs})

    @property
    def weight_bytes(self) -> int:
        """Of one device."""
        return self.prepared.plan.weight_bytes // len(self.prepared.layout.devices)

    @property
    def page_bytes(self) -> int:
        """Of one device: all pages."""
        plan = self.prepared.plan
        return plan.page_bytes * plan.num_pages // len(self.prepared.layout.devices)

    @property
    def largest(self) -> tuple[Bucket, Footprint]:
        """The step that takes most beside what is always there."""
        steps = {key: found for key, found in self.footprints.items() if isinstance(key, Bucket)}
        return max(steps.items(), key=lambda item: item[1].beside_arguments)

    @property
    def used_bytes(self) -> int:
        """Of one device: the most in use at any time, and every program's code."""
        _, footprint = self.largest
        code = sum(found.code for found in self.footprints.values())
        return footprint.arguments + footprint.beside_arguments - footprint.code + code

    def check_fits(self) -> None:
        """The executables' own figures against the device's memory, as the compiler does for TPUs only.

        Raises:
            ConfigError: they do not fit.
        """
        machine = self.prepared.machine
        if machine.platform != "cpu" and self.used_bytes > machine.memory.total:
            raise ConfigError(
                f"the largest step needs {self.used_bytes / MIB:,.0f} MiB of each device's "
                f"{machine.memory.total / MIB:,.0f}; lower --gpu-memory-utilization or --max-num-batched-tokens"
            )

    def estimate(self, bucket: Bucket) -> Floor | None:
        """The floor of a full step; None for a device whose figures are not known."""
        machine, plan = self.prepared.machine, self.prepared.plan
        chip = chips.of_kind(machine.devices[0].device_kind)
        if chip is None:
            return None
        context = min(CONTEXT, plan.max_model_len) if bucket.is_decode else 0
        rows = bucket.num_rows if bucket.is_decode else 1  # a chunk of one prompt
        return floor(self.prepared, chip, num_tokens=bucket.num_tokens, num_rows=rows, context=context)

    def settled(self) -> str:
        """What is known before anything is compiled, which may take minutes: the plan and the floors, as lines."""
        prepared = self.prepared
        machine, kind = prepared.machine, prepared.machine.devices[0].device_kind
        size, hosts = len(prepared.layout.devices), machine.num_hosts
        each = f", {size // hosts} on each of {hosts} hosts" if hosts > 1 else ""
        lines = [f"{prepared.checkpoint.path.name} on {machine.name}: {size} x {kind}{each}", ""]
        lines += banner.table(prepared.plan.reasons)
        floors = [(key, self.estimate(key)) for key in prepared.programs if isinstance(key, Bucket)]
        if estimates := [(key, found) for key, found in floors if found]:
            lines += ["", "Roofline estimates, not measured: what one step takes at least", ""]
            lines += banner.table([_estimate(key, found) for key, found in estimates])
        return "\n".join(lines)

    def text(self) -> str:
        """What the programs take, as lines."""
        prepared, machine = self.prepared, self.prepared.machine
        size, hosts = len(prepared.layout.devices), machine.num_hosts
        bucket, footprint = self.largest
        rest = machine.memory.total - self.used_bytes
        mib = lambda num: f"{num / MIB:,.0f}"
        rows = [
            ("weights", mib(self.weight_bytes), ""),
            ("pages", mib(self.page_bytes), f"{prepared.plan.num_pages * prepared.plan.page_size:,} tokens"),
            ("largest step", mib(footprint.beside_arguments), f"{bucket}: what it needs beside them"),
            ("all programs", mib(sum(f.code for f in self.footprints.values())), "their code"),
            ("left", mib(rest), f"of {mib(machine.memory.total)} usable"),
        ]
        if hosts > 1:
            rows.append(("a host reads", mib(self.weight_bytes * size // hosts), "of weights, for all its devices"))
        lines = ["", "Memory of each device, MiB", "", *banner.table(rows), ""]
        lines += ["Programs: MiB of each device, and what the devices tell each other in one step", ""]
        rows = [self._row(key, found) for key, found in self.footprints.items()]
        lines += banner.table([("", "temporaries  in place", "collectives"), *rows])
        return "\n".join(lines)

    def _row(self, key, footprint):
        counts = ", ".join(f"{count} {kind}" for kind, count in footprint.collectives().items())
        return str(key), f"{footprint.temporaries / MIB:11,.1f}  {footprint.aliased / MIB:8,.0f}", counts or "none"


def _estimate(bucket, found):
    rate = bucket.num_tokens / found.seconds
    what = f"{bucket.num_rows} rows, each {CONTEXT:,} tokens in" if bucket.is_decode else "one prompt"
    limit = f"{found.bound}-bound: {found.memory_s * 1000:.2f} ms of memory, {found.compute_s * 1000:.2f} of products"
    return str(bucket), f"{found.seconds * 1000:,.2f} ms", f"{rate:,.0f} tokens/s; {limit}; {what}"
