"""A GGUF file of a family gives the same weights and config as its Hugging Face folder."""

import gguf
import numpy as np
import pytest
import tiny
import tiny_gguf

from converters.checkpoint import open_checkpoint
from converters.load import load_weights
from converters.rules import ConversionError
from models import interface
from models.layers.rope import frequencies

FAMILIES = {
    "llama": {},
    "llama_biased": dict(tie_word_embeddings=True, mlp_bias=False),
    "qwen2": dict(use_sliding_window=False),
    "qwen3": {},
    "gemma3": dict(sliding_window_pattern=6, query_pre_attn_scalar=16),
    "mixtral": {},
    "qwen3_moe": {},
}


def loaded(path):
    checkpoint = open_checkpoint(path)
    _, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, "float32")
    return checkpoint, load_weights(checkpoint, shapes)


@pytest.mark.parametrize("family, is_old", [*((family, False) for family in FAMILIES), ("mixtral", True)])
def test_gguf_equals_the_folder(family, is_old, tmp_path):
    changes = FAMILIES[family]
    folder, weights = loaded(tiny.make_checkpoint(family, tmp_path / "folder", **changes))
    file, from_gguf = loaded(tiny_gguf.make_gguf(family, tmp_path / "tiny.gguf", is_old=is_old, **changes))
    assert set(weights) == set(from_gguf)
    for path, array in weights.items():
        np.testing.assert_allclose(from_gguf[path], array, atol=1e-6, err_msg=path)
    wanted = {name: value for name, value in vars(folder.config).items() if name != "norm_eps"}
    assert {name: value for name, value in vars(file.config).items() if name != "norm_eps"} == wanted
    assert file.config.norm_eps == pytest.approx(folder.config.norm_eps)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen3_moe"])
def test_quantised_weights_are_near(family, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    _, weights = loaded(tiny.make_checkpoint(family, tmp_path / "folder", **sizes))
    path = tiny_gguf.make_gguf(family, tmp_path / "q.gguf", kind="Q8_0", **sizes)
    checkpoint, near = loaded(path)
    assert checkpoint.dtype == "float32"
    for name, array in weights.items():
        np.testing.assert_allclose(near[name], array, atol=0.02, err_msg=name)
    assert any((np.asarray(near[name]) != np.asarray(array)).any() for name, array in weights.items())


def test_llama31_frequencies_come_from_the_tensor(tmp_path):
    """llama.cpp's converter writes one divisor a pair; transformers computes them from the config."""
    scaling = tiny.LLAMA3_ROPE
    base = 1e4 ** -(np.arange(0, 16, 2) / 16)
    wavelength = 2 * np.pi / base
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    factors = np.where(wavelength < high, 1.0, np.where(wavelength > low, scaling["factor"], between))
    path = tiny_gguf.make_gguf("llama", tmp_path / "a.gguf", extra={"rope_freqs.weight": factors.astype(np.float32)})
    folder = open_checkpoint(tiny.make_checkpoint("llama31", tmp_path / "folder"))
    np.testing.assert_allclose(
        frequencies(open_checkpoint(path).config.rope), frequencies(folder.config.rope), rtol=1e-6
    )


@pytest.mark.parametrize(
    "metadata, rope",
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, ("linear", 4.0, 0)),
        ({"llama.rope.scale_linear": 2.0}, ("linear", 2.0, 0)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            ("yarn", 8.0, 64),
        ),
        ({"llama.rope.scaling.type": "none"}, ("default", 1.0, 0)),
    ],
)
def test_rope_scaling_of_the_metadata(metadata, rope, tmp_path):
    got = open_checkpoint(tiny_gguf.make_gguf("llama", tmp_path / "a.gguf", metadata=metadata)).config.rope
    assert (got.kind, got.factor, got.original_length) == rope


def as_qwen2(more):
    """A llama's keys under another architecture's name, and more."""
    keys = tiny_gguf.architecture_keys(tiny.FAMILIES["llama"], gguf.MODEL_ARCH.QWEN2)
    return keys | {f"qwen2.{key}": value for key, value in more.items()}


REFUSED = {
    "architecture": ({"general.architecture": "mamba"}, "'mamba' is not known; known: llama, "),
    "experts": ({"general.architecture": "qwen2"} | as_qwen2({"expert_count": 8}), "has experts; of mixtures Mixtral"),
    "no experts": ({"llama.expert_count": 8}, "expert_used_count is missing"),
    "a router by sigmoid": (
        {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_gating_func": 2},
        "expert_gating_func is 2; only routers by softmax",
    ),
    "no width": ({"llama.embedding_length": None}, "embedding_length is missing"),
    "heads a layer": ({"llama.attention.head_count": [4, 4]}, "attention.head_count is"),
    "partial rotation": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
    "vocabulary": ({"llama.vocab_size": 7}, "vocab_size is 7"),
    "eos": ({"tokenizer.ggml.eos_token_id": 100_000}, "eos_token_id 100000 is not among"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case, tmp_path):
    metadata, says = REFUSED[case]
    with pytest.raises(ConversionError, match=says):
        open_checkpoint(tiny_gguf.make_gguf("llama", tmp_path / "a.gguf", metadata=metadata))


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    path = tiny_gguf.make_gguf("llama", tmp_path / "a.gguf", extra={"blk.0.ssm_in.weight": np.ones(4, np.float32)})
    with pytest.raises(ConversionError, match="'blk.0.ssm_in.weight' has no place in LlamaForCausalLM"):
        open_checkpoint(path)


def test_a_sliding_window_makes_it_mistral(tmp_path):
    path = tiny_gguf.make_gguf("llama", tmp_path / "a.gguf", metadata={"llama.attention.sliding_window": 6})
    checkpoint = open_checkpoint(path)
    assert checkpoint.family.name == "mistral" and checkpoint.config.windows == (6, 6)


def test_the_name_of_the_gguf_package_is_not_hidden():
    assert gguf.GGUFReader is not None and "site-packages" in gguf.__file__
