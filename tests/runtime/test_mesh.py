"""A model on several devices gives the tokens of one; what cannot be divided is refused with what can."""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny

from converters.families import FAMILIES
from models.layers.experts import Mixture
from runtime import machine, mesh
from runtime.config import Memory
from runtime.errors import ConfigError
from runtime.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
EIGHT_HEADS = {
    "num_attention_heads": 8,
    "head_dim": 8,
}  # and two kv heads: on four and eight devices each is kept twice


class Devices:
    """Eight devices of a process of its own: a CPU is one device unless it is told before."""

    def __init__(self, log):
        path = os.pathsep.join(map(str, (ROOT, ROOT / "http", ROOT / "tests" / "support")))
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "support" / "mesh_answers.py")],
                env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip

    def run(self, family, changes, meshes, **options):
        """What each mesh, (replicas, devices of each) or that and "turned", answered."""
        print(json.dumps([family, changes, meshes, options]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        found = json.loads(line)
        assert isinstance(found, list), found["error"]
        return found


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    devices = Devices(tmp_path_factory.mktemp("devices") / "log")
    yield devices
    devices.process.stdin.close()
    assert devices.process.wait(60) == 0, devices.log.read_text()[-3000:]
    devices.process.stdout.close()


ONE_ROW = {"max_num_seqs": 1}  # where it is the weights that matter: fewer steps to compile
SOME = [
    ("llama_biased", {"vocab_size": 322}, [(1, 4)], {}),  # a vocabulary that four do not divide
    ("qwen2", EIGHT_HEADS, [(1, 4)], ONE_ROW | {"stacked": True}),
    ("gemma3", EIGHT_HEADS, [(1, 4)], ONE_ROW),
    ("mixtral", EIGHT_HEADS, [(1, 4)], ONE_ROW),
    ("qwen3_moe", EIGHT_HEADS, [(1, 8), (1, 2)], ONE_ROW | {"enable_expert_parallel": True, "stacked": True}),
]
OF_THEIR_OWN = {"llama", "qwen3", "mistral"}  # of these there are tests below
ALL = [(row.name, EIGHT_HEADS, [(1, 8), (2, 4), (1, 2), (2, 1)], {}) for row in FAMILIES.values()]


@pytest.mark.parametrize(
    ("family", "changes", "meshes", "options"), [*SOME, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL)]
)
def test_several_devices_give_the_tokens_of_one(devices, family, changes, meshes, options):
    alone, *others = devices.run(family, changes, [(1, 1), *meshes], **options)
    for mesh_shape, found in zip(meshes, others, strict=True):
        check(found, alone, mesh_shape)


def check(found, alone, mesh_shape):
    replicas, size, *_ = mesh_shape
    assert found["answers"] == alone["answers"], f"{replicas} replicas of {size} devices"
    assert found["compiled_later"] == 0
    assert sorted(sum(found["devices"], [])) == list(range(replicas * size))
    check_collectives(found["collectives"], found["weights"], size)


def test_no_family_is_on_a_mesh_in_slow_tests_only():
    assert {row.name for row in FAMILIES.values()} <= {*OF_THEIR_OWN, *(family for family, *_ in SOME)}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_is_tried_as_itself(architecture):
    """Here and on several hosts each is tried by its name."""
    assert tiny.FAMILIES[FAMILIES[architecture].name]["architectures"] == [architecture]


def test_several_devices_give_the_tokens_of_one_with_rounded_weights_and_pages(devices):
    """Log probabilities may part: what lies between two steps is rounded up here and down there."""
    changes = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 64}
    rounded = {"quantization": "int4", "kv_cache_dtype": "int8"}
    alone, split = devices.run("qwen3", changes, [(1, 1), (1, 2)], **rounded, **ONE_ROW)
    for request in ("0", "1", "2"):
        assert len(alone["answers"][request]) > 5 and split["answers"][request] == alone["answers"][request]
    for name in ("qkv.kernel", "o.kernel_scale", "down.kernel_offset"):
        whole, part = split["weights"][f"layers.0.{'mlp' if 'down' in name else 'attn'}.{name}"]
        assert math.prod(part) * 2 == math.prod(whole)


