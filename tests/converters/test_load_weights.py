"""From a checkpoint's folder to weights: dtypes, placing, identity, and the small files beside the weights."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.experimental.layout import Format, Layout

from converters import place
from converters.checkpoint import open_checkpoint
from converters.load import load_weights
from converters.rules import ConversionError
from models import interface


def load(folder, dtype="float32", stacked=False, **options):
    checkpoint = open_checkpoint(folder)
    _, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, dtype, stacked)
    return load_weights(checkpoint, shapes, **options)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_and_wanted_dtypes_mix(stored, dtype, tmp_path):
    folder = tiny.make_checkpoint("qwen2", tmp_path, dtype=stored)
    assert open_checkpoint(folder).dtype == np.dtype(stored).name
    weights = load(folder, dtype)
    for path, array in tiny.Tiny("qwen2").weights.items():
        expected = np.asarray(array).astype(stored).astype(jnp.dtype(dtype))
        assert weights[path].dtype == dtype
        np.testing.assert_array_equal(weights[path], expected, err_msg=path)


def test_stacked_weights_are_the_layers_in_order(tmp_path):
    folder = tiny.make_checkpoint("gemma3", tmp_path)
    layers, stacked = load(folder), load(folder, stacked=True)
    for path, array in stacked.items():
        if path.startswith("layers."):
            parts = [layers[path.replace("layers.", f"layers.{i}.", 1)] for i in range(3)]
            np.testing.assert_array_equal(array, np.stack(parts), err_msg=path)


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    weights = load(tiny.make_checkpoint("llama", tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(array.nbytes for array in weights.values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_each_weight_goes_where_its_sharding_says(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    checkpoint = open_checkpoint(folder)
    _, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, "float32")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    weights = load_weights(checkpoint, shapes, wheres=dict.fromkeys(shapes, where))
    assert list(weights) == list(shapes) and {array.sharding for array in weights.values()} == {where}
    layout = Layout(major_to_minor=(0,))
    norm = load_weights(checkpoint, shapes, wheres=dict.fromkeys(shapes, where) | {"norm.scale": Format(layout, where)})
    assert norm["norm.scale"].format.layout.major_to_minor == (0,)
    np.testing.assert_array_equal(norm["norm.scale"], weights["norm.scale"])


def test_weights_that_grow_on_the_device_are_the_same(tmp_path, monkeypatch):
    folder = tiny.make_checkpoint("qwen2", tmp_path)
    whole = load(folder, stacked=True)
    monkeypatch.setattr(place, "SLAB_BYTES", 1000)
    for path, array in load(folder, stacked=True, by_slabs=True).items():
        np.testing.assert_array_equal(array, whole[path], err_msg=path)


def test_an_error_names_the_checkpoint(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    hf = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    tiny.write_json(folder / "config.json", hf)
    with pytest.raises(ConversionError, match=f"{folder}: tensor 'model.layers.1.*which the model lacks"):
        load(folder)


def test_a_folder_is_opened_whole(tmp_path):
    checkpoint = open_checkpoint(tiny.make_checkpoint("llama", tmp_path))
    assert checkpoint.family.name == "llama" and checkpoint.family.tasks == ("generate",)
    assert checkpoint.generation_config["eos_token_id"] == [tiny.IM_END, tiny.EOS]
    assert checkpoint.tokenizer_config["eos_token"] == "<|im_end|>"
    assert checkpoint.chat_template == tiny.CHAT_TEMPLATE
    assert checkpoint.tokenizer.token_to_id("<|im_end|>") == tiny.IM_END
    assert {name for name, _ in checkpoint.tensors()} == set(tiny.tensor_shapes(checkpoint.hf_config))


def test_chat_templates_are_found_where_checkpoints_keep_them(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tiny.write_json(folder / "tokenizer_config.json", settings | {"chat_template": named})
    assert open_checkpoint(folder).chat_template == {"default": "D", "tool_use": "T"}
    (folder / "chat_template.jinja").write_text("J")
    assert open_checkpoint(folder).chat_template == "J"
    tiny.write_json(folder / "tokenizer_config.json", settings | {"chat_template": [3]})
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConversionError, match="chat_template"):
        open_checkpoint(folder)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match="tokenizer.json"):
        _ = open_checkpoint(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    assert open_checkpoint(folder).tokenizer is None
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConversionError, match="tokenizer.json"):
        _ = open_checkpoint(folder).tokenizer


def test_the_fingerprint_is_of_the_content(tmp_path):
    first = open_checkpoint(tiny.make_checkpoint("llama", tmp_path / "a")).fingerprint()
    assert open_checkpoint(tiny.make_checkpoint("llama", tmp_path / "b")).fingerprint() == first
    assert open_checkpoint(tiny.make_checkpoint("llama", tmp_path / "c", seed=1)).fingerprint() != first
    assert open_checkpoint(tiny.make_checkpoint("llama", tmp_path / "d", rope_theta=3e4)).fingerprint() != first


@pytest.mark.parametrize("name", ["nowhere", "file.txt", "empty"])
def test_what_is_no_checkpoint_is_refused(name, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=name):
        open_checkpoint(tmp_path / name)
