"""A model with another tokenizer, or with fields laid over its config.json."""

import json

import pytest
import tiny
import tiny_gguf

from converters.checkpoint import open_checkpoint
from converters.rules import ConversionError


def folder(path, **changes):
    made = tiny.make_checkpoint("llama", path)
    if changes:
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | changes))
    return made


def test_overrides_are_laid_over_the_config(tmp_path):
    checkpoint = open_checkpoint(folder(tmp_path), overrides={"rope_theta": 5.0, "max_position_embeddings": 64})
    assert checkpoint.config.max_length == 64 and checkpoint.hf_config["rope_theta"] == 5.0
    assert checkpoint.config != open_checkpoint(tmp_path).config


def test_overrides_may_name_the_architecture(tmp_path):
    made = folder(tmp_path, architectures=["UnheardOfForCausalLM"])
    with pytest.raises(ConversionError, match="UnheardOf"):
        open_checkpoint(made)
    assert open_checkpoint(made, overrides={"architectures": ["LlamaForCausalLM"]}).config.num_layers == 2


def test_overrides_are_read_with_the_same_suspicion(tmp_path):
    with pytest.raises(ConversionError, match="hidden_size"):
        open_checkpoint(folder(tmp_path), overrides={"hidden_size": "wide"})


def test_overrides_work_for_gguf(tmp_path):
    path = tiny_gguf.make_gguf("llama", tmp_path / "a.gguf")
    assert open_checkpoint(path, overrides={"max_position_embeddings": 33}).config.max_length == 33


def test_another_tokenizer_brings_its_settings_and_its_template(tmp_path):
    other = folder(tmp_path / "other")
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"chat_template": "other", "x": 1}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    text = (other / "tokenizer.json").read_text().replace("<|im_end|>", "<|changed|>")
    (other / "tokenizer.json").write_text(text)
    checkpoint = open_checkpoint(folder(tmp_path / "model"), tokenizer=other)
    assert checkpoint.tokenizer.token_to_id("<|changed|>") == tiny.IM_END
    assert checkpoint.tokenizer_config["x"] == 1 and checkpoint.chat_template == "other"
    del settings["chat_template"]
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path / "model", tokenizer=other)
    assert checkpoint.chat_template == open_checkpoint(tmp_path / "model").chat_template


def test_a_gguf_file_may_be_the_tokenizer(tmp_path):
    path = tiny_gguf.make_gguf("llama", tmp_path / "a.gguf")
    checkpoint = open_checkpoint(folder(tmp_path / "model"), tokenizer=path)
    assert checkpoint.tokenizer.to_str() == open_checkpoint(path).tokenizer.to_str()


def test_a_place_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConversionError, match="no tokenizer.json"):
        open_checkpoint(folder(tmp_path / "model"), tokenizer=tmp_path)