WHOLE_BLOCKS = {"num_attention_heads": 8, "intermediate_size": 128, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("mixtral", "int8", {}),
        ("qwen3_moe", "int8", {"enable_expert_parallel": True, "stacked": True}),
        ("mixtral", "int4", {"stacked": True}),
        ("qwen3_moe", "int4", {"enable_expert_parallel": True}),
    ],
)
def test_several_devices_give_the_tokens_of_one_with_rounded_experts(devices, family, method, options):
    """A part of each expert, or whole ones.

    Of int8 a draw may fall out otherwise, as each device rounds its own part of what attention gives, and of a token
    where experts are in parts: what prompts score is near instead, by the median, since a token whose experts score
    alike may go to another one.
    """
    options = options | ONE_ROW | {"quantization": method}
    alone, split = devices.run(family, WHOLE_BLOCKS, [(1, 1), (1, 2)], **options)
    if method == "int8":
        pairs = zip(alone["answers"]["prompt"], split["answers"]["prompt"], strict=True)
        assert 0 < statistics.median(abs(one - other) for one, other in pairs) < 0.05
    else:
        for request in ("0", "1", "2"):
            assert len(alone["answers"][request]) > 5 and split["answers"][request] == alone["answers"][request]
    experts = [name for name in split["weights"] if ".mlp." in name and "router" not in name]
    assert len(experts) == (4 if method == "int8" else 6) * (1 if options.get("stacked") else 2)
    for name in experts:
        whole, part = split["weights"][name]
        is_shared = name.endswith("down.kernel_scale") and method == "int8" and "enable_expert_parallel" not in options
        assert math.prod(part) * (1 if is_shared else 2) == math.prod(whole), name


def check_collectives(collectives, weights, size):
    """Two sums a layer and one for a split token table; nothing as large as a weight is ever gathered."""
    if size == 1:
        assert not any(collectives.values())
        return
    layers = 3 if any("layers.2." in name for name in weights) else 2
    is_stacked = "layers.attn.o.kernel" in weights  # then the program holds one layer
    is_split = weights["embed.table"][0] != weights["embed.table"][1]
    assert len(collectives["all-reduce"]) == 2 * (1 if is_stacked else layers) + is_split
    assert len(collectives["all-to-all"]) <= is_split * size
    split = [whole for name, (whole, part) in weights.items() if name.endswith("kernel") and whole != part]
    smallest = min(map(math.prod, split))
    assert all(math.prod(shape) < smallest for shape in collectives["all-gather"])
    assert not collectives["collective-permute"] and not collectives["reduce-scatter"]
    for name, (whole, part) in weights.items():
        if name.endswith(("qkv.kernel", "o.kernel", "gate_up.kernel", "down.kernel")):
            assert math.prod(part) * size == math.prod(whole), name


def test_weights_and_steps_of_a_mesh_are_kept_and_found_again(devices):
    meshes = [(2, 1), (2, 1), (1, 2), (1, 2)]
    first, *others = devices.run("mistral", {}, [(1, 1), *meshes], **ONE_ROW)
    for other, mesh_shape in zip(others, meshes, strict=True):
        check(other, first, mesh_shape)
    assert [other["restored"] for other in others] == [False, True, False, True]
    assert [bool(other["said"]) for other in (first, *others)] == [False, True, False, True, False]
    for number, tokens in others[0]["notebook"].items():
        assert tokens == first["answers"][number]


OTHERS = [(1, 4, "turned"), (1, 4, "turned"), (2, 2, "turned"), (1, 8)]


@pytest.fixture(scope="module")
def llamas(devices):
    """What one device and then the others answered. Kv heads that are repeated, and not; and replicas."""
    return devices.run("llama", EIGHT_HEADS, [(1, 1), *OTHERS], **ONE_ROW)


def test_several_devices_give_the_tokens_of_one_of_the_most_usual_family(llamas):
    alone, *others = llamas
    for mesh_shape, found in zip(OTHERS, others, strict=True):
        check(found, alone, mesh_shape)


def test_weights_of_a_mesh_lie_as_its_decode_step_wants_them(llamas):
    """At the first start and at the second."""
    alone, first, second, replicas, usual = llamas
    assert not any(alone["turned"] + usual["turned"])
    assert [other["restored"] for other in (first, second, replicas)] == [False, True, False]
    (differs,) = first["said"]
    assert "kept differ in: " in differs and "tensor_parallel_size 1 (here 4), " in differs and "num_kv" not in differs
    assert all(all(each["turned"]) for each in (first, second, replicas))


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


def with_experts(**changes):
    experts = Mixture(num_experts=12, per_token=2, ffn_size=768, normalised=True)
    mixture = dataclasses.replace(experts, **changes)
    return Mixed(num_heads=32, num_kv_heads=8, ffn_size=7, head_dim=128, mixture=mixture)


