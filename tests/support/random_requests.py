"""Valid requests drawn at random from the schema: every field of completions and chat, alone and together.

`draw(number)` is the same request each time. What two fields ask for never contradicts: no penalty for one, a ban of
all that a grammar allows, and so on; a contradiction is refused, which other tests look at.
"""

import dataclasses
import random

import tiny

WORDS = [
    "one",
    "two",
    "France",
    "Paris",
    "a test",
    "Hello",
    "é",
    "日本",
    "😀",
    "{",
    "\n",
    "world",
    "<|im_end|>",
    "'",
    "0",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "looks", "parameters": SCHEMA}},
    {"function": {"name": "wait"}},
]
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}
GRAMMAR = 'start: "one" | "two" start'
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
# Constraints, each with the name of the field it stands in.
CONSTRAINTS = [
    ("structured_outputs", {"json": SCHEMA}),
    ("structured_outputs", {"json": '{"type": "boolean"}', "disable_any_whitespace": True}),
    ("structured_outputs", {"regex": "(a|bc){1,8}", "whitespace_pattern": None}),
    ("structured_outputs", {"choice": ["red", "green", "blé"], "disable_fallback": True}),
    ("structured_outputs", {"grammar": GRAMMAR}),
    ("structured_outputs", {"json_object": True, "disable_additional_properties": False}),
    ("structured_outputs", {}),
    ("response_format", {"type": "text"}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}),
    ("response_format", {"type": "structural_tag"} | TAG),
    ("guided_json", SCHEMA),
    ("guided_regex", "[0-9]{1,4}"),
    ("guided_choice", ["yes", "no"]),
    ("guided_grammar", GRAMMAR),
]
# Fields this server refuses by name unless they are null.
NULL_ONLY = {"suffix", "prompt_embeds", "logits_processors", "structural_tag"}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """path: where to post. body: what. is_seeded: the answer is the same each time."""

    path: str
    body: dict
    is_seeded: bool

    @property
    def is_chat(self) -> bool:
        return "messages" in self.body

    def flipped(self) -> "Drawn":
        """The same answer asked for in the other way, streamed or whole; itself where only one way is allowed."""
        body = dict(self.body)
        if body.pop("stream", False):
            body.pop("stream_options", None)
        elif not body.get("prompt_logprobs") and not (body.get("echo") and body.get("top_logprobs")):
            body["stream"] = True
        return dataclasses.replace(self, body=body)


def draw(number: int) -> Drawn:
    rng = random.Random(number)
    is_chat = rng.random() < 0.5
    body = _chat(rng) if is_chat else _completion(rng)
    is_seeded = _shared(rng, body)
    _constraint(rng, body, is_chat)
    _beams(rng, body, is_chat)
    is_seeded |= bool(body.get("use_beam_search"))
    if rng.random() < 0.05:
        body["no_such_field"] = {"is": "ignored"}
    return Drawn("/v1/chat/completions" if is_chat else "/v1/completions", body, is_seeded)


