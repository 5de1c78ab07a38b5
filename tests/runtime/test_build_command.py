"""`runtime.build` and `runtime.plan`: from a config alone to the programs that serve finds, and clear refusals."""

import shutil
from pathlib import Path

import pytest
import tiny

from runtime import build, chips, wishes
from runtime.config import EngineConfig
from runtime.engine import Engine

SIZES = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--block-size", "4", "--max-model-len", "96"]
SIZES += ["--num-gpu-blocks-override", "64", "--speculative-config.num_speculative_tokens", "0"]


@pytest.fixture
def model(tmp_path):
    return tiny.make_checkpoint("llama", tmp_path / "model")


@pytest.fixture
def config_alone(model, tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


def test_serve_finds_what_was_built_from_a_config_alone(model, config_alone, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert build.main([str(config_alone / "config.json"), *SIZES, "--cache-dir", str(cache)]) == 0
    said = capsys.readouterr().out
    (entry,) = (cache / "steps").iterdir()
    assert f"are kept in {entry}" in said and "64" in said
    for name in ("decode 1x1", "decode 2x2", "mixed 16x2", "load_history", "load_tables", "new_state"):
        assert f"\n  {name}" in said
    wishes = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 4, "max_model_len": 96}
    wishes |= {"num_gpu_blocks_override": 64, "speculative_config": {"num_speculative_tokens": 0}}
    engine = Engine.load(EngineConfig(model=str(model), cache_dir=str(cache), **wishes))
    assert "restore steps" in engine.loaded.seconds and list((cache / "steps").iterdir()) == [entry]


def test_a_plan_keeps_nothing(config_alone, tmp_path, capsys):
    assert build.main([str(config_alone), *SIZES, "--cache-dir", str(tmp_path / "cache")], keeps=False) == 0
    assert "Memory of each device" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "v6e-5"], "target 'v6e-5' is not known; did you mean v6e-4? Known, of one host: v5e-1, "),
        (["--target", "v9-8"], "'v9-8' is not known"),
        (["--target", "trillium-128"], "did you mean v6e-64?"),
        (["--target", "v5p-7"], "; of several: v5e-16, v5e-32, v5e-64, v5p-16, "),
        (["--nnodes", "4"], "--nnodes 4, and 1 x cpu is 1 host; name the slice with --target, as v6e-16"),
        (["--target", "h300-1"], "did you mean h200-1?"),
        (["--target", "zebra"], "target 'zebra' is not known. Known, of one host: v5e-1, "),
        (
            ["--cache-dir", ""],
            "--cache-dir is empty, so that nothing would be kept; name a folder, or use runtime.plan",
        ),
        (
            ["--tensor-parallel-size", "64"],
            "tensor_parallel_size 64 does not divide 4 query heads and 48 feed-forward units; 4 does",
        ),
        (["--dtyp", "bfloat16"], "did you mean --dtype?"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(config_alone, words, said, capsys):
    assert build.main([str(config_alone), *words]) == 1
    assert said in capsys.readouterr().err


def test_without_its_compiler_a_target_says_how_to_get_it(config_alone, monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build.main([str(config_alone), "--target", "v6e-8"]) == 1
    assert "needs its compiler, no device: pip install 'jax[tpu]==" in capsys.readouterr().err
    assert build.main([str(config_alone), "--target", "h100-1"]) == 1
    assert "pip install --no-deps jax-cuda13-plugin==" in capsys.readouterr().err


def test_the_readmes_commands_are_understood():
    """Those of the section on deploying: flags, targets and modules; the build itself is tested on small models."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    section = text.split("## Deploying on a TPU VM")[1].split("\n## ")[0]
    commands = [line.split("#")[0].split() for line in section.splitlines() if line.startswith("python -m runtime.")]
    assert {words[2] for words in commands} >= {"runtime.plan", "runtime.build", "runtime.serve"}
    for words in commands:
        more = () if words[2] == "runtime.serve" else (build.TARGET,)
        sections, notes = wishes.read(words[3:], {}, more)
        assert sections["start"]["model"] and not notes
        if "build" in sections:
            assert chips.named(sections["build"]["target"])
    targets = [
        f"{chip.name}-{count}"
        for chip in chips.CHIPS.values()
        if chip.platform == "tpu"
        for count in chip.counts | chip.slices
    ]
    assert all(target in section for target in targets)


def test_help_names_targets_and_the_flags_that_matter(capsys):
    assert build.main(["--help"], keeps=False) == 0
    said = capsys.readouterr().out
    assert "python -m runtime.plan [--target TARGET]" in said and "h200-8" in said and "tpu7x-128" in said
    assert all(f"  --{name} " in said for name in build.SHOWN)
