"""Weights are the same on every mesh, whether converted there or kept by a start on another one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from converters.checkpoint import open_checkpoint
from pallas_kernels import panels
from runtime import huge_pages, machine, weights
from runtime.config import EngineConfig
from runtime.preparation import prepare

ROOT = Path(__file__).resolve().parents[2]
EIGHT_HEADS = {"num_attention_heads": 8, "head_dim": 8}  # and two kv heads: four devices keep each twice


def run(family, changes, runs):
    """In a process of its own: a CPU is one device unless it is told before."""
    script = ROOT / "tests" / "support" / "mesh_weights.py"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "http", ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, str(script), family, *map(json.dumps, (changes, runs))],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


OPTIONS = [{}, {"stacked": True}]
FOUR_PARTS = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 256}
SIZES = (1, 2, 4)


@pytest.mark.parametrize(
    "family, changes", [("llama_biased", EIGHT_HEADS | {"vocab_size": 322}), ("gemma3", EIGHT_HEADS)]
)
def test_kept_weights_are_placed_on_any_mesh_as_if_converted_for_it(family, changes):
    """From one device to four, from four to two, and with kv heads repeated on the way and back."""
    check_kept(family, changes, OPTIONS)


def test_kept_rounded_weights_are_placed_on_any_mesh_too():
    check_kept("llama", FOUR_PARTS, [{"quantization": method} for method in ("int8", "int4")])


def check_kept(family, changes, every):
    kept = lambda cache, first: [[size, {"cache": cache}] for size in (first, *SIZES)]
    each = [*([size, {}] for size in SIZES), *kept("by one", 1), *kept("by four", 4)]
    found, log = run(family, changes, [[size, options | more] for options in every for size, more in each])
    for start in range(0, len(found), len(each)):
        fresh = dict(zip(SIZES, found[start : start + 3], strict=True))
        assert all(one["read"] for one in fresh.values())
        for first, *again in (found[start + 3 : start + 7], found[start + 7 : start + 11]):
            assert first["read"] and not any(one["read"] for one in again)
            for size, one in zip(SIZES, again, strict=True):
                assert one["whole"] == fresh[size]["whole"] and one["parts"] == fresh[size]["parts"], size
        check_split(fresh)
    assert "kept" not in log


def check_split(fresh):
    """A mesh changes what the whole is only where kv heads are repeated."""
    for name, digest in fresh[1]["whole"].items():
        assert fresh[2]["whole"][name] == digest
        assert fresh[4]["whole"][name] == digest or ".qkv." in name, name
        assert len(fresh[4]["parts"][name]) == 4


@pytest.mark.parametrize("has_large_pages, quantization", [(True, None), (False, None), (True, "int4")])
def test_weights_come_in_panels_where_the_programs_expect_them(tmp_path, monkeypatch, has_large_pages, quantization):
    if not has_large_pages:
        monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE")
    folder = tiny.make_checkpoint("llama_tied", tmp_path / "model")
    wishes = {"dtype": "bfloat16", "max_model_len": 64, "quantization": quantization}
    config, checkpoint = EngineConfig(model=str(folder), **wishes), open_checkpoint(folder)
    prepared = prepare(config, checkpoint, machine.here())
    names = {"embed.table", "layers.1.attn.qkv.kernel"}  # on machines that expect none, too
    groups = {"layers.1.attn.qkv.kernel_scale", "layers.1.attn.qkv.kernel_offset"} if quantization else set()
    names = frozenset(names | groups)

    def found(in_panels, cache_dir):
        wheres = prepared.layout.shardings(prepared.shapes)
        of_model = checkpoint, prepared.layout.config, None, prepared.shapes
        return weights.on_devices(*of_model, in_panels, wheres, prepared.plan, cache_dir, lambda *_: None)

    plain = found(frozenset(), None)
    for packed in (found(names, tmp_path / "cache"), found(names, tmp_path / "cache")):  # converted, and kept
        for name, array in packed.items():
            width = 1 if name in groups else None
            want = panels.pack(plain[name], width) if name in names else plain[name]
            np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(want, np.float32), name)
