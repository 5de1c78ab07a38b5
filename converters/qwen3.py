"""Hugging Face Qwen3 checkpoints, dense and of experts -> models.qwen3."""

from converters import llama
from converters.fields import Fields
from converters.qwen2 import QWEN2, layer_windows
from converters.rope import attention_sizes, rope
from converters.rules import Rule
from models.layers.mlp import ACTIVATIONS
from models.qwen3 import Qwen3Config

# What transformers takes for a field that config.json leaves out.
QWEN3 = QWEN2 | dict(head_dim=128, attention_bias=False)
QWEN3_MOE = QWEN2 | dict(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=24,
    num_key_value_heads=4,
    head_dim=None,
    attention_bias=False,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=False,
)


def config(fields: Fields) -> Qwen3Config:
    f = fields.over(QWEN3)
    return _config(f, windows=layer_windows(f))


def moe_config(fields: Fields) -> Qwen3Config:
    f = fields.over(QWEN3_MOE)
    f.only("decoder_sparse_step", 1, "only models with experts in every layer are supported")
    f.only("mlp_only_layers", [], "only models with experts in every layer are supported")
    num_experts = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    experts = llama.mixture(f, num_experts, "moe_intermediate_size", normalised=f.flag("norm_topk_prob"))
    window = f.optional_integer("sliding_window", high=2**30) if f.flag("use_sliding_window") else None
    return _config(f, windows=(window,) * f.integer("num_hidden_layers", high=1024), mixture=experts)


def _config(f: Fields, *, windows, mixture=None) -> Qwen3Config:
    N, K, H = attention_sizes(f)
    max_length = f.integer("max_position_embeddings", high=2**31)
    return Qwen3Config(
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size", high=2**20),
        ffn_size=f.integer("intermediate_size", high=2**22),
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        max_length=max_length,
        rope=rope(f, H, max_length),
        norm_eps=f.number("rms_norm_eps", high=1.0),
        activation=f.choice("hidden_act", ACTIVATIONS),
        windows=windows,
        tie_embeddings=f.flag("tie_word_embeddings"),
        attention_bias=f.flag("attention_bias"),
        mixture=mixture,
    )


def rules(c: Qwen3Config) -> list[Rule]:
    hf, ours = "model.layers.{i}.self_attn.", "layers.{i}.attn."
    return [
        *llama.rules(c),
        Rule(hf + "q_norm.weight", ours + "q_norm.scale"),
        Rule(hf + "k_norm.weight", ours + "k_norm.scale"),
    ]


def moe_rules(c: Qwen3Config) -> list[Rule]:
    return [*rules(c), *llama.expert_rules("mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")})]
