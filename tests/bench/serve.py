"""Our server under load, and a peer after it: `make bench BENCH=serve`.

Starts `python -m runtime.serve` for the demo model in bfloat16 as a process of its own and runs 1, 8 and 32 requests at
once (128 tokens in, 128 out) and 1 and 8 (1024 in, 32 out), several times; the table has medians over the runs. Beside
them: seconds to the first answer by phase, resident memory, and the floor: the time to read the weights once, which no
step can go below while the rows are few, measured after each run of one request.

With PEER_PYTHON (an interpreter that has vLLM) and PEER_MODEL (a folder for it) the peer is started afterwards, never
beside ours, and gets the same loads; ratios are ours over the peer's. Only ratios say something on a borrowed machine.

    python -m tests.bench.peer_model FOLDER     # the demo model's weights for the peer
    make bench BENCH=serve RUNS=3
    make bench BENCH=serve PEER_PYTHON=peer/bin/python PEER_MODEL=models/smollm2 PEER_RUNS=1 PEER_REQUESTS=8

Every flag's default may come from a variable of the same name, as above. LOADS is level:input:output, with commas.
"""

import argparse
import concurrent.futures
import dataclasses
import glob
import json
import os
import secrets
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime import bench
from tests.support import server_process

# What a request says twice it gets several times faster; the peer's tokens come one by one too.
NO_DRAFTS = ["--speculative-config", '{"num_speculative_tokens":0}']
LOADS = "1:128:128,8:128:128,32:128:128,1:1024:32,8:1024:32"
HEADER = (
    f"{'at once':>8} {'in':>5} {'out':>4} {'out tok/s':>10} {'TTFT p50':>9} {'p99':>9} "
    f"{'ITL p50':>8} {'p99':>8} {'p99/p50':>8} {'failed':>6}"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A row of the table: requests at once, tokens in, tokens out."""

    level: int
    input_len: int
    output_len: int

    def __str__(self):
        return f"{self.level:>8} {self.input_len:>5} {self.output_len:>4}"


def shapes(words: str) -> list[Shape]:
    return [Shape(*map(int, word.split(":"))) for word in words.split(",")]


def medians(rows: list[dict]) -> dict:
    """The median of every number over the runs; failures are added up."""
    middle = lambda values: statistics.median(known) if (known := [v for v in values if v is not None]) else None
    times = {
        name: {q: middle([row[name][q] for row in rows]) for q in ("p50", "p99", "mean")}
        for name in ("ttft_ms", "itl_ms", "tpot_ms")
    }
    failed = {"failed": sum(row["failed"] for row in rows), "errors": sorted({e for r in rows for e in r["errors"]})}
    return {"out_tok_s": middle([row["out_tok_s"] for row in rows]), **times, **failed, "runs": rows}


def run_loads(
    url: str, wanted: list[Shape], *, vocab: int, runs: int, requests: int | None, timeout_s: float,
    after: Callable[[], object] = lambda: None,
) -> dict:  # fmt: skip
    """{shape: medians}, printed as they come. Every run has prompts of its own, or the prefix cache would answer.

    Args:
        after: called after each run of one request at a time, while the server idles.
    """
    print(HEADER, flush=True)
    load = bench.Load(url=url, model="", vocab=vocab, timeout_s=timeout_s)
    load = dataclasses.replace(load, model=bench.served_model(load))
    results = {}
    for shape in wanted:
        rows = []
        for _ in range(runs):
            own = dataclasses.replace(
                load, input_len=shape.input_len, output_len=shape.output_len, seed=secrets.randbits(32)
            )
            count = max(shape.level, requests or 3 * shape.level)
            rows.append(bench.measure(own, concurrency=shape.level, num_requests=count))
            if shape.level == 1:
                after()
        results[shape] = medians(rows)
        print(table_line(shape, results[shape]), flush=True)
    return results


def table_line(shape: Shape, row: dict) -> str:
    ttft, itl = row["ttft_ms"], row["itl_ms"]
    ratio = itl["p99"] / itl["p50"] if itl["p50"] else None
    number = lambda value, width, digits: f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"
    columns = ((ttft["p50"], 9, 1), (ttft["p99"], 9, 1), (itl["p50"], 8, 2), (itl["p99"], 8, 2), (ratio, 8, 2))
    text = " ".join([f"{shape} {row['out_tok_s']:>10.1f}", *(number(*column) for column in columns)])
    return "\n".join([f"{text} {row['failed']:>6}", *(f"{'':>8} {error}" for error in row["errors"])])


def read_speed(num_bytes: int, threads: int, repeats: int = 7) -> float:
    """GB/s at which so many threads read so many bytes once: the median of several, as steps are told by theirs."""
    weights = np.ones(num_bytes // 8, np.int64)  # their maximum is what NumPy reads fastest
    parts = np.array_split(weights, threads * 8)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - start)
    return num_bytes / statistics.median(times) / 1e9


def measure_ours(name: str, flags: list[str], args, wanted: list[Shape]) -> dict:
    """Starts our server with these flags, loads it, and prints everything about it."""
    print(f"\nours, {name}")
    with server_process.ours(args.model, *flags) as server:
        about = {
            "seconds_to_ready": server.seconds,
            "phases_s": server_process.phases(server.banner),
            "memory_ready_mib": server.memory_mib,
        }
        spent = "  ".join(f"{phase} {s:.1f}" for phase, s in about["phases_s"].items())
        print(f"ready after {server.seconds:.1f} s ({spent}); {about['memory_ready_mib']:,} MiB resident")
        mib, speeds = server_process.weight_mib(server.banner), []
        read = lambda: speeds.append(read_speed(mib * 2**20, bench.machine()["cpus"])) if mib else None  # type: ignore[arg-type]
        bounds = {"vocab": args.vocab, "requests": args.requests, "timeout_s": args.timeout}
        results = run_loads(server.url, wanted, runs=args.runs, after=read, **bounds)
        about["memory_loaded_mib"] = server.memory_mib
        print(f"{about['memory_loaded_mib']:,} MiB resident after the loads")
    if mib and speeds:
        about |= floor(mib, statistics.median(speeds), results)
    return about | {"results": results}


def floor(mib: int, speed: float, results: dict) -> dict:
    """How near the steps of one request come to reading the weights once, at this speed in GB/s.

    Speed and steps were measured in turns: what memory gives on a borrowed machine changes by the minute.
    """
    floor_ms = mib * 2**20 / speed / 1e6
    alone = [row["itl_ms"]["p50"] for shape, row in results.items() if shape.level == 1 and row["itl_ms"]["p50"]]
    text = f"floor: {mib:,} MiB of weights at {speed:.1f} GB/s are {floor_ms:.1f} ms a step"
    share = f"; one request takes {alone[0]:.1f} ms: {floor_ms / alone[0]:.0%} of what is possible" if alone else ""
    print(text + share)
    return {
        "weights_mib": mib,
        "read_gb_s": speed,
        "floor_ms": floor_ms,
        "share": floor_ms / alone[0] if alone else None,
    }


def measure_peer(args, wanted: list[Shape]) -> dict:
    """vLLM on this machine's CPUs, with the threads and the allocator that serve it best."""
    python, cpus = Path(args.peer_python).absolute(), os.cpu_count() or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    preload = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob(f"{python.parent.parent}/lib/libiomp5.so")
    environment = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": str(cpus), "VLLM_CPU_OMP_THREADS_BIND": f"0-{cpus - 1}", "LD_PRELOAD": ":".join(preload),
    }  # fmt: skip
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(Path(args.peer_model).absolute()),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--dtype", "bfloat16",
        "--max-model-len", "2048",
    ]  # fmt: skip
    print(f"\npeer: vLLM, {len(preload)} of 2 libraries preloaded")
    url = f"http://127.0.0.1:{port}"
    with server_process.ServerProcess(command, url=url, environment=environment, ready_s=1200) as server:
        print(f"ready after {server.seconds:.1f} s; {server.memory_mib:,} MiB resident")
        bounds = {"vocab": args.vocab, "requests": args.peer_requests, "timeout_s": args.timeout}
        results = run_loads(url, wanted, runs=args.peer_runs, **bounds)
        about = {"seconds_to_ready": server.seconds, "memory_loaded_mib": server.memory_mib}
        print(f"{about['memory_loaded_mib']:,} MiB resident after the loads")
    return about | {"preloaded": len(preload), "results": results}


