"""Hugging Face Llama, Mistral and Mixtral checkpoints -> models.llama."""

import numpy as np

from converters.fields import Fields
from converters.rope import attention_sizes, rope
from converters.rules import Rule, heads, kv_heads
from models.layers.experts import Mixture
from models.layers.mlp import ACTIVATIONS
from models.llama import LlamaConfig

# What transformers takes for a field that config.json leaves out.
LLAMA = dict(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
MISTRAL = LLAMA | dict(
    intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096
)
MIXTRAL = MISTRAL | dict(
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
    sliding_window=None,
    num_local_experts=8,
    num_experts_per_tok=2,
)


def config(fields: Fields) -> LlamaConfig:
    f = fields.over(LLAMA)
    bias = f.flag("attention_bias")
    windows = (None,) * f.integer("num_hidden_layers", high=1024)
    return block_config(f, windows=windows, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias"))


def mistral_config(fields: Fields) -> LlamaConfig:
    f = fields.over(MISTRAL)
    f.only("layer_types", None, "layers of different kinds are another family's (Ministral)")
    windows = (f.optional_integer("sliding_window", high=2**30),) * f.integer("num_hidden_layers", high=1024)
    return block_config(f, windows=windows, qkv_bias=False, o_bias=False, mlp_bias=False)


def mixtral_config(fields: Fields) -> LlamaConfig:
    f = fields.over(MIXTRAL)
    windows = (f.optional_integer("sliding_window", high=2**30),) * f.integer("num_hidden_layers", high=1024)
    experts = mixture(f, "num_local_experts", "intermediate_size", normalised=True)
    return block_config(f, windows=windows, qkv_bias=False, o_bias=False, mlp_bias=False, mixture=experts)


def mixture(f: Fields, num_experts: str, ffn_size: str, *, normalised: bool) -> Mixture:
    """The experts, by the names of the fields that a family has for their number and their size."""
    count = f.integer(num_experts, high=4096)
    return Mixture(
        num_experts=count,
        per_token=f.integer("num_experts_per_tok", high=count),
        ffn_size=f.integer(ffn_size, high=2**22),
        normalised=normalised,
    )


def block_config(f: Fields, *, windows, qkv_bias, o_bias, mlp_bias, mixture=None) -> LlamaConfig:
    """What the families of this block have in common."""
    N, K, H = attention_sizes(f)
    max_length = f.integer("max_position_embeddings", high=2**31)
    return LlamaConfig(
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
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        mixture=mixture,
    )


def mixtral_rules(c: LlamaConfig) -> list[Rule]:
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    return [*rules(c), *expert_rules("block_sparse_moe", names)]


def expert_rules(hf: str, names: dict[str, str]) -> list[Rule]:
    """The table of a layer's experts.

    Args:
        hf: what the checkpoint calls the layer.
        names: what it calls each expert's projections, by the names of an ordinary layer.
    """
    each, ours = f"model.layers.{{i}}.{hf}.experts.{{e}}.", "layers.{i}.mlp."
    return [
        Rule(f"model.layers.{{i}}.{hf}.gate.weight", ours + "router.kernel"),
        Rule(f"{each}{names['gate_proj']}.weight", ours + "gate_up.kernel", part=(0,)),
        Rule(f"{each}{names['up_proj']}.weight", ours + "gate_up.kernel", part=(1,)),
        Rule(f"{each}{names['down_proj']}.weight", ours + "down.kernel"),
    ]


def rules(c) -> list[Rule]:
    """The table of this block and of those that add to it: c is LlamaConfig, or has its fields for heads and tying."""
    hf, ours, G = "model.layers.{i}.", "layers.{i}.", c.num_heads // c.num_kv_heads
    per_query, per_kv = heads(c.num_kv_heads, c.head_dim), kv_heads(c.head_dim)
    table = [
        Rule("model.embed_tokens.weight", "embed.table"),
        Rule(hf + "input_layernorm.weight", ours + "attn_norm.scale"),
        Rule(hf + "self_attn.o_proj.weight", ours + "attn.o.kernel"),
        Rule(hf + "self_attn.o_proj.bias", ours + "attn.o.bias"),
        Rule(hf + "post_attention_layernorm.weight", ours + "mlp_norm.scale"),
        Rule(hf + "mlp.down_proj.weight", ours + "mlp.down.kernel"),
        Rule(hf + "mlp.down_proj.bias", ours + "mlp.down.bias"),
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", None if c.tie_embeddings else "lm_head.kernel"),
        Rule(hf + "self_attn.rotary_emb.inv_freq", None),
    ]
    for word, name in [("weight", "kernel"), ("bias", "bias")]:
        table += [
            Rule(hf + f"self_attn.q_proj.{word}", ours + f"attn.qkv.{name}", per_query, part=np.s_[:, :G]),
            Rule(hf + f"self_attn.k_proj.{word}", ours + f"attn.qkv.{name}", per_kv, part=np.s_[:, G]),
            Rule(hf + f"self_attn.v_proj.{word}", ours + f"attn.qkv.{name}", per_kv, part=np.s_[:, G + 1]),
            Rule(hf + f"mlp.gate_proj.{word}", ours + f"mlp.gate_up.{name}", part=(0,)),
            Rule(hf + f"mlp.up_proj.{word}", ours + f"mlp.gate_up.{name}", part=(1,)),
        ]
    return table