@dataclasses.dataclass(frozen=True)
class Mixed:
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    head_dim: int
    mixture: Mixture


def test_experts_are_divided_by_their_units_or_by_their_number():
    parts, whole = with_experts(), mesh.with_whole_experts(with_experts())
    assert whole.mixture.whole and mesh.fit(parts, 8) is parts and mesh.fit(whole, 4) is whole
    with pytest.raises(ConfigError, match="8 does not divide 12 experts; 4 does"):
        mesh.fit(whole, 8)
    with pytest.raises(ConfigError, match="8 does not divide 100 feed-forward units of an expert; 4 does"):
        mesh.fit(with_experts(ffn_size=100), 8)


def test_a_model_without_experts_cannot_spread_them():
    with pytest.raises(ConfigError, match="this model has none; leave it out"):
        mesh.with_whole_experts(CONFIG)


@pytest.mark.parametrize("method, parts", [("int4", "groups of 32"), ("int8", "rotated blocks of 64")])
def test_inputs_that_are_rounded_together_are_not_cut_by_a_mesh(method, parts):
    size = int(parts.split()[-1])
    config = types.SimpleNamespace(num_heads=32, num_kv_heads=8, ffn_size=9 * size * 4, head_dim=128)
    message = f"tensor_parallel_size 8 does not divide 36 {parts} feed-forward inputs; 4 does (of 1, 2, 4)"
    with pytest.raises(ConfigError) as refused:
        mesh.fit(config, 8, method)
    assert message in str(refused.value)
    assert mesh.fit(config, 4, method) is mesh.fit(config, 8) is config


@dataclasses.dataclass(eq=False)
class Chip:
    """A device of a host, as far as choosing devices looks at it."""

    process_index: int
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"


def hosts_of(*counts):
    """A machine of hosts with so many devices each, and the devices by host."""
    hosts = [[Chip(host) for _ in range(count)] for host, count in enumerate(counts)]
    return Machine("made up", tuple(sum(hosts, [])), Memory(1, 1)), hosts


@pytest.mark.parametrize(
    ("hosts", "tensor", "data", "says"),
    [
        (
            [8],
            16,
            1,
            "tensor_parallel_size 16 needs 16 devices, and here are 8 of kind TPU v5 lite; tensor_parallel_size 8",
        ),
        ([3], 4, 1, "needs 4 devices, and here are 3 of kind TPU v5 lite; tensor_parallel_size 2 works"),
        (
            [8],
            4,
            3,
            "tensor_parallel_size 4 times data_parallel_size 3 needs 12 devices, and here are 8 of kind TPU v5 lite; "
            "tensor_parallel_size 2 or data_parallel_size 2 works",
        ),
        ([1], 1, 2, "needs 2 devices, and here are 1 of kind TPU v5 lite; data_parallel_size 1 works"),
        (
            [4, 4],
            16,
            1,
            "here are 8 of kind TPU v5 lite on 2 hosts, which must share them evenly; tensor_parallel_size 8",
        ),
        ([4, 4], 2, 2, "data_parallel_size 2 needs all devices on one host, and there are 2; start a server on each"),
        ([4, 4], 1, 1, "on 2 hosts, which must share them evenly; tensor_parallel_size 8 works"),
        (
            [4, 2],
            4,
            1,
            "need equally many devices, and there are 4 on host 0, 2 on host 1; 2 on each would work",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(hosts, tensor, data, says):
    with pytest.raises(ConfigError) as refused:
        mesh.replica_devices(CONFIG, hosts_of(*hosts)[0], tensor, data)
    assert says in str(refused.value)


def test_replicas_share_no_device_and_hosts_give_as_many_each():
    one, (host,) = hosts_of(8)
    assert mesh.replica_devices(CONFIG, one, 4, 2) == [host[:4], host[4:]]
    assert mesh.replica_devices(CONFIG, one, 2, 3) == [host[:2], host[2:4], host[4:6]]
    two, (first, second) = hosts_of(4, 4)
    assert mesh.replica_devices(CONFIG, two, 8) == [first + second]
    assert mesh.replica_devices(CONFIG, two, 4) == [first[:2] + second[:2]]


def test_a_cpu_can_be_made_several_devices():
    with pytest.raises(ConfigError, match=r"works \(a CPU counts as one device, or as many as XLA_FLAGS="):
        mesh.replica_devices(CONFIG, machine.here(), 32)


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
