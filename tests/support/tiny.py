"""Tiny models of every family: random weights, a real tokenizer, batches, caches, and whole checkpoints on disk.

In a test of a model:

    model = tiny.Tiny("llama")
    logits_TV, caches = model.run(tiny.one_prompt([3, 1, 4]), model.caches())

In a test that starts from files:

    folder = tiny.make_checkpoint("llama", tmp_path)
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from converters.families import family_of
from converters.fields import Fields
from converters.parts import convert
from converters.rules import TensorInfo
from models import interface
from models.inputs import StepInputs
from pallas_kernels.ragged_paged_attention import cache_shape

PAGE_SIZE = 4
NUM_PAGES = 32
VOCAB_SIZE = 320
EOS, IM_START, IM_END = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>
TEXT = ["Hello world, this is a test. What is the capital of France? The capital of France is Paris. " * 2]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_act="silu",
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
    bos_token_id=EOS,
    eos_token_id=IM_END,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def _hf(architecture, model_type, **changes):
    return {"architectures": [architecture], "model_type": model_type, "dtype": "float32", **SIZES, **changes}


# Name -> config.json.
FAMILIES = {
    "llama": _hf("LlamaForCausalLM", "llama"),
    "llama_tied": _hf("LlamaForCausalLM", "llama", tie_word_embeddings=True, num_key_value_heads=4),
    "llama_biased": _hf("LlamaForCausalLM", "llama", attention_bias=True, mlp_bias=True),
    "llama31": _hf("LlamaForCausalLM", "llama", rope_scaling=LLAMA3_ROPE),
    "mistral": _hf("MistralForCausalLM", "mistral", sliding_window=6),
    "mixtral": _hf("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _hf("Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": _hf("Qwen3ForCausalLM", "qwen3", tie_word_embeddings=True),
    "qwen3_moe": _hf(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    ),
    "gemma3": _hf(
        "Gemma3ForCausalLM",
        "gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=3,
        sliding_window=6,
        sliding_window_pattern=3,
        query_pre_attn_scalar=24,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        tie_word_embeddings=True,
    ),
}


class Tiny:
    """A tiny model of a family with weights from a seed.

    Attributes:
        model_class, config: as the family's converter gives them.
        graph, shapes, weights: as models.interface has them.
    """

    def __init__(self, family, *, dtype=jnp.float32, stacked=False, seed=0, **changes):
        hf = FAMILIES[family] | changes
        fields = Fields(hf)
        row = family_of(fields)
        self.model_class, self.config = row.model_class, row.config(fields)
        self.stacked, self.dtype = stacked, dtype
        self.graph, self.shapes = interface.abstract(self.model_class, self.config, dtype, stacked)
        converted = convert(Arrays(random_tensors(hf, seed)), row.rules(self.config), self.shapes)
        self.weights = {path: jnp.asarray(array) for path, array in converted}

    @functools.cached_property
    def cache_specs(self):
        return interface.bind(self.graph, self.shapes).cache_specs()

    def caches(self, num_pages=NUM_PAGES, page_size=PAGE_SIZE):
        return empty_caches(self.cache_specs, num_pages, page_size, self.dtype, self.stacked)

    def run(self, inputs, caches):
        """Logits of every token, float32[T, V], and the caches; compiled once a shape."""
        return run(self.graph, self.weights, inputs, caches)

    def greedy(self, prompt, num_tokens, *, page_size=PAGE_SIZE, num_pages=NUM_PAGES):
        """The tokens that greedy decoding adds to a prompt, one step a token."""
        caches, tokens = self.caches(num_pages, page_size), list(prompt)
        logits_TV, caches = self.run(one_prompt(prompt, page_size=page_size, num_pages=num_pages), caches)
        tokens.append(int(np.argmax(logits_TV[len(prompt) - 1])))
        while len(tokens) < len(prompt) + num_tokens:
            inputs = batch([(tokens[-1:], len(tokens) - 1)], page_size=page_size, num_pages=num_pages)
            logits_TV, caches = self.run(inputs, caches)
            tokens.append(int(np.argmax(logits_TV[0])))
        return tokens[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def run(graph, weights, inputs, caches):
    """Logits of every token, float32[T, V], and the caches."""
    model = interface.bind(graph, weights)
    hidden_TD, caches = model(inputs, caches)
    return model.logits(hidden_TD), caches


class Arrays:
    """Arrays in memory as a rules.TensorSource."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name, rows=None):
        return self.arrays[name] if rows is None else self.arrays[name][rows]


