"""Seconds and host memory of loading a checkpoint's weights: `make bench BENCH=loading`.

Makes a llama checkpoint of random bfloat16 in a temporary folder, in shards as large ones have, and loads its weights
in processes of their own: converted (and kept for the next start), found again, and found again on another mesh than
the one they were kept from. Devices are parts of this CPU, so a process's memory is the weights themselves and what
loading took beside them: the last column is the most it ever had, less the weights. Seconds are of the fastest run, for
other work on the machine only adds to them, and memory is the most of all runs. Files are in the page cache, as after a
download. Ends with 1 where a process ever held over 500 MB beside the weights.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime import bench
from tests.support import server_process

MIB = 2**20
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
SIZES |= {"head_dim": 64, "vocab_size": 32_768}
SHARD_BYTES = 500_000_000
MOST_BESIDE = 500_000_000  # bytes


def make_checkpoint(folder: Path, num_bytes: int) -> int:
    """Writes config.json and the shards with their index; returns the bytes of weights."""
    import ml_dtypes
    from safetensors.numpy import save_file

    D, F, V, H = (SIZES[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    kv = SIZES["num_key_value_heads"] * H
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (D, D)}
    layer |= {"self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, D)}
    layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    nbytes = lambda shapes: 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    num_layers = max(1, round((num_bytes - nbytes(shapes)) / nbytes(layer)))
    for i in range(num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config | SIZES))
    rng, shard, where = np.random.default_rng(0), {}, {}

    def write():
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(shard, folder / name)
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        bits = rng.integers(0, 2**16, shape, np.uint16)
        shard[name] = (bits & 0x807F | 0x3C80).view(ml_dtypes.bfloat16)  # all of one size, about 0.02
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return nbytes(shapes)


def memory_bytes(field: str) -> int:
    """VmRSS, what this process has, or VmHWM, the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load_once(model: str, cache: str, quantization: str, stacked: bool, place: dict) -> dict:
    """Loads the weights onto all devices of this process, or of several that find each other."""
    import jax

    if place:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**place)
    import types

    from converters.checkpoint import open_checkpoint
    from models.interface import abstract, logical_axes
    from runtime import mesh, weights

    plan = types.SimpleNamespace(platform="cpu", dtype="bfloat16", quantization=quantization or None, stacked=stacked)
    checkpoint, size = open_checkpoint(model), len(jax.devices())
    config, options = mesh.fit(checkpoint.config, size, plan.quantization), {"quantization": plan.quantization}
    alone = size == 1 and not stacked
    graph, shapes = abstract(checkpoint.model_class, config, "bfloat16", stacked, in_panels=alone, **options)
    if size == 1:
        tensor, wheres = None, dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    else:
        tensor = mesh.Tensor.over(jax.devices(), config.vocab_size)
        wheres = tensor.shardings(tensor.weight_specs(logical_axes(checkpoint.model_class, config, stacked, **options)))
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    progress = lambda name, done, total: None
    where = shapes, graph.in_panels, wheres
    found = weights.on_devices(checkpoint, config, tensor, *where, plan, cache and Path(cache), progress)
    jax.block_until_ready(found)
    seconds = time.perf_counter() - start
    held = sum(
        {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in found.values() for s in a.addressable_shards}.values()
    )
    peak = memory_bytes("VmHWM")
    return {"seconds": seconds, "before": before, "peak": peak, "weights": held, "beside": peak - held}


