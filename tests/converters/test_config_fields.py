"""config.json is read with suspicion: a lie names its field, and what is absent is Hugging Face's own default."""

import json

import pytest
import tiny

from converters import gemma3
from converters.checkpoint import open_checkpoint
from converters.families import FAMILIES, family_of
from converters.fields import Fields
from converters.load import load_weights
from converters.rules import ConversionError
from models import interface
from models.layers.experts import Mixture
from models.layers.rope import Rope, frequencies


def config(hf):
    fields = Fields(hf)
    return family_of(fields).config(fields)


def changed(family, **changes):
    return config(tiny.FAMILIES[family] | changes)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_tiny_configs_are_understood(family):
    c = changed(family)
    assert (c.vocab_size, c.hidden_size, c.num_layers) == (320, 32, tiny.FAMILIES[family]["num_hidden_layers"])


LIES = [
    (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None},
        "num_attention_heads is 3, not a divisor of hidden_size",
    ),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, not a divisor of num_attention_heads 4"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
    ("llama", {"num_key_value_heads": -2}, "num_key_value_heads is -2, not between"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0, not between"),
    ("llama", {"head_dim": 7}, "head_dim is 7; rotary embedding needs an even one"),
    ("llama", {"hidden_size": -1}, "hidden_size is -1"),
    ("llama", {"hidden_size": 2**40}, "hidden_size is 1099511627776, not between"),
    ("llama", {"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
    ("llama", {"hidden_size": 32.0}, "hidden_size is 32.0, not a whole number"),
    ("llama", {"hidden_size": True}, "hidden_size is True, not a whole number"),
    ("llama", {"hidden_size": [32]}, r"hidden_size is \[32\]"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not between 1 and 1,024"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("llama", {"intermediate_size": 2**50}, "intermediate_size"),
    ("llama", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    ("llama", {"rope_theta": float("inf")}, "rope_theta is inf"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
    ("llama", {"hidden_act": "mystery"}, "hidden_act is 'mystery', not one of gelu"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act is"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not known"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "type 'longrope' is not known"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope_scaling: factor is '4', not a number"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling holds 'linear', not an object"),
    ("llama", {"rope_scaling": tiny.LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
    ("llama", {"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not known; known: LlamaForCausalLM, "),
    ("llama", {"architectures": None}, "architectures is None"),
    ("llama", {"architectures": [3]}, "architectures is"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is .* a list of 2"),
    ("qwen2", {"layer_types": ["full_attention", "strange"]}, "layer_types is 'strange'"),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, not true or false"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3", {"hidden_activation": "swiglu"}, "hidden_activation is 'swiglu'"),
]


@pytest.mark.parametrize("family, lie, says", LIES, ids=[f"{f}-{json.dumps(lie)[:50]}" for f, lie, _ in LIES])
def test_a_lie_is_refused_by_name(family, lie, says):
    with pytest.raises(ConversionError, match=says):
        changed(family, **lie)


def test_a_config_that_disagrees_with_the_weights_is_refused_before_reading(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    hf = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 2**20, "vocab_size": 2**22}
    tiny.write_json(folder / "config.json", hf)
    checkpoint = open_checkpoint(folder)
    _, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, "float32")
    with pytest.raises(ConversionError, match=r"'lm_head.weight' \(320, 32\) gives"):
        load_weights(checkpoint, shapes)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 200_000, b'{"a": 1e999999}' * 2])
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ConversionError, match="config.json"):
        open_checkpoint(folder)


def experts(num_experts, per_token, ffn_size, normalised):
    return Mixture(num_experts=num_experts, per_token=per_token, ffn_size=ffn_size, normalised=normalised)


# What transformers 5.23 fills in for an empty config.json of each architecture.
DEFAULTS = {
    "LlamaForCausalLM": dict(hidden_size=4096, ffn_size=11008, num_heads=32, num_kv_heads=32, head_dim=128),
    "MistralForCausalLM": dict(ffn_size=14336, num_kv_heads=8, max_length=131072, windows=(4096,) * 32),
    "Qwen2ForCausalLM": dict(vocab_size=151936, ffn_size=22016, num_kv_heads=32, windows=(None,) * 32, qkv_bias=True),
    "Qwen3ForCausalLM": dict(head_dim=128, num_kv_heads=32, max_length=32768, tie_embeddings=False),
    "MixtralForCausalLM": dict(ffn_size=14336, windows=(None,) * 32, mixture=experts(8, 2, 14336, True)),
    "Qwen3MoeForCausalLM": dict(head_dim=64, num_kv_heads=4, mixture=experts(128, 8, 768, False)),
    "Gemma3ForCausalLM": dict(vocab_size=262208, hidden_size=2304, head_dim=256, query_scale=256**-0.5),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_absent_is_the_familys_default(architecture):
    c = config({"architectures": [architecture]})
    expected = DEFAULTS[architecture]
    assert {name: getattr(c, name) for name in expected} == expected


def test_gemma_layers_alternate():
    c = config({"architectures": ["Gemma3ForCausalLM"], "sliding_window": 9})
    assert c.windows[:7] == (9, 9, 9, 9, 9, None, 9)
    assert (c.global_rope.theta, c.local_rope.theta) == (gemma3.GLOBAL_THETA, gemma3.LOCAL_THETA)


def test_windows_of_qwen2_begin_after_the_full_layers():
    sliding = dict(use_sliding_window=True, sliding_window=5, num_hidden_layers=4)
    assert changed("qwen2", **sliding, max_window_layers=3).windows == (None, None, None, 5)
    types = ["sliding_attention", "full_attention"] * 2
    assert changed("qwen2", **sliding, layer_types=types).windows == (5, None, 5, None)
    assert changed("qwen2", **sliding | {"use_sliding_window": False}).windows == (None,) * 4


def test_a_null_window_is_none():
    assert changed("mistral", sliding_window=None).windows == (None, None)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, tiny.LLAMA3_ROPE])
def test_old_and_new_rope_fields_mean_the_same(scaling):
    old = changed("llama", rope_theta=5e5, rope_scaling=scaling)
    new = changed("llama", rope_theta=None, rope_parameters={"rope_theta": 5e5, **(scaling or {})})
    assert old == new and old.rope.theta == 5e5


def test_yarn_magnitude():
    yarn = {"rope_type": "yarn", "factor": 8.0}
    assert changed("llama", rope_scaling=yarn).rope.magnitude == pytest.approx(1.2079, abs=1e-4)
    assert changed("llama", rope_scaling=yarn | {"attention_factor": 0.5}).rope.magnitude == 0.5
    same = yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}
    assert changed("llama", rope_scaling=same).rope.magnitude == 1.0


def test_llama3_keeps_short_periods_and_stretches_long_ones():
    plain = Rope(theta=1e4, head_dim=64)
    scaled = Rope(theta=1e4, head_dim=64, kind="llama3", factor=8.0, original_length=256, low=1.0, high=4.0)
    ratio = frequencies(scaled) / frequencies(plain)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 8) and ((ratio > 0.13) & (ratio < 0.99)).any()
