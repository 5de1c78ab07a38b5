"""Run as a program: what a tiny model's weights are on one mesh after another, however they came there, as JSON.

mesh_weights.py FAMILY CHANGES RUNS     JSON each, but for the family

RUNS is a list of [devices, options]; options: quantization, stacked, cache (a name; "" keeps nothing). Each line says
whether the source was read, and gives a digest of every weight as the whole model has it and of each device's part.
"""

import hashlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import tiny

from converters.checkpoint import open_checkpoint
from models.interface import abstract
from runtime import weights
from runtime.preparation import Layout


def digest(array) -> str:
    array = np.ascontiguousarray(np.asarray(array))
    return hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).hexdigest()[:12]


def placed(checkpoint, folder, devices, quantization="", stacked=False, cache=""):
    method = quantization or None
    plan = types.SimpleNamespace(platform="cpu", dtype="bfloat16", quantization=method, stacked=stacked)
    layout = Layout.of(checkpoint, stacked, method, jax.devices()[:devices])
    _, shapes = abstract(checkpoint.model_class, layout.config, jax.numpy.bfloat16, stacked, quantization=method)
    asked = []
    source = checkpoint.source
    read = type(source).read
    type(source).read = lambda self, *key: asked.append(key) or read(self, *key)
    try:
        found = weights.on_devices(
            checkpoint, layout.config, layout.tensor, shapes, frozenset(), layout.shardings(shapes),
            plan, cache and Path(folder) / cache, lambda *progress: None,
        )  # fmt: skip
    finally:
        type(source).read = read
    assert {n: a.sharding for n, a in found.items()} == layout.shardings(shapes) and list(found) == list(shapes)
    parts = {
        name: [digest(part.data) for part in sorted(array.addressable_shards, key=lambda part: part.device.id)]
        for name, array in found.items()
    }
    return {"read": bool(asked), "whole": {n: digest(a) for n, a in found.items()}, "parts": parts}


def main():
    family, changes, runs = sys.argv[1], *map(json.loads, sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(tiny.make_checkpoint(family, Path(folder) / "model", **changes))
        for devices, options in runs:
            print(json.dumps(placed(checkpoint, folder, devices, **options)), flush=True)


if __name__ == "__main__":
    main()