def _text(rng, most=12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def _ids(rng, most=8) -> list[int]:
    return [rng.randrange(tiny.tokenizer().get_vocab_size()) for _ in range(rng.randint(1, most))]


def _some(rng, body: dict, share: float, **fields) -> None:
    """Puts each field in with this chance; a value is made by calling it."""
    for name, make in fields.items():
        if rng.random() < share:
            body[name] = make()


def _completion(rng) -> dict:
    body: dict = {"prompt": rng.choice([lambda: _text(rng), lambda: _ids(rng)])()}
    if rng.random() < 0.15:
        body["prompt"] = [rng.choice([_text, _ids])(rng)]
        kind = _text if isinstance(body["prompt"][0], str) else _ids
        body["prompt"] += [kind(rng) for _ in range(rng.randint(0, 2))]
    _some(rng, body, 0.9, max_tokens=lambda: rng.randint(1, 16))
    _some(
        rng,
        body,
        0.2,
        echo=lambda: rng.random() < 0.8,
        logprobs=lambda: rng.choice([0, 1, 5, 20]),
        add_special_tokens=lambda: rng.random() < 0.5,
    )
    if body.get("echo") and rng.random() < 0.3:
        body["max_tokens"] = 0
    _some(rng, body, 0.03, suffix=lambda: None, prompt_embeds=lambda: None)
    return body


def _chat(rng) -> dict:
    body: dict = {"messages": [_message(rng) for _ in range(rng.randint(1, 4))]}
    if rng.random() < 0.95:
        body["max_tokens" if rng.random() < 0.5 else "max_completion_tokens"] = rng.randint(1, 16)
    _some(
        rng,
        body,
        0.15,
        bad_words=lambda: [rng.choice(WORDS[:6]) for _ in range(rng.randint(0, 3))],
        echo=lambda: rng.random() < 0.8,
        parallel_tool_calls=lambda: rng.random() < 0.5,
        reasoning_effort=lambda: rng.choice(["low", "medium", "high"]),
        include_reasoning=lambda: rng.random() < 0.5,
        add_special_tokens=lambda: rng.random() < 0.5,
        documents=lambda: [{"title": "t", "text": _text(rng)}],
        chat_template_kwargs=lambda: {"enable_thinking": False},
        mm_processor_kwargs=lambda: rng.choice([None, {}]),
        add_generation_prompt=lambda: rng.random() < 0.5,
    )
    _some(rng, body, 0.04, chat_template=lambda: TEMPLATE)
    if rng.random() < 0.1:
        body |= {"add_generation_prompt": False, "continue_final_message": True}
        body["messages"][-1] = {"role": rng.choice(["user", "assistant"]), "content": "The capital of"}
    if rng.random() < 0.3:
        body["logprobs"] = rng.random() < 0.9
        if body["logprobs"]:
            _some(rng, body, 0.8, top_logprobs=lambda: rng.choice([None, 0, 1, 5, 20]))
    if rng.random() < 0.2:
        body["tools"] = TOOLS[: rng.randint(1, 2)]
        named = {"type": "function", "function": {"name": "look"}}
        _some(rng, body, 0.8, tool_choice=lambda: rng.choice(["none", "auto", "required", named, None]))
    return body


def _message(rng) -> dict:
    kind = rng.choice(["user"] * 4 + ["system", "parts", "assistant", "calls", "tool"])
    match kind:
        case "parts":
            return {"role": "user", "content": [{"type": "text", "text": _text(rng, 4)}, _text(rng, 2)]}
        case "calls":
            call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"name": "a"}'}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "tool":
            return {"role": "tool", "tool_call_id": "c1", "content": _text(rng, 4)}
    return {"role": kind, "content": _text(rng, 6)} | ({"name": "bob"} if rng.random() < 0.1 else {})


