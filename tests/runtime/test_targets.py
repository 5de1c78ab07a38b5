"""Building for a TPU host that is not here: what that host would look for, and what cannot be built."""

import dataclasses
import json
import os

import absent_tpu
import jax
import pytest
import tiny
from published import CONFIGS, write_config

from runtime import build, kept_steps, machine
from runtime.config import EngineConfig

pytestmark = pytest.mark.tpu
reason = absent_tpu.prepare()
if reason:
    pytest.skip(reason, allow_module_level=True)

WIDE = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = ["--max-num-seqs", "8", "--max-num-batched-tokens", "16", "--max-model-len", "256"]
WISHES = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 256, "tensor_parallel_size": 4}


def test_the_host_itself_would_look_for_what_was_built(tmp_path, monkeypatch, capsys):
    from converters.checkpoint import open_checkpoint
    from runtime.preparation import prepare

    model, alone = tiny.make_checkpoint("llama", tmp_path / "model", **WIDE), tmp_path / "config.json"
    alone.write_text((model / "config.json").read_text())
    assert build.main([str(alone), "--target", "v5e-4", *WORDS, "--cache-dir", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    (entry,) = (tmp_path / "cache" / "steps").iterdir()
    assert f"are kept in {entry}" in said and "--tensor-parallel-size 4" in said
    for line in ("Memory of each device, MiB", "Roofline estimates, not measured", "all-reduce", "memory-bound"):
        assert line in said

    # The same model with its weights and tokenizer, on a host whose processor and flags of it are others.
    monkeypatch.setattr(kept_steps, "_num_cpus", lambda: 224)
    monkeypatch.setattr(kept_steps, "_cpu_features", lambda: "flags: others")
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3")
    host = dataclasses.replace(machine.absent("v5e-4"), name="here", is_here=True)
    served = prepare(EngineConfig(model=str(model), **WISHES), open_checkpoint(model), host)
    facts = kept_steps.facts_of(served.facts, host, served.layout.devices)
    kept = kept_steps.KeptSteps(entry.parent, facts, served.programs)
    assert kept.folder == entry and kept.is_complete
    assert json.loads((entry / kept_steps.FACTS).read_text()) == facts
    assert facts["devices"] == "4 x tpu:TPU v5 lite" and facts["used"] == "0@0,0,0 1@1,0,0 2@0,1,0 3@1,1,0"

    # One chip of it is another matter, and so is the first half of a host of eight.
    assert kept_steps.facts_of(served.facts, host, served.layout.devices[:1]) != facts
    eight = dataclasses.replace(machine.absent("v5e-8"), is_here=True)
    assert kept_steps.facts_of(served.facts, eight, eight.devices[:4]) != facts


def test_each_host_of_a_slice_would_look_for_what_was_built(tmp_path, monkeypatch, capsys):
    from converters.checkpoint import open_checkpoint
    from runtime.preparation import prepare

    model = tiny.make_checkpoint("llama", tmp_path / "model", **WIDE | {"num_attention_heads": 16})
    words = [str(model), "--target", "v6e-16", *WORDS, "--cache-dir", str(tmp_path / "cache")]
    assert build.main(words) == 0
    said = capsys.readouterr().out
    assert "v6e-16: 16 x TPU v6 lite, 4 on each of 4 hosts" in said and "--nnodes 4; copy the folder to every" in said
    (entry,) = (tmp_path / "cache" / "steps").iterdir()
    host = dataclasses.replace(machine.absent("v6e-16"), name="here", is_here=True)
    config = EngineConfig(model=str(model), **WISHES | {"tensor_parallel_size": 16})
    served = prepare(config, open_checkpoint(model), host)
    assert [device.process_index for device in served.layout.devices] == [i // 4 for i in range(16)]
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        facts = kept_steps.facts_of(served.facts, host, served.layout.devices)
        kept = kept_steps.KeptSteps(entry.parent, facts, served.programs)
        assert kept.folder == entry and kept.is_complete


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        (
            "Llama-3-70B",
            ["--target", "v5e-8"],
            ["weights take 134,5", "(8 x 16,077 MiB at 90%)", "v5e-8 with --quantization int8 or v5e-16 would hold it"],
        ),
        ("Llama-3-8B", ["--target", "v5e-1"], ["--quantization int8 or v5e-4 would hold it"]),
        ("Llama-3-8B", ["--target", "v6e-8", "-tp", "3"], ["tensor_parallel_size 3 does not divide", "; 2 does"]),
        ("Llama-3-8B", ["--target", "v6e-16", "--nnodes", "2"], ["v6e-16 is 4 hosts; leave --nnodes out"]),
        ("Llama-3-8B", ["--target", "v6e-16", "-dp", "2"], ["data_parallel_size 2 needs all devices on one host"]),
        (
            "Llama-3-8B",
            ["--target", "v6e-4", "-tp", "8"],
            ["needs 8 devices, and in v6e-4 are 4 of kind TPU v6 lite", "tensor_parallel_size 4 works"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(model, words, said, tmp_path, capsys):
    assert model in CONFIGS
    assert build.main([str(write_config(model, tmp_path)), *words], keeps=False) == 1
    error = capsys.readouterr().err
    assert all(part in error for part in said), error