def print_ratios(name: str, ours: dict, peer: dict) -> None:
    """Ours over the peer's: tokens a second, and the times the other way round, so that above 1 is better."""
    print(
        f"\n{name}, times better than the peer\n{'at once':>8} {'in':>5} {'out':>4} {'tok/s':>7} {'TTFT':>7} {'ITL':>7}"
    )
    for shape, row in ours["results"].items():
        other = peer["results"][shape]
        over = lambda a, b: f"{a / b:7.2f}" if a and b else f"{'-':>7}"
        times = " ".join(over(other[key]["p50"], row[key]["p50"]) for key in ("ttft_ms", "itl_ms"))
        print(f"{shape} {over(row['out_tok_s'], other['out_tok_s'])} {times}")


def write(file: Path, measured: dict) -> None:
    """Everything as JSON; a shape becomes level:input:output."""
    named = {
        name: about
        | {"results": {":".join(map(str, dataclasses.astuple(s))): row for s, row in about["results"].items()}}
        for name, about in measured.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": bench.machine(), **named}, indent=1) + "\n")
    print(f"\nwritten: {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, default, kind: Callable[[Any], Any] = str):
        words = os.environ.get(name.upper().replace("-", "_")) or default
        parser.add_argument(f"--{name}", default=None if words is None else kind(words), type=kind)

    add("runs", 3, int)
    add("requests", None, int)
    add("loads", LOADS)
    add("model", None)
    add("dtype", "bfloat16")
    add("serve-args", "")
    add("quantizations", "int8,int4")
    add("vocab", 49_152, int)
    add("timeout", 600, float)
    add("peer-python", None)
    add("peer-model", None)
    add("peer-runs", 3, int)
    add("peer-requests", None, int)
    add("json", server_process.ROOT / ".cache" / "bench" / "serve.json", Path)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if bool(args.peer_python) != bool(args.peer_model):
        print("error: PEER_PYTHON and PEER_MODEL go together", file=sys.stderr)
        return 2
    wanted, flags = shapes(args.loads), ["--dtype", args.dtype, *args.serve_args.split()]
    print("\n".join(f"{name:10} {value}" for name, value in bench.machine().items()))
    print(f"median of {args.runs} runs; random prompts, greedy; times in ms")
    measured = {args.dtype: measure_ours(args.dtype, [*flags, *NO_DRAFTS], args, wanted)}
    alone = [shape for shape in wanted if shape.level == 1]
    measured["drafts"] = measure_ours(f"{args.dtype}, drafting as it does by default", flags, args, alone)
    for method in filter(None, args.quantizations.split(",")):
        try:
            measured[method] = measure_ours(method, [*flags, *NO_DRAFTS, "--quantization", method], args, wanted)
        except RuntimeError as error:
            said = [line for line in str(error).splitlines() if line.startswith("error:")]
            print(f"left out: {said[-1] if said else error}")
    names = list(measured)
    if args.peer_python:
        measured["peer"] = measure_peer(args, wanted)
        for name in names:
            print_ratios(f"ours, {name}", measured[name], measured["peer"])
    write(args.json, measured)
    return int(any(row["failed"] for about in measured.values() for row in about["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
