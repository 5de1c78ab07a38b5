"""A model on several devices gives the tokens of one; what cannot be divided is refused with what can."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from runtime import machine, mesh
from runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EIGHT_HEADS = {
    "num_attention_heads": 8,
    "head_dim": 8,
}  # and two kv heads: on four and eight devices each is kept twice


def run(family, changes, sizes, **options):
    """What each size answered. In a process of its own: a CPU is one device unless it is told before."""
    script = ROOT / "tests" / "support" / "mesh_answers.py"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "http", ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, str(script), family, *map(json.dumps, (changes, sizes, options))],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("family", "changes", "sizes", "options"),
    [
        ("llama", EIGHT_HEADS, [1, 8], {}),
        ("llama_biased", {"vocab_size": 322}, [1, 4], {}),  # a vocabulary that four do not divide
        ("qwen2", EIGHT_HEADS, [1, 4], {"stacked": True}),
        ("qwen3", EIGHT_HEADS, [1, 4], {}),
        ("gemma3", EIGHT_HEADS, [1, 4], {}),
    ],
)
def test_several_devices_give_the_tokens_of_one(family, changes, sizes, options):
    alone, *others = run(family, changes, sizes, **options)
    for size, found in zip(sizes[1:], others, strict=True):
        assert found["answers"] == alone["answers"], f"{size} devices"
        assert found["compiled_later"] == 0
        check_collectives(found["collectives"], found["weights"], size)


def test_several_devices_give_the_tokens_of_one_with_rounded_weights_and_pages():
    """Log probabilities may part: what lies between two steps is rounded up here and down there."""
    changes = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 64}
    alone, split = run("qwen3", changes, [1, 2], quantization="int4", kv_cache_dtype="int8")
    for request in ("0", "1", "2"):
        assert len(alone["answers"][request]) > 5 and split["answers"][request] == alone["answers"][request]
    for name in ("qkv.kernel", "o.kernel_scale", "down.kernel_offset"):
        whole, part = split["weights"][f"layers.0.{'mlp' if 'down' in name else 'attn'}.{name}"]
        assert math.prod(part) * 2 == math.prod(whole)


def check_collectives(collectives, weights, size):
    """Two sums a layer and one for a split token table; nothing as large as a weight is ever gathered."""
    layers = 3 if any("layers.2." in name for name in weights) else 2
    is_stacked = "layers.attn.o.kernel" in weights  # then the program holds one layer
    is_split = weights["embed.table"][0] != weights["embed.table"][1]
    assert len(collectives["all-reduce"]) == 2 * (1 if is_stacked else layers) + is_split
    assert len(collectives["all-to-all"]) <= is_split * size
    smallest = min(math.prod(shape) for name, (shape, _) in weights.items() if name.endswith("kernel"))
    assert all(math.prod(shape) < smallest for shape in collectives["all-gather"])
    assert not collectives["collective-permute"] and not collectives["reduce-scatter"]
    for name, (whole, part) in weights.items():
        if name.endswith(("qkv.kernel", "o.kernel", "gate_up.kernel", "down.kernel")):
            assert math.prod(part) * size == math.prod(whole), name


def test_weights_and_steps_of_a_mesh_are_kept_and_found_again():
    first, again, other = run("llama", {}, [2, 2, 1])
    assert first["answers"] == again["answers"] == other["answers"]


CONFIG = types.SimpleNamespace(num_heads=32, num_kv_heads=8, ffn_size=14336, head_dim=128)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            3,
            "tensor_parallel_size 3 does not divide 32 query heads and 8 kv heads and 14336 feed-forward units; 2 does",
        ),
        (12, "tensor_parallel_size 12 does not divide 32 query heads"),
        (64, "tensor_parallel_size 64 does not divide 32 query heads; 32 does"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(size, message):
    with pytest.raises(ConfigError) as refused:
        mesh.fit(CONFIG, size)
    assert message in str(refused.value) and "(of 1, 2, 4, 8, 16, 32)" in str(refused.value)


def test_int4_groups_are_not_cut_by_a_mesh():
    config = types.SimpleNamespace(num_heads=32, num_kv_heads=8, ffn_size=9 * 32 * 4, head_dim=128)
    message = "tensor_parallel_size 8 does not divide 36 groups of 32 feed-forward inputs; 4 does (of 1, 2, 4)"
    with pytest.raises(ConfigError) as refused:
        mesh.fit(config, 8, "int4")
    assert message in str(refused.value)
    assert mesh.fit(config, 8, "int8") is config


def test_more_devices_than_there_are_is_refused():
    have = len(jax.local_devices())
    with pytest.raises(ConfigError, match=f"needs as many devices, and here are {have} .*lower it"):
        mesh.devices_for(have + 1, machine.here())


REPEATED = """
import jax, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec as P
from runtime import mesh
lead = tuple(map(int, sys.argv[1:]))
K, G, H, D, copies = 2, 4, 3, 5, 2
weight = np.random.default_rng(0).normal(size=(*lead, K, G + 2, H, D)).astype(np.float32)
shape = (*lead, K * copies, G // copies + 2, H, D)
tensor = mesh.Tensor.over(jax.devices(), 8)
where = NamedSharding(tensor.mesh, P(*[None] * len(lead), mesh.AXIS, None, None, None))
placed = jax.device_put(weight, tensor.before_repeating(K)(where))
found = mesh.repeat_kv_heads(placed, shape, where)
assert found.sharding == where and found.shape == shape
repeated = np.asarray(found)
for k in range(K * copies):
    part, own = repeated[..., k, :, :, :], weight[..., k // copies, :, :, :]
    first = k % copies * G // copies
    assert np.array_equal(part[..., :-2, :, :], own[..., first : first + G // copies, :, :])
    assert np.array_equal(part[..., -2:, :, :], own[..., -2:, :, :])
"""


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_repeated_kv_head_keeps_each_query_with_its_own(lead):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", REPEATED, *map(str, lead)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
