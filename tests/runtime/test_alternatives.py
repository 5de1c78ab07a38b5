"""Where a model would fit that does not fit where it was asked to, and how many of a target's devices it uses."""

import dataclasses
import json

import pytest
import tiny
from published import CONFIGS, LLAMA, QWEN3

from converters.checkpoint import open_checkpoint
from models.layers.stack import Stack
from runtime import alternatives, chips, machine
from runtime.config import EngineConfig, Memory
from runtime.errors import ConfigError, DoesNotFit
from runtime.loading import load
from runtime.preparation import prepare

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}


def opened(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return open_checkpoint(str(folder), needs_weights=False)


@dataclasses.dataclass(eq=False)
class Device:
    platform: str
    device_kind: str
    id: int
    process_index: int


def host(name, count, memory, is_here=True, hosts=1, platform="tpu"):
    """A machine without a compiler: enough to settle a plan."""
    kind = chips.named(name)[0].kind if platform == "tpu" else "cpu"
    devices = [Device(platform, kind, i, i * hosts // count) for i in range(count)]
    return machine.Machine(name, tuple(devices), Memory(memory, memory), is_here=is_here)  # type: ignore[arg-type]


@pytest.fixture
def known(monkeypatch):
    """Targets are what the table says, and need no compiler; preparing only counts bytes."""

    def absent(target):
        chip, count = chips.named(target)
        return host(target, count, chip.memory_bytes, is_here=False, hosts=count // 4 if count in chip.slices else 1)

    def weigh(config, checkpoint, place):
        weights = 16e9 / {None: 1, "int8": 2, "int4": 3}[config.quantization]
        if weights >= config.tensor_parallel_size * place.memory.total * config.gpu_memory_utilization:
            raise DoesNotFit("too large")

    monkeypatch.setattr(machine, "absent", absent)
    monkeypatch.setattr(alternatives, "prepare", weigh)
    return absent


def test_the_message_names_the_nearest_target_and_rounding(known, tmp_path):
    checkpoint, config = opened(tmp_path, **LLAMA | SIZES), EngineConfig(model=str(tmp_path))
    says = lambda config, target: alternatives.what_fits(config, checkpoint, known(target))
    assert says(config, "v5e-1") == "; v5e-1 with --quantization int8 or v5e-4 would hold it"
    tight = dataclasses.replace(config, gpu_memory_utilization=0.05)  # 0.84 GB of each
    assert says(tight, "v5e-1") == "; v5e-16 with --quantization int8 or v5e-32 would hold it"
    rounded = dataclasses.replace(tight, quantization="int4")
    assert says(rounded, "v5e-4") == "; v5e-8 would hold it"
    assert says(dataclasses.replace(config, gpu_memory_utilization=1e-4), "v5e-1") == "; no known target holds it"


def test_of_the_devices_that_are_here_more_are_advised(known, tmp_path):
    checkpoint, config = opened(tmp_path, **LLAMA | SIZES), EngineConfig(model=str(tmp_path))
    says = lambda place: alternatives.what_fits(config, checkpoint, place)
    assert says(host("v6e-8", 8, 5 * 10**9)) == "; --tensor-parallel-size 4 would hold it"
    assert says(host("v6e-8", 8, 10**10)) == "; --quantization int8 or --tensor-parallel-size 2 would hold it"
    assert says(host("v6e-8", 8, 10**9)) == "; nothing here holds it"
    assert says(host("cpu", 8, 10**10, platform="cpu")) == "; --quantization int8 would hold it"


def test_a_target_is_used_as_far_as_it_divides_the_model(known, tmp_path):
    of_28_heads = QWEN3 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 4}
    of_28_heads |= {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 2}
    checkpoint, config = opened(tmp_path, **of_28_heads), EngineConfig(model=str(tmp_path))

    def settled(target, **wishes):
        wished = dataclasses.replace(config, **wishes)
        size = alternatives.size_for(wished, checkpoint, known(target))
        wished = dataclasses.replace(wished, tensor_parallel_size=size)
        return size, alternatives.idle(wished, checkpoint, known(target))

    says = "4 of 8 devices are used, as more do not divide 28 query heads; --data-parallel-size 2 uses 8"
    assert settled("v6e-8") == (4, [says])
    assert settled("v6e-8", data_parallel_size=2) == settled("v6e-4") == (4, []) == (settled("v5e-4"))
    assert settled("v6e-16") == (4, ["4 of 16 devices are used, as more do not divide 28 query heads"])
    assert settled("v6e-32") == (32, [])  # no size divides both the model and the hosts: refused, with the numbers


def test_whole_experts_are_counted_and_not_their_units(known, tmp_path):
    fields = CONFIGS["Qwen3-30B-A3B"] | {"num_attention_heads": 28, "moe_intermediate_size": 764}
    checkpoint, config = opened(tmp_path, **fields), EngineConfig(model=str(tmp_path), tensor_parallel_size=4)
    says = lambda whole: alternatives.idle(
        dataclasses.replace(config, enable_expert_parallel=whole), checkpoint, known("v6e-16")
    )
    of_heads = "4 of 16 devices are used, as more do not divide 28 query heads"
    assert says(True) == [of_heads]
    assert says(False) == [f"{of_heads} and 764 feed-forward units of an expert"]


def test_a_hundred_layers_are_traced_as_one(tmp_path, monkeypatch):
    """And are all there afterwards."""
    made, usual = [], Stack.__init__

    def counting(self, make_block, *args):
        usual(self, lambda: made.append(1) or make_block(), *args)

    monkeypatch.setattr(Stack, "__init__", counting)
    checkpoint = opened(tmp_path, **LLAMA | SIZES | {"num_hidden_layers": 100})
    place = host("v6e-8", 8, 2**40)
    for stacked in (True, False):
        prepared = prepare(EngineConfig(model=str(tmp_path), stacked=stacked), checkpoint, place)
        of_layers = [name for name in prepared.shapes if name.startswith("layers.") and name.endswith("qkv.kernel")]
        assert len(of_layers) == (1 if stacked else 100)
        assert sum(prepared.shapes[name].size for name in of_layers) == 100 * 4096 * 6144
    assert len(made) <= 4


def test_a_vocabulary_that_each_device_has_whole_is_said(tmp_path):
    config, place = EngineConfig(model=str(tmp_path), tensor_parallel_size=4), host("v6e-8", 8, 2**35)
    for size in (128256, 128257):
        plan = prepare(config, opened(tmp_path, **LLAMA | SIZES | {"vocab_size": size}), place).plan
        says = [row for row in plan.reasons if row[0] == "vocabulary"]
        why = "4 does not divide it, so that each device holds and scores all of it"
        assert says == ([] if size % 4 == 0 else [("vocabulary", "128,257", why)])


def test_loading_says_what_would_fit_here(tmp_path):
    model = tiny.make_checkpoint("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"needs \d+ \(\d+ MiB\); give the cache more memory; nothing here holds it"):
        load(EngineConfig(model=str(model), cache_dir="", kv_cache_memory_bytes=1))
