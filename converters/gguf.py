"""GGUF files -> what a Hugging Face folder would say: config, tensor names, tokenizer.

The families' own converters then do the rest, so a family learns GGUF by a row in ARCHITECTURES.
Source of the names and of what llama.cpp changes in the weights: the gguf package's tensor_mapping and constants.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from converters.checkpoint import Checkpoint
from converters.families import family_of
from converters.fields import Fields
from converters.gguf_file import GgufFile
from converters.gguf_tokenizer import build_tokenizer, tokenizer_settings
from converters.rules import ConversionError, TensorInfo

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
SANDWICH_NAMES = NAMES | {
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}


def _of_experts(hf: str, names: dict[str, str]) -> dict[str, str]:
    """The names of a layer's experts, in one tensor, and in older files in one for each.

    Args:
        hf: what Hugging Face's checkpoints call the layer.
        names: what they call each expert's gate, up and down.
    """
    layer, found = f"model.layers.{{i}}.{hf}", {}
    for theirs, ours in names.items():
        for form in ("_exps", ".{e}"):
            found[f"blk.{{i}}.ffn_{theirs}{form}"] = f"{layer}.experts.{{e}}.{ours}"
    return NAMES | {"blk.{i}.ffn_gate_inp": f"{layer}.gate"} | found


ROPE_FACTORS = "rope_freqs.weight"
GEMMA3_27B_LAYERS = 62  # the one size whose queries are scaled by hidden_size / heads, not by head_dim


@dataclasses.dataclass(frozen=True)
class Undo:
    """apply(rows) undoes a change, given whole groups of so many rows of a tensor."""

    apply: Callable[[np.ndarray], np.ndarray]
    num_rows: int = 1


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        hf: the name in config.json's architectures.
        names: GGUF tensor -> Hugging Face tensor, both without ".weight" or ".bias".
        undo: (Hugging Face config) -> {part of a Hugging Face name: what undoes the changes of the file's maker}.
        extra: fields of config.json that only this family has.
    """

    hf: str
    names: dict[str, str]
    undo: Callable[[dict], dict[str, Undo]] = lambda hf: {}
    extra: Callable[[Fields, dict], dict] = lambda keys, hf: {}


