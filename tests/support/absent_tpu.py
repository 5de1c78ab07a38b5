"""Compiling for a TPU that is not there, with the real compiler (libtpu), on a machine that has none.

`compile_for` gives the executable; with `dump` also the final schedule of a kernel, as loops and units in use. What the
compiler thinks that the rest takes, XLA's own instructions, is in the executable's text.
"""

import dataclasses
import glob
import importlib.util
import os
import pathlib
import re
import time

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}


def prepare(dump: pathlib.Path | None = None) -> str | None:
    """Sets what libtpu reads when it first loads. Returns why it cannot be used, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'jax[tpu]' brings it, no TPU needed"
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return None


def compile_for(chip, function, shapes, donate=()):
    """Lowers and compiles for one chip. Returns the executable and the seconds it took."""
    start = time.perf_counter()
    return traced(chip, function, shapes, donate).lower().compile(), time.perf_counter() - start


def traced(chip, function, shapes, donate=()):
    """jit(function).trace(...) for one chip."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).trace(*args)


def pallas_grids(jaxpr) -> list[tuple]:
    """The grids of all Pallas calls inside; a side that is known at run time only is no int."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation.params["grid_mapping"].grid)
            continue
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                part = getattr(part, "jaxpr", part)
                found += pallas_grids(part) if hasattr(part, "eqns") else []
    return found


def pallas_names(hlo: str) -> list[str]:
    """What the compiler calls the Pallas kernels of a program."""
    return re.findall(r'^\s+(?:ROOT )?%?(\S+) = .*custom_call_target="tpu_custom_call"', hlo, re.MULTILINE)


def scoped_vmem(hlo: str) -> int:
    """Bytes of vector memory that the Pallas kernel which asks for most has to itself."""
    sizes = re.findall(r'custom_call_target="tpu_custom_call".*?"memory_space":"1","offset":"\d+","size":"(\d+)"', hlo)
    return max(map(int, sizes), default=0)


def estimated_cycles(hlo: str, unknown_turns=1) -> int:
    """Of XLA's own instructions by its cost model, loops unrolled; Pallas kernels have none.

    Of a few small ones, as the running sum of experts' sizes, it says the largest number there is: they are left out.
    """
    from runtime.footprint import executed

    found = [(re.search(r'"estimated_cycles":"(\d+)"', line.text), line) for line in executed(hlo, unknown_turns)]
    cycles = [int(match[1]) * line.times for match, line in found if match and not line.is_fused]
    return sum(count for count in cycles if count < 2**60)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the final program, written bundles [first, end): one issues a cycle unless a unit stalls."""

    first: int
    end: int
    depth: int
    uses: dict

    @property
    def bundles(self):
        return self.end - self.first

    def inside(self, loops):
        """The loops right inside this one."""
        return [l for l in loops if self.first <= l.first and l.end <= self.end and l.depth == self.depth + 1]


@dataclasses.dataclass(frozen=True)
class Schedule:
    bundles: int
    uses: dict
    loops: list[Loop]


def bundle_files(dump: pathlib.Path, kernel: str = "") -> list[pathlib.Path]:
    """Final programs of a kernel or, when it has no name, of all kernels and XLA's own; start and end are left out."""
    return [
        path
        for path in dump.glob("*-final_bundles.txt")
        if kernel in path.name and not re.match(r"\d+-(<|TLP)", path.name)
    ]


def schedule(dump: pathlib.Path, kernel: str) -> Schedule:
    """Reads the newest static schedule of a kernel from a dump folder. No stalls, no memory latency: a lower bound."""
    newest = max(bundle_files(dump, kernel), key=lambda p: p.stat().st_mtime)
    bundles = [line for line in newest.read_text().splitlines() if re.match(r"\s*0x[0-9a-f]+", line)]
    uses = _uses(newest)

    def between(first, end):
        return dict(zip(UNITS, (sum(column) for column in zip(*uses[first:end], strict=True)), strict=True))

    heads, spans = {}, set()
    for i, line in enumerate(bundles):
        if "LB:" in line.split("{")[0]:
            heads.update({region: i for region in re.findall(r"Start region (\d+)", line)})
        spans.update((heads[r], i + 1) for r in re.findall(r"target = \$region(\d+)", line) if r in heads)
    loops = [
        Loop(first, end, bundles[first].split("{")[0].count(">"), between(first, end)) for first, end in sorted(spans)
    ]
    return Schedule(len(bundles), between(0, len(uses)), loops)


def bundles_and_spills(dump: pathlib.Path) -> tuple[int, int]:
    """Of all programs together, XLA's own among them, each counted once."""
    found = [_uses(path) for path in bundle_files(dump)]
    return sum(map(len, found)), sum(use[UNITS.index("SPILL")] for uses in found for use in uses)


def _uses(bundles: pathlib.Path) -> list[list[int]]:
    """Of each bundle, how many instructions each unit has."""
    stem, name = re.match(r"(\d+)-(.*)-\d+-final_bundles.txt", bundles.name).groups()
    (path,) = bundles.parent.glob(f"{stem}-{glob.escape(name)}-*final_hlo-static-per-bundle-utilization.txt")
    rows = path.read_text().split("== UTILIZATION:")[1].splitlines()
    return [list(map(int, row.split())) for row in rows if re.fullmatch(r"\d+( \d+){9}", row.strip())]
