"""Seconds from the command to the first answer, by phase: `make bench BENCH=start`.

The model is on this disk already. The first start finds nothing kept: it converts the weights, compiles the kernels and
every step. The others find all of it. --runs says how many of those; the table has each.
"""

import argparse
import sys
import tempfile
import time

import httpx

from runtime import bench
from tests.support import server_process


def first_answer_s(url: str) -> float:
    start = time.perf_counter()
    model = httpx.get(f"{url}/v1/models", timeout=20, trust_env=False).json()["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False).raise_for_status()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--serve-args", default="")
    parser.add_argument("--runs", type=int, default=3, help="starts after the first")
    args = parser.parse_args()
    print("\n".join(f"{name:10} {value}" for name, value in bench.machine().items()))
    with server_process.ours(args.model, *args.serve_args.split()):
        pass  # the demo model is fetched, once a machine
    with tempfile.TemporaryDirectory() as folder:
        kept = {"NUMBA_CACHE_DIR": f"{folder}/kernels"}
        print(f"\n{'':>6} {'ready s':>8} {'answer s':>9} {'MiB':>6}   phases, s")
        for run in range(args.runs + 1):
            words = ["--cache-dir", f"{folder}/cache", *args.serve_args.split()]
            with server_process.ours(args.model, *words, environment=kept) as server:
                answer_s = first_answer_s(server.url)
                spent = "  ".join(f"{name} {s:.1f}" for name, s in server_process.phases(server.banner).items())
                name = f"warm {run}" if run else "cold"
                print(
                    f"{name:>6} {server.seconds:>8.1f} {answer_s:>9.2f} {server.memory_mib:>6,}   {spent}", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
