"""What is wrong with downloaded weights is said before they are used: which file, which tensor, what to do."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from converters.checkpoint import open_checkpoint
from converters.load import load_weights
from converters.rules import ConversionError
from models import interface

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def load(folder):
    checkpoint = open_checkpoint(folder)
    _, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, "float32")
    return load_weights(checkpoint, shapes)


def change_tensors(change, name="model.safetensors"):
    """Damage to the tensors: change({name: array}) in place."""

    def damage(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def set_to(value, tensor=UP):
    return change_tensors(lambda tensors: tensors[tensor].reshape(-1).__setitem__(5, value))


def config(**changes):
    def damage(folder):
        tiny.write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)

    return damage


def quantised(method, **more):
    return config(quantization_config={"quant_method": method, **more})


def packed(tensors):
    """As AutoAWQ and GPTQ name and pack theirs."""
    width = tensors.pop(UP).shape
    stem = UP.removesuffix("weight")
    tensors[f"{stem}qweight"] = np.zeros((width[1], width[0] // 8), np.int32)


def as_int8(tensors):
    tensors[UP] = tensors[UP].astype(np.int8)


def as_fp8(tensors):
    """As DeepSeek's: a scale for each block beside the weights."""
    tensors[UP] = tensors[UP].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{UP}_scale_inv"] = np.ones((1, 1), np.float32)


BAD = {
    "missing tensor": (change_tensors(lambda t: t.pop(UP)), r"'layers.1.mlp.gate_up.kernel' got no tensor"),
    "extra tensor": (change_tensors(lambda t: t.update(extra=np.ones(2, np.float32))), "no rule for tensor 'extra'"),
    "wrong shape": (change_tensors(lambda t: t.update({UP: t[UP][:-1]})), rf"'{UP}' \(47, 32\).*\(48, 32\)"),
    "not a number": (set_to(np.nan), f"tensor '{UP}' holds values that are infinite or no numbers; download"),
    "infinite": (set_to(-np.inf), f"tensor '{UP}' holds values that are infinite"),
    "more layers": (config(num_hidden_layers=3), "parameters got no tensor, first 'layers.2.*; is a shard missing"),
    "fewer layers": (config(num_hidden_layers=1), r"'layers.1.*', which the model lacks; compare config.json"),
    "wider": (config(hidden_size=64), r"tensor '.*' is|tensor '.*' \(.*compare config.json"),
    "awq": (quantised("awq", bits=4), "quantised by 'awq'.*--quantization int8"),
    "gptq": (quantised("gptq", bits=4), "quantised by 'gptq'"),
    "compressed-tensors": (quantised("compressed-tensors"), "quantised by 'compressed-tensors'"),
    "fp8": (quantised("fp8"), "quantised by 'fp8'"),
    "no method": (config(quantization_config={}), "quantised by 'unnamed'"),
    "packed, and the config is silent": (change_tensors(packed), "up_proj.qweight' holds int32: .* quantised in a way"),
    "int8, and the config is silent": (change_tensors(as_int8), f"'{UP}' holds int8: .*--quantization int8"),
    "fp8, and the config is silent": (change_tensors(as_fp8), "no rule for tensor '.*up_proj.weight_scale_inv'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "a header of 0 bytes.*download"),
    "a pointer of git-lfs": (
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "is a pointer of git-lfs.*git lfs pull",
    ),
    "an error page": (
        lambda folder: (folder / "model.safetensors").write_text("<html>404</html>"),
        "download it again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_in_words(case, tmp_path):
    damage, says = BAD[case]
    damage(tiny.make_checkpoint("llama", tmp_path / "model"))
    with pytest.raises(ConversionError, match=says) as refused:
        load(tmp_path / "model")
    assert str(tmp_path / "model") in str(refused.value)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, os.path.getsize(folder / name) - size if size else 0)


BAD_SHARDS = {
    "cut short": (cut(TWO, 7), f"{TWO}: tensor '.*' ends beyond the file; it was cut short"),
    "empty": (cut(TWO, None), f"{TWO}: a header of 0 bytes in a file of 0"),
    "missing": (lambda folder: (folder / TWO).unlink(), f"shard '{TWO}' of model.safetensors.index.json is missing"),
    "not a number": (change_tensors(lambda t: next(iter(t.values())).fill(np.nan), TWO), "no numbers"),
    "without its index": (
        lambda folder: ((folder / "model.safetensors.index.json").unlink(), (folder / TWO).unlink()),
        "got no tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused_in_words(case, tmp_path):
    damage, says = BAD_SHARDS[case]
    damage(tiny.make_checkpoint("llama", tmp_path / "model", shards=2))
    with pytest.raises(ConversionError, match=says):
        load(tmp_path / "model")


def hub_folder(tmp_path):
    """As the hub's cache has it: a snapshot of links to blobs."""
    made = tiny.make_checkpoint("llama", tmp_path / "made", shards=2)
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(made.iterdir()):
        path.rename(blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", f"{number:064}"))
    return snapshot


def test_a_hub_cache_of_links_is_read(tmp_path):
    weights = load(hub_folder(tmp_path))
    for name, array in tiny.Tiny("llama").weights.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_link_to_nothing_is_refused(tmp_path):
    """A download that was stopped, or a blob that was cleaned away."""
    snapshot = hub_folder(tmp_path)
    (snapshot / ONE).resolve().unlink()
    with pytest.raises(ConversionError, match=f"shard '{ONE}' .* is missing; download it"):
        load(snapshot)
    (snapshot / "model.safetensors.index.json").unlink()
    with pytest.raises(ConversionError, match=f"{ONE}: No such file"):
        load(snapshot)