def _shared(rng, body: dict) -> bool:
    """Adds the fields that both have; says whether the answer is the same each time."""
    is_greedy = rng.random() < 0.3
    body["temperature"] = 0 if is_greedy else rng.choice([0.001, 0.3, 0.7, 1, 1.5, 5.0])
    seed = rng.choice([None, -1, 0, 7, 2**63 - 1, -(2**63), rng.randrange(2**40), rng.randrange(2**40)])
    if rng.random() < 0.9:
        body["seed"] = seed
    if not is_greedy and rng.random() < 0.3:
        body["n"] = rng.randint(1, 4)
    limit = body.get("max_completion_tokens") or body.get("max_tokens", 16)
    _some(
        rng,
        body,
        0.15,
        presence_penalty=lambda: rng.choice([-2, -0.5, 0.5, 2.0]),
        frequency_penalty=lambda: rng.choice([-2, -0.5, 0.5, 2.0]),
        repetition_penalty=lambda: rng.choice([0.5, 1.0, 1.3, 10]),
        top_p=lambda: rng.choice([1e-9, 0.1, 0.9, 1]),
        top_k=lambda: rng.choice([-1, 0, 1, 5, 10**6]),
        min_p=lambda: rng.choice([0, 0.05, 0.5, 1]),
        stop=lambda: rng.choice([[], "a", "world", ["t", "Paris", "é"], ["\n"]]),
        stop_token_ids=lambda: rng.choice([[], _ids(rng, 40)]),
        include_stop_str_in_output=lambda: rng.random() < 0.7,
        ignore_eos=lambda: rng.random() < 0.7,
        min_tokens=lambda: rng.randint(0, limit or 0),
        logit_bias=lambda: {str(i): rng.choice([-100, -1.5, 3, 50]) for i in _ids(rng)},
        allowed_token_ids=lambda: sorted({*_ids(rng, 60), 40, 41, 42}),
        prompt_logprobs=lambda: rng.choice([0, 1, 5, 20]),
        skip_special_tokens=lambda: rng.random() < 0.5,
        spaces_between_special_tokens=lambda: rng.random() < 0.5,
        truncate_prompt_tokens=lambda: rng.choice([-1, 1, 3, 40]),
        priority=lambda: rng.choice([-5, 0, 1, 100]),
        cache_salt=lambda: rng.choice(["salt", "pepper"]),
        vllm_xargs=lambda: {"x": 1, "y": "z", "w": 0.5},
        kv_transfer_params=lambda: {"a": 1},
        request_id=lambda: f"mine-{rng.randrange(5)}",
        return_tokens_as_token_ids=lambda: rng.random() < 0.7,
        return_token_ids=lambda: rng.random() < 0.7,
        user=lambda: "someone",
        model=lambda: rng.choice(["tiny", "", None]),
    )
    if body.get("n", 1) == 1:
        _some(rng, body, 0.1, best_of=lambda: 1)
    if not body.get("prompt_logprobs") and not (body.get("echo") and body.get("top_logprobs")):
        if rng.random() < 0.5:
            body["stream"] = True
            options = [{}, {"include_usage": True}, {"include_usage": False}, {"continuous_usage_stats": True}]
            _some(rng, body, 0.4, stream_options=lambda: rng.choice(options))
    for name in ("logits_processors", "stop", "stop_token_ids", "logit_bias", "n", "prompt_logprobs", "max_tokens"):
        if rng.random() < 0.02 and not (name == "max_tokens" and "min_tokens" in body):
            body[name] = None
    return is_greedy or body.get("seed") not in (None, -1)


def _constraint(rng, body: dict, is_chat: bool) -> None:
    is_forced = is_chat and body.get("tool_choice", "none") not in ("none", "auto", None)
    if is_forced or rng.random() > 0.25:
        if is_forced:
            _drop(body, "allowed_token_ids", "bad_words")
        return
    name, value = rng.choice(CONSTRAINTS)
    body[name] = value
    if name.startswith("guided"):
        _some(rng, body, 0.3, guided_decoding_backend=lambda: "auto", guided_whitespace_pattern=lambda: "[ ]?")
    if name == "structured_outputs" and value:
        _some(rng, body, 0.2, structural_tag=lambda: None)
    _drop(body, "allowed_token_ids", "bad_words")  # together they may leave no token at all
    if "max_tokens" in body and body["max_tokens"]:
        body["max_tokens"] *= 2


def _beams(rng, body: dict, is_chat: bool) -> None:
    is_free = not any(name in body for name, _ in CONSTRAINTS) and not body.get("tools") and body.get("max_tokens")
    if is_free and rng.random() < 0.08:
        body["use_beam_search"] = True
        body["n"] = rng.randint(1, 4)
        body.pop("best_of", None)
        _some(rng, body, 0.5, length_penalty=lambda: rng.choice([0.0, 0.5, 1.0, 2.0]))
    elif rng.random() < 0.02:
        body |= {"use_beam_search": False, "length_penalty": 1.0}


def _drop(body: dict, *names: str) -> None:
    for name in names:
        body.pop(name, None)