def tensor_shapes(hf):
    """{name: shape} of what a checkpoint of this config.json holds."""
    D, F, V = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    N, K, H = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]
    kind, shapes = hf["model_type"], {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not hf["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    attention = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    biased = (
        set(attention) if hf.get("attention_bias") else {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set()
    )
    biased |= set(mlp) if hf.get("mlp_bias") else set()
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma3_text" else []
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in norms}
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            shapes |= {f"{layer}self_attn.{norm}.weight": (H,) for norm in ("q_norm", "k_norm")}
        for part, linears in [("self_attn", attention), *_feed_forward(hf, mlp)]:
            for name, shape in linears.items():
                shapes[f"{layer}{part}.{name}.weight"] = shape
                if name in biased:
                    shapes[f"{layer}{part}.{name}.bias"] = shape[:1]
    return shapes


def _feed_forward(hf, mlp):
    """(name, {name: shape}) of a layer's feed-forward layer, or of its router and experts."""
    D = hf["hidden_size"]
    if hf["model_type"] == "mixtral":
        part, count, F, names = "block_sparse_moe", hf["num_local_experts"], hf["intermediate_size"], ("w1", "w3", "w2")
    elif hf["model_type"] == "qwen3_moe":
        part, count, F, names = "mlp", hf["num_experts"], hf["moe_intermediate_size"], tuple(mlp)
    else:
        return [("mlp", mlp)]
    each = dict(zip(names, [(F, D), (F, D), (D, F)], strict=True))
    return [(part, {"gate": (count, D)}), *((f"{part}.experts.{e}", each) for e in range(count))]


def random_tensors(hf, seed=0):
    """Weights large enough that a wrong one shows, under Hugging Face's names, float32."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(hf).items():
        value = rng.standard_normal(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        is_scale = "norm" in name and hf["model_type"] != "gemma3_text"
        tensors[name] = (value + is_scale).astype(np.float32)
    return tensors


def make_checkpoint(family, folder, *, seed=0, dtype=np.float32, shards=1, **changes) -> Path:
    """Writes a complete Hugging Face folder and returns it.

    Args:
        family: a name in FAMILIES.
        dtype: of the stored weights, e.g. ml_dtypes.bfloat16.
        shards: how many safetensors files; more than one are indexed.
        changes: fields of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hf = FAMILIES[family] | {"dtype": np.dtype(dtype).name} | changes
    tensors = {name: array.astype(dtype) for name, array in random_tensors(hf, seed).items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(tensors.items())[i::shards])
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", hf)
    write_json(folder / "generation_config.json", {"bos_token_id": EOS, "eos_token_id": [IM_END, EOS]})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "model_max_length": hf["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1))


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE with a few words and chat tokens, VOCAB_SIZE or fewer tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def empty_caches(specs, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=jnp.float32, stacked=False):
    """One array a layer, or one for all when stacked."""
    shapes = [cache_shape(num_pages, page_size, s.num_kv_heads, s.head_dim, jax.default_backend()) for s in specs]
    if stacked:
        return [jnp.zeros((len(shapes) * shapes[0][0], *shapes[0][1:]), dtype)]
    return [jnp.zeros(shape, dtype) for shape in shapes]


def one_prompt(token_ids, past=0, **sizes):
    """A step of one row: these tokens, after `past` tokens that the cache already holds."""
    return batch([(token_ids, past)], **sizes)


def batch(rows, *, page_size=PAGE_SIZE, num_pages=NUM_PAGES, pad_tokens=0, pad_rows=0):
    """A ragged step. Each row is (its tokens, how many came before); row s owns an equal run of pages from the end.

    Rows of one token must come first.
    """
    T, S = sum(len(tokens) for tokens, _ in rows) + pad_tokens, len(rows) + pad_rows
    M = num_pages // len(rows)
    q_lens = np.array([len(tokens) for tokens, _ in rows] + [0] * pad_rows, np.int32)
    kv_lens = np.array([len(tokens) + past for tokens, past in rows] + [0] * pad_rows, np.int32)
    assert kv_lens.max() <= M * page_size, "the rows need more pages"
    token_ids, positions, table = np.zeros(T, np.int32), np.zeros(T, np.int32), np.zeros((S, M), np.int32)
    start = 0
    for s, (tokens, past) in enumerate(rows):
        token_ids[start : start + len(tokens)] = tokens
        positions[start : start + len(tokens)] = range(past, past + len(tokens))
        table[s] = range(num_pages - 1 - s * M, num_pages - 1 - (s + 1) * M, -1)
        start += len(tokens)
    num_decode = next((s for s, (tokens, _) in enumerate(rows) if len(tokens) != 1), len(rows))
    return StepInputs(
        token_ids_T=jnp.asarray(token_ids),
        positions_T=jnp.asarray(positions),
        cu_q_lens_S1=jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32),
        kv_lens_S=jnp.asarray(kv_lens),
        page_table_SM=jnp.asarray(table),
        counts_2=jnp.asarray([num_decode, len(rows)], jnp.int32),
        num_tokens=jnp.asarray(start, jnp.int32),
    )