def child(*words: str, devices: int) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.bench.loading", "--one", *words]
    return subprocess.Popen(
        command, cwd=server_process.ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def measure(model: Path, cache: Path | None, *, devices=1, processes=1, quantization="", stacked=False) -> list[dict]:
    """What each process of one load says of itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    places = [{"coordinator_address": address, "num_processes": processes, "process_id": i} for i in range(processes)]
    running = []
    try:
        for place in places if processes > 1 else [{}]:
            words = {"model": str(model), "cache": str(cache or ""), "quantization": quantization}
            running.append(child(json.dumps(words | {"stacked": stacked, "place": place}), devices=devices))
        outputs = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        raise RuntimeError(f"a load ended with {[process.returncode for process in running]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--runs", type=int, default=3, help="of each row; the table has the fastest")
    parser.add_argument("--kinds", default="bf16,int8", help="of weights")
    parser.add_argument("--folder", type=Path, help="where to work; needs three times the checkpoint's size")
    parser.add_argument("--json", type=Path, default=server_process.ROOT / ".cache" / "bench" / "loading.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load_once(**json.loads(args.one))))
        return 0
    needed = int(3.2e9 * args.gigabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if (free := shutil.disk_usage(folder).free) < needed:
            print(f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} are needed; give another --folder")
            return 1
        rows = table(folder, int(1e9 * args.gigabytes), args.runs, args.kinds.split(","))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": bench.machine(), "rows": rows}, indent=1) + "\n")
    print(f"written: {args.json}")
    for row in (over := [row for row in rows if row["beside"] > MOST_BESIDE]):
        name = f"{row['kind']} from {row['source']} on {row['devices']}"
        print(f"{name} held {row['beside'] / MIB:,.0f} MiB beside the weights, over {MOST_BESIDE / MIB:,.0f}")
    return 1 if over else 0


def most(samples: Sequence[dict]) -> dict:
    """The most that any of them says, number by number."""
    return {name: max(sample[name] for sample in samples) for name in samples[0]}


def table(folder: Path, num_bytes: int, runs: int, kinds: Sequence[str]) -> list[dict]:
    print("\n".join(f"{name:10} {value}" for name, value in bench.machine().items()))
    model = folder / "model"
    model.mkdir()
    size = make_checkpoint(model, num_bytes)
    print(f"weights    {size / 1e9:.2f} GB of bfloat16, the fastest of {runs}\n")
    titles = f"{'s':>7} {'GB/s':>6} {'MiB: weights':>13} {'most':>7} {'beside':>7}"
    print(f"{'devices':>9} {'weights':>8} {'from':>22} {titles}")
    rows = []

    def row(kind, source, cache, devices, *, clear=False, **options):
        samples = []
        for _ in range(runs):
            if clear:
                shutil.rmtree(cache, ignore_errors=True)
            samples.append(most(measure(model, cache, devices=devices, **options)))
        one = most(samples) | {"seconds": min(sample["seconds"] for sample in samples)}
        where = f"{options['processes']} x {devices}" if options.get("processes", 1) > 1 else str(devices)
        rows.append({"devices": where, "kind": kind, "source": source} | one | {"samples": samples})
        mib = [round(one[name] / MIB) for name in ("weights", "peak", "beside")]
        speed = size / one["seconds"] / 1e9
        print(
            f"{where:>9} {kind:>8} {source:>22} {one['seconds']:>7.2f} {speed:>6.2f} {mib[0]:>13,} {mib[1]:>7,} "
            f"{mib[2]:>7,}", flush=True,
        )  # fmt: skip

    for kind in kinds:
        options = {} if kind == "bf16" else {"quantization": kind}
        cache = folder / "cache"
        for devices in (1, 2, 4):
            row(kind, "safetensors", None, devices, **options)
        row(kind, "safetensors, kept", cache, 1, clear=True, **options)
        for devices in (1, 2, 4, 8):
            row(kind, "kept" if devices == 1 else "kept by 1", cache, devices, **options)
        row(kind, "safetensors, kept", cache, 4, clear=True, **options)
        for devices in (4, 2, 1):
            row(kind, "kept" if devices == 4 else "kept by 4", cache, devices, **options)
        row(kind, "safetensors", None, 1, processes=2, **options)
        row(kind, "safetensors, kept", cache, 1, processes=2, clear=True, **options)
        row(kind, "kept by 2 x 1", cache, 1, processes=2, **options)
        shutil.rmtree(cache)
    return rows


if __name__ == "__main__":
    sys.exit(main())
