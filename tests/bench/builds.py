"""Published models compiled for hosts that are not here: `make builds` prints README's table of them.

Megabytes are of one device, by the executables' own analysis: what it holds, what steps take beside that (a decode step
of up to 64 rows, one of as many as run at once, and the largest chunk), and all that the largest of them uses.
Collectives are those of the smaller decode step in the optimised HLO, loops unrolled. Floors are roofline estimates.
The same builds are tests, which `make tpu` and `make gpu` run. Ends with 1 where a build was not compiled or none was
named, for then the table is not whole.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax

from runtime.errors import ConfigError
from runtime.report import Report
from tests.support.published import GPU, TPU, measured

MB = 10**6
TITLES = ("build", "weights", "pages", "temporaries: 64 rows", "most rows", "chunk", "used", "of")
TITLES += ("floor, ms: 64 rows", "chunk", "collectives of a decode step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a row's first column, as v6e")
    parser.add_argument("--usual-layouts", action="store_true", help="weights do not lie as the decode step wants them")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"jax {jax.__version__}\n")
    print("|".join(["", *(f" {title} " for title in TITLES), ""]))
    print("|---" + "|--:" * (len(TITLES) - 2) + "|---|", flush=True)
    builds = [build for build in (*TPU, *GPU) if args.only in str(build)]
    with tempfile.TemporaryDirectory() as folder:
        missing = [str(build) for build in builds if not table(build, Path(folder), args.usual_layouts)]
    if missing:
        print(f"{len(missing)} of {len(builds)} builds were not compiled: {', '.join(missing)}", file=sys.stderr)
    if not builds:
        print(f"no build has {args.only!r} in its name", file=sys.stderr)
    return 1 if missing or not builds else 0


def table(build, folder: Path, in_usual_layouts: bool) -> bool:
    """Prints a build's row; False where its compiler is not installed, which costs its row only."""
    try:
        steps = list(measured(build, folder, in_usual_layouts))
    except ConfigError as error:
        print(f"{build} is not compiled: {error}")
        return False
    for step in () if in_usual_layouts else steps:
        step.check()
    if steps:
        print(row(build, steps), flush=True)
    return True


def row(build, steps) -> str:
    prepared = steps[0].prepared
    report = Report(prepared, {step.bucket: step.footprint for step in steps})
    decodes = sorted((step for step in steps if step.bucket.is_decode), key=lambda step: step.bucket)
    chunk = next(step for step in steps if not step.bucket.is_decode)
    held = [report.weight_bytes, report.page_bytes]
    temporaries = [step.footprint.temporaries for step in (decodes[0], decodes[-1], chunk)]
    used = max(step.footprint.arguments + step.footprint.beside_arguments for step in steps)
    numbers = [f"{size / MB:,.0f}" for size in (*held, *temporaries, used, prepared.machine.memory.total)]
    floors = [f"{report.estimate(step.bucket).seconds * 1000:,.1f}" for step in (decodes[0], chunk)]
    counts = ", ".join(f"{count} {kind}" for kind, count in decodes[0].footprint.collectives().items()) or "none"
    return f"| {' | '.join([str(build), *numbers, *floors, counts])} |"


if __name__ == "__main__":
    sys.exit(main())
