"""Tiny GGUF files, written with the gguf package: its writer, its names, its quantisation."""

import json
import re

import gguf
import numpy as np
import tiny

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
}


def make_gguf(family, path, *, kind="F32", seed=0, metadata=None, extra=None, is_old=False, **changes):
    """Writes a family's tiny model as llama.cpp's own converter would, and returns the path.

    Args:
        kind: a name in gguf.GGMLQuantizationType for the matrices; vectors stay F32, and so do routers.
        is_old: experts have a tensor each, as its converter wrote them until April 2024.
        metadata: keys to set beside the usual, or to leave out where the value is None.
        extra: {GGUF name: array} of tensors beside the usual, as F32.
        changes: fields of config.json.
    """
    hf = tiny.FAMILIES[family] | changes
    arch = ARCHITECTURES[hf["architectures"][0]]
    names = gguf.get_tensor_name_map(arch, hf["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in (architecture_keys(hf, arch) | tokenizer_keys() | (metadata or {})).items():
        if value is not None:
            add(writer, key, value)
    kinds = gguf.GGMLQuantizationType
    tensors = {name: as_llama_cpp(name, array, hf, arch) for name, array in tiny.random_tensors(hf, seed).items()}
    if is_old:
        tensors, experts = one_by_one(tensors)
    else:
        tensors, experts = merged(tensors), {}
    named = {names.get_name(name, (".weight", ".bias")): array for name, array in tensors.items()} | experts
    for name, array in named.items():
        quantised = kinds[kind] if array.ndim > 1 and "ffn_gate_inp" not in name else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def architecture_keys(hf, arch):
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    keys = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "block_count": hf["num_hidden_layers"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"],
        "attention.value_length": hf["head_dim"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.freq_base": float(hf["rope_theta"]),
        "rope.dimension_count": hf["head_dim"],
    }
    if "num_experts_per_tok" in hf:
        keys["expert_count"] = hf.get("num_experts") or hf["num_local_experts"]
        keys["expert_used_count"] = hf["num_experts_per_tok"]
    if "moe_intermediate_size" in hf:
        keys["expert_feed_forward_length"] = hf["moe_intermediate_size"]
    if arch == gguf.MODEL_ARCH.GEMMA3:
        keys["attention.sliding_window"] = hf["sliding_window"]
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def tokenizer_keys():
    backend = tiny.tokenizer()
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for _, i in vocab],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tiny.EOS,
        "tokenizer.ggml.eos_token_id": tiny.IM_END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


EXPERT = re.compile(r"(model\.layers\.(\d+)\..+\.experts)\.(\d+)\.(\w+)\.weight")


def merged(tensors):
    """With the experts of a layer in one tensor each for gate, up and down."""
    found, stacks = {}, {}
    for name, array in tensors.items():
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[4]}.weight".replace("block_sparse_moe.", ""), []).append(array)
        else:
            found[name] = array
    as_known = lambda name: re.sub(r"model\.(layers\.\d+)\.experts\.(w\d)", r"\1.feed_forward.experts.\2", name)
    return found | {as_known(name): np.stack(arrays) for name, arrays in stacks.items()}


def one_by_one(tensors):
    """(the tensors without experts, {GGUF name: array} of these)."""
    words = {"w1": "gate", "w2": "down", "w3": "up"} | {f"{word}_proj": word for word in ("gate", "up", "down")}
    experts = {
        f"blk.{match[2]}.ffn_{words[match[4]]}.{match[3]}.weight": array
        for name, array in tensors.items()
        if (match := EXPERT.fullmatch(name))
    }
    return {name: array for name, array in tensors.items() if not EXPERT.fullmatch(name)}, experts


def as_llama_cpp(name, array, hf, arch):
    """What its converter does to some weights."""
    if arch == gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
        heads = hf["num_attention_heads"] if "q_proj" in name else hf["num_key_value_heads"]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    if arch == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
        return array + 1
    return array


def add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
