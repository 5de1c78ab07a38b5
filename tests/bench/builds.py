"""Published models compiled for hosts that are not here: `make builds`.

One row a step: the largest decode step of up to 64 rows, and the largest chunk. Memory is the executable's own
analysis, of one device; collectives are counted in the optimised HLO, loops unrolled; floors are roofline estimates.
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

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a row's first column, as v6e")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"jax {jax.__version__}\n")
    print(
        f"{'build':26} {'step':15} {'weights':>8} {'pages':>7} {'in place':>8} {'temp.':>6} {'used':>7} "
        f"{'of':>7} {'floor':>8}  {'s':>4}  collectives a step"
    )
    builds = [build for build in (*TPU, *GPU) if args.only in str(build)]
    with tempfile.TemporaryDirectory() as folder:
        missing = [str(build) for build in builds if not table(build, Path(folder))]
    if missing:
        print(f"{len(missing)} of {len(builds)} builds were not compiled: {', '.join(missing)}", file=sys.stderr)
    if not builds:
        print(f"no build has {args.only!r} in its name", file=sys.stderr)
    return 1 if missing or not builds else 0


def table(build, folder: Path) -> bool:
    """Prints a build's rows; False where its compiler is not installed, which costs its rows only."""
    try:
        for step in measured(build, folder):
            step.check()
            report, found = Report(step.prepared, {step.bucket: step.footprint}), step.footprint
            counts = ", ".join(f"{count} {kind}" for kind, count in found.collectives().items()) or "none"
            mib = [report.weight_bytes, report.page_bytes, found.aliased]
            used, memory = found.arguments + found.beside_arguments, step.prepared.machine.memory.total
            print(
                f"{str(build):26} {str(step.bucket):15} {mib[0] / MIB:8,.0f} {mib[1] / MIB:7,.0f} "
                f"{mib[2] / MIB:8,.0f} {found.temporaries / MIB:6,.1f} {used / MIB:7,.0f} {memory / MIB:7,.0f} "
                f"{report.estimate(step.bucket).seconds * 1000:5,.2f} ms  {step.seconds:4.0f}  {counts}",
                flush=True,
            )
    except ConfigError as error:
        print(f"{str(build):26} not compiled: {error}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