def _unpermute(hf):
    """Rotated pairs lie side by side in the file; ours are half a head apart."""
    size = hf["head_dim"]
    heads = Undo(lambda w: w.reshape(-1, size // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape), size)
    return {"self_attn.q_proj.": heads, "self_attn.k_proj.": heads}


def _minus_one(hf):
    """The file holds 1 + scale, the checkpoint the scale."""
    return {"norm.weight": Undo(lambda w: w - np.float32(1))}


def _qwen3_fields(keys, hf):
    return {"use_sliding_window": False}


def _qwen3_moe_fields(keys, hf):
    experts = _expert_fields(keys, "num_experts")
    size = keys.integer("expert_feed_forward_length")
    return experts | {"use_sliding_window": False, "moe_intermediate_size": size, "norm_topk_prob": True}


def _mixtral_fields(keys, hf):
    return _expert_fields(keys, "num_local_experts") | {"sliding_window": keys.values.get("attention.sliding_window")}


def _expert_fields(keys, count):
    keys.only("expert_gating_func", 1, "only routers by softmax are supported")
    keys.only("expert_shared_count", 0, "experts that all tokens share are not supported")
    return {count: keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}


def _gemma3_fields(keys, hf):
    size, heads = hf["hidden_size"], hf["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": size / heads if hf["num_hidden_layers"] == GEMMA3_27B_LAYERS else hf["head_dim"],
        "sliding_window": keys.integer("attention.sliding_window", high=2**30),
        "sliding_window_pattern": keys.optional_integer("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": keys.optional_number("final_logit_softcapping"),
        "attn_logit_softcapping": keys.optional_number("attn_logit_softcapping"),
    }


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", NAMES, _unpermute),
    "qwen2": Architecture("Qwen2ForCausalLM", NAMES),
    "qwen3": Architecture("Qwen3ForCausalLM", NAMES, extra=_qwen3_fields),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        _of_experts("mlp", {name: f"{name}_proj" for name in ("gate", "up", "down")}),
        extra=_qwen3_moe_fields,
    ),
    "gemma3": Architecture("Gemma3ForCausalLM", SANDWICH_NAMES, _minus_one, _gemma3_fields),
}
# A file says "llama" of these too.
MIXTRAL = Architecture(
    "MixtralForCausalLM",
    _of_experts("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    _unpermute,
    _mixtral_fields,
)


OF_EXPERTS = (MIXTRAL.hf, ARCHITECTURES["qwen3moe"].hf)


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A checkpoint in one GGUF file, with the file's metadata."""

    metadata: dict[str, Any]

    def _read_tokenizer(self) -> tokenizers.Tokenizer | None:
        return build_tokenizer(self.metadata, str(self.path))


class GgufTensors:
    """A file's tensors under Hugging Face's names and in its conventions. A rules.TensorSource."""

    def __init__(self, file: GgufFile, architecture: Architecture, hf_config: dict[str, Any]):
        self.file = file
        self._undo = architecture.undo(hf_config)
        self._places: dict[str, tuple[str, int | None]] = {}  # our name: its tensor, and which expert of those in it
        self.tensors: dict[str, TensorInfo] = {}
        for theirs, info in file.tensors.items():
            if theirs == ROPE_FACTORS:
                continue
            ours = _hf_name(theirs, architecture, file)
            if "{e}" not in ours:
                self._places[ours], self.tensors[ours] = (theirs, None), info
                continue
            num_experts, *shape = info.shape
            for e in range(num_experts):
                name = ours.replace("{e}", f"{e}")
                self._places[name], self.tensors[name] = (theirs, e), TensorInfo(tuple(shape), info.dtype)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        theirs, expert = self._places[name]
        undo = next((undo for part, undo in self._undo.items() if part in name), None)
        if undo is None:
            return self.file.read(theirs, rows, expert)
        if rows is None:
            return undo.apply(self.file.read(theirs))
        size = undo.num_rows
        first, last = rows.start // size * size, -(-rows.stop // size) * size
        found = undo.apply(self.file.read(theirs, slice(first, last)))
        return found[rows.start - first : rows.stop - first]


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file.

    Raises:
        ConversionError: it is damaged, or of an architecture or with tensors that are not known.
    """
    file = GgufFile(path)
    name = file.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ConversionError(f"{path}: architecture {name!r} is not known; known: {', '.join(ARCHITECTURES)}")
    if name == "llama" and file.metadata.get("llama.expert_count"):
        architecture = MIXTRAL
    hf_config = _hf_config(file, architecture)
    fields = Fields(hf_config, str(path))
    family = family_of(fields)
    config = family.config(fields)
    settings = tokenizer_settings(file.metadata, str(path))
    return GgufCheckpoint(
        path=path,
        family=family,
        hf_config=hf_config,
        config=config,
        source=GgufTensors(file, architecture, hf_config),
        generation_config=settings.generation_config,
        tokenizer_config=settings.tokenizer_config,
        chat_template=settings.chat_template,
        files=(path,),
        metadata=file.metadata,
    )


def _hf_name(name, architecture, file):
    """Hugging Face's name; with "{e}" in it of a tensor that has all experts of a layer."""
    base, _, word = name.rpartition(".")
    number = re.fullmatch(r"blk\.(\d{1,6})\.(.+?)(?:\.(\d{1,6}))?", base)
    expert = number[3] if number else None
    key = f"blk.{{i}}.{number[2]}{'' if expert is None else '.{e}'}" if number else base
    if key not in architecture.names or word not in ("weight", "bias"):
        raise ConversionError(
            f"{file.path}: tensor {name!r} has no place in {architecture.hf}; add a row to converters/gguf.py"
        )
    ours = f"{architecture.names[key]}.{word}".replace("{i}", number[1] if number else "")
    return ours if expert is None else ours.replace("{e}", expert)


def _hf_config(file, architecture) -> dict[str, Any]:
    """config.json's fields, from the metadata under the architecture's prefix."""
    prefix = file.metadata["general.architecture"] + "."
    values = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    keys = Fields(values, f"{file.path}, {prefix}*")
    if architecture.hf not in OF_EXPERTS and keys.integer("expert_count", 0, low=0):
        raise ConversionError(f"{file.path}: has experts; of mixtures Mixtral (llama) and qwen3moe are known")
    size, heads = keys.integer("embedding_length"), keys.integer("attention.head_count", high=2**12)
    hf = {
        "architectures": [architecture.hf],
        "hidden_size": size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", high=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads, high=2**12),
        "head_dim": keys.integer("attention.key_length", size // heads or 1),
        "max_position_embeddings": keys.integer("context_length", high=2**31),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", high=1.0),
        "vocab_size": _vocab_size(file, keys),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, keys),
    }
    keys.only("attention.value_length", hf["head_dim"], "values must be as wide as keys")
    keys.only("rope.dimension_count", hf["head_dim"], "only heads that are rotated whole are supported")
    if architecture.hf == "LlamaForCausalLM":
        hf["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        if "attention.sliding_window" in keys:
            hf |= {"architectures": ["MistralForCausalLM"], "sliding_window": values["attention.sliding_window"]}
    return hf | architecture.extra(keys, hf)


def _vocab_size(file, keys):
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ConversionError(f"{file.path}: tensor 'token_embd.weight' is missing; download it again")
    keys.only("vocab_size", table.shape[0], f"the token table has {table.shape[0]} rows")
    return table.shape[0]


def _rope_scaling(file, keys):
    """rope_scaling as config.json would have it; factors a frequency come from a tensor of their own."""
    if ROPE_FACTORS in file.tensors:
        return {"rope_type": "default", "factors": file.read(ROPE_FACTORS).astype(float).tolist()}
    if "rope.scale_linear" in keys:
        return {"rope_type": "linear", "factor": keys.number("rope.scale_linear", low=1e-3)}
    kind = keys.choice("rope.scaling.type", ["none", "linear", "yarn"], "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": keys.number("rope.scaling.factor", low=1e-3)}
    original = keys.optional_integer("rope.scaling.original_context_length", high=2**31)
    return scaling | ({"original_max_position_embeddings": original} if original and kind == "yarn" else {})
