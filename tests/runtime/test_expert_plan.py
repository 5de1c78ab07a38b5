"""What is planned for a mixture of experts, and what is refused before anything is read."""

import dataclasses

import pytest
import tiny

from converters.checkpoint import open_checkpoint
from runtime import machine, mesh
from runtime.config import EngineConfig, Memory
from runtime.errors import ConfigError
from runtime.machine import Machine
from runtime.preparation import prepare


@dataclasses.dataclass(eq=False)
class Device:
    platform: str
    device_kind: str
    process_index: int = 0


def on_devices(folder, platform, kind, number, **wishes):
    """Planned for devices that are not here; each has a name and nothing else."""
    devices = tuple(Device(platform, kind) for _ in range(number))
    changes = {"moe_intermediate_size": 768, "hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    checkpoint = open_checkpoint(tiny.make_checkpoint("qwen3_moe", folder, **changes))
    there = Machine(platform, devices, Memory(2**35, 2**35), is_here=False)
    wishes = {"tensor_parallel_size": number, "dtype": "bfloat16", "max_model_len": 256} | wishes
    return prepare(EngineConfig(model=str(folder), **wishes), checkpoint, there)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("platform", "kind", "says"),
    [
        ("tpu", "TPU v6 lite", r"96 of an expert's 768 .* megablox .* whole 128s .* or tensor_parallel_size 2$"),
        (
            "gpu",
            "NVIDIA H100 80GB HBM3",
            r"96 of an expert's 768 .* mosaic .* whole 64s .* or tensor_parallel_size 4$",
        ),
    ],
)
def test_parts_of_experts_that_a_kernel_does_not_take_are_refused(tmp_path, platform, kind, says):
    with pytest.raises(ConfigError, match=says):
        on_devices(tmp_path, platform, kind, 8)


def planned(folder, family, **wishes):
    checkpoint = open_checkpoint(tiny.make_checkpoint(family, folder))
    return prepare(EngineConfig(model=str(folder), **wishes), checkpoint, machine.here())


def test_the_plan_tells_of_experts(tmp_path):
    rows = {name: (value, why) for name, value, why in planned(tmp_path, "qwen3_moe").plan.reasons}
    assert rows["experts"] == ("8", "3 a token; multiplied by cpu")


def test_whole_experts_are_part_of_what_programs_are_kept_under(tmp_path):
    split, whole = (planned(tmp_path, "mixtral", enable_expert_parallel=on).facts for on in (False, True))
    assert {name for name in split if split[name] != whole[name]} == {"model"}


@pytest.mark.parametrize(
    "platform, kind, method, kernel",
    [
        ("tpu", "TPU v6 lite", "int8", "tpu"),
        ("tpu", "TPU v6 lite", "int4", "tpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "int8", "mosaic"),
        ("gpu", "NVIDIA H100 80GB HBM3", "int4", "triton"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "int8", "triton"),
        ("gpu", "Tesla V100-SXM2-16GB", "int8", "ragged_dot"),
    ],
)
def test_the_plan_counts_rounded_experts(tmp_path, platform, kind, method, kernel):
    exact = on_devices(tmp_path / "exact", platform, kind, 1)
    rounded = on_devices(tmp_path / "rounded", platform, kind, 1, quantization=method)
    (why,) = (why for name, _, why in rounded.plan.reasons if name == "experts")
    assert why == f"3 a token; multiplied by {kernel}"
    weights = [name for name in exact.shapes if ".mlp." in name and "router" not in name]
    size = lambda prepared, name: prepared.layout.num_bytes({name: prepared.shapes[name]})
    for name in weights:
        assert size(rounded, name) == size(exact, name) // (2 if method == "int8" else 4)
    scales = [name for name in rounded.shapes if ".mlp." in name and name.endswith(("_scale", "_offset"))]
    assert len(scales) == len(weights) * (1 if method == "int8" else 2)
    assert not any("router.kernel_" in name for name in rounded.shapes)


def test_parts_of_experts_are_whole_rotated_blocks(tmp_path):
    says = "tensor_parallel_size 2 does not divide 1 rotated blocks of 64 feed-forward inputs; 1 does"
    changes = {"moe_intermediate_size": 64, "num_attention_heads": 8}
    checkpoint = open_checkpoint(tiny.make_checkpoint("qwen3_moe", tmp_path, **changes))
    with pytest.raises(ConfigError, match=says):
        mesh.fit(checkpoint.config, 2, "int8")
    assert mesh.fit(mesh.with_whole_experts(checkpoint.config), 2, "int8")


def test_a_model_without_experts_has_none_to_spread(tmp_path):
    with pytest.raises(ConfigError, match="enable_expert_parallel spreads experts, and this model has none; leave it"):
        planned(tmp_path, "llama", enable_expert_parallel=True)
