"""Draws what `make bench BENCH="scale serve"` measured, as README shows it: `make plots`.

    throughput.svg   output tokens a second over requests at once, ours and a peer's where one was measured
    latency.svg      time to the first token and gaps between tokens, median and 99th percentile, over requests at once

Reads .cache/bench/scale.json and .cache/bench/serve.json, of which either may be missing. Needs matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.support.server_process import ROOT

COLOURS = {"bfloat16": "#2463a8", "int8": "#2f9e6e", "peer": "#a8a8a8"}
NAMES = {"bfloat16": "this server, bfloat16", "int8": "this server, int8", "peer": "vLLM, bfloat16"}


def read(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


def by_level(rows: list[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    known = sorted((level, value) for level, value in rows if value is not None)
    return [level for level, _ in known], [value for _, value in known]


def axis_of_levels(axis: Axes, levels: list[int], **words) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(levels, [str(level) for level in levels])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.set(xlabel="requests at once", **words)


def draw_throughput(scale: dict | None, serve: dict | None, file: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis, levels = figure.subplots(), set()
    if scale:
        rows = [row for row in scale["rows"] if row["input_len"] == scale["rows"][0]["input_len"]]
        x, y = by_level([(row["concurrency"], row["out_tok_s"]) for row in rows])
        axis.plot(x, y, "o-", color=COLOURS["bfloat16"], alpha=0.45, label="this server, 128 in and 64 out")
        levels.update(x)
    for name in [name for name in NAMES if serve and name in serve]:
        assert serve is not None
        shapes = [(key.split(":"), row) for key, row in serve[name]["results"].items()]
        x, y = by_level([(int(level), row["out_tok_s"]) for (level, *size), row in shapes if size == ["128", "128"]])
        axis.plot(x, y, "s-", color=COLOURS[name], label=f"{NAMES[name]}, 128 in and 128 out")
        levels.update(x)
    axis_of_levels(axis, sorted(levels), ylabel="output tokens a second")
    axis.legend(frameon=False)
    figure.savefig(file)


def draw_latency(scale: dict, file: Path) -> None:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    rows = [row for row in scale["rows"] if row["input_len"] == scale["rows"][0]["input_len"]]
    for axis, key, name in zip(figure.subplots(1, 2), ("ttft_ms", "itl_ms"), ("first token", "gap"), strict=True):
        for q, style in (("p50", "o-"), ("p99", "o:")):
            x, y = by_level([(row["concurrency"], row[key][q]) for row in rows])
            axis.plot(x, y, style, color=COLOURS["bfloat16"], label=q)
        axis_of_levels(axis, x, ylabel=f"{name}, ms")
        axis.legend(frameon=False)
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=ROOT / ".cache" / "bench")
    parser.add_argument("--to", type=Path, default=ROOT / "tests" / "bench" / "plots")
    args = parser.parse_args()
    scale, serve = read(args.measured / "scale.json"), read(args.measured / "serve.json")
    if not scale and not serve:
        print(f'error: nothing was measured in {args.measured}; run make bench BENCH="scale serve"', file=sys.stderr)
        return 1
    args.to.mkdir(parents=True, exist_ok=True)
    draw_throughput(scale, serve, args.to / "throughput.svg")
    if scale:
        draw_latency(scale, args.to / "latency.svg")
    print(f"drawn in {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
