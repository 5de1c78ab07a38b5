"""Requests that must be refused, a row each, for a model that holds 512 tokens and has 320.

A row of fields is laid over a good body of its path. `says` is a part of the message; `param` the field to blame.
"""

import dataclasses
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE, INVOCATIONS = "/tokenize", "/detokenize", "/invocations"
VALIDATION, HANDLER, MISSING = "Bad Request", "BadRequestError", "NotFoundError"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOL_CALL, PART = "messages.0.tool_calls.0", "messages.0.content.0"
NAMED = {"type": "function", "function": {"name": "f"}}
GOOD = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": USER},
    TOKENIZE: {"prompt": "Hi"},
    DETOKENIZE: {"tokens": [5]},
    INVOCATIONS: {},
}
JSON = {"content-type": "application/json"}


@dataclasses.dataclass(frozen=True)
class BadRequest:
    method: str
    path: str
    body: Any
    status: int
    kind: str
    says: str
    param: str | None
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: JSON)

    def __str__(self) -> str:
        body = str(self.body) if len(str(self.body)) < 100 else str(self.body)[:60] + "…"
        return f"{self.method} {self.path} {body}"


def tool(**function) -> dict:
    return {"tools": [{"function": {"name": "f"} | function}], "tool_choice": "none"}


def said(*parts) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


# Of completions and of chat: (fields, status, kind, says, param).
BOTH = [
    ({"model": "huge"}, 404, MISSING, "The model `huge` does not exist.", "model"),
    ({"model": "a\nb" * 1000}, 404, MISSING, "The model `a\\nba", "model"),
    ({"model": 3}, 400, VALIDATION, "string_type", "model"),
    ({"n": 0}, 400, HANDLER, "n must be at least 1, got 0.", "n"),
    ({"n": -1}, 400, HANDLER, "n must be at least 1, got -1.", "n"),
    ({"n": 2, "temperature": 0}, 400, HANDLER, "n must be 1 when using greedy sampling, got 2.", "n"),
    ({"n": 129}, 400, HANDLER, "n must be at most 128, got 129.", "n"),
    ({"n": 10**9}, 400, HANDLER, "n must be at most 128, got 1000000000.", "n"),
    ({"n": 1.5}, 400, VALIDATION, "int_from_float", "n"),
    ({"best_of": 0}, 400, HANDLER, "best_of must be at least 1", "best_of"),
    ({"best_of": 2, "n": 1}, 400, HANDLER, "does not yet support best_of", "best_of"),
    ({"best_of": 1, "n": 2}, 400, HANDLER, "best_of must be at least 1 and at least n=2, got 1.", "best_of"),
    ({"best_of": 2, "stream": True}, 400, HANDLER, "best_of must equal n to use output_kind=DELTA", "best_of"),
    ({"presence_penalty": 2.1}, 400, HANDLER, "presence_penalty must be in [-2, 2], got 2.1.", "presence_penalty"),
    ({"frequency_penalty": -3}, 400, HANDLER, "frequency_penalty must be in [-2, 2], got -3.0.", "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, HANDLER, "must be greater than zero, got 0.0.", "repetition_penalty"),
    ({"temperature": -0.1}, 400, HANDLER, "temperature must be non-negative, got -0.1.", "temperature"),
    ({"temperature": "hot"}, 400, VALIDATION, "float_parsing", "temperature"),
    ({"top_p": 0}, 400, HANDLER, "top_p must be in (0, 1], got 0.0.", "top_p"),
    ({"top_p": 1.1}, 400, HANDLER, "top_p must be in (0, 1], got 1.1.", "top_p"),
    ({"top_k": -2}, 400, HANDLER, "top_k must be 0 (disable), or at least 1, got -2.", "top_k"),
    ({"min_p": -0.1}, 400, HANDLER, "min_p must be in [0, 1], got -0.1.", "min_p"),
    ({"min_p": 1.5}, 400, HANDLER, "min_p must be in [0, 1], got 1.5.", "min_p"),
    ({"seed": 2**63}, 400, VALIDATION, "less_than_equal", "seed"),
    ({"seed": -(2**63) - 1}, 400, VALIDATION, "greater_than_equal", "seed"),
    ({"seed": 0.5}, 400, VALIDATION, "int_from_float", "seed"),
    ({"stop": [""]}, 400, HANDLER, "stop cannot contain an empty string.", "stop"),
    ({"stop": ""}, 400, HANDLER, "stop cannot contain an empty string.", "stop"),
    ({"stop": ["a"] * 17}, 400, HANDLER, "stop may hold 16 strings of 1024 characters", "stop"),
    ({"stop": "a" * 1025}, 400, HANDLER, "stop may hold 16 strings of 1024 characters", "stop"),
    ({"stop": {"a": 1}}, 400, VALIDATION, "string_type", "stop"),
    ({"stop_token_ids": ["x"]}, 400, VALIDATION, "int_parsing", "stop_token_ids.0"),
    ({"stop_token_ids": [10**6]}, 400, HANDLER, "Vocabulary size: 320", "stop_token_ids"),
    ({"stop_token_ids": [-1]}, 400, HANDLER, "[-1] are out of vocabulary", "stop_token_ids"),
    ({"min_tokens": -1}, 400, HANDLER, "min_tokens must be greater than or equal to 0, got -1.", "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, 400, HANDLER, "less than or equal to max_tokens=5, got 6.", "min_tokens"),
    ({"max_tokens": -1}, 400, HANDLER, "max_tokens must be at least 1, got -1.", "max_tokens"),
    ({"max_tokens": 0}, 400, HANDLER, "max_tokens must be at least 1, got 0.", "max_tokens"),
    ({"max_tokens": 2**63}, 400, HANDLER, str(2**63), "max_tokens"),
    ({"logit_bias": {"x": 1}}, 400, HANDLER, 'logit_bias keys must be token ids, got "x"', "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, HANDLER, "[99999] in logit_bias contain out-of-vocab", "logit_bias"),
    ({"logit_bias": {"320": 1}}, 400, HANDLER, "out-of-vocab token ids. Vocabulary size: 320", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, HANDLER, "out-of-vocab token ids. Vocabulary size: 320", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, HANDLER, "may hold 1,024 entries, got 1,025", "logit_bias"),
    ({"logit_bias": {"1": "x"}}, 400, VALIDATION, "float_parsing", "logit_bias.1"),
    ({"allowed_token_ids": []}, 400, HANDLER, "allowed_token_ids is not None and empty!", "allowed_token_ids"),
    ({"allowed_token_ids": [99999]}, 400, HANDLER, "out-of-vocab token id!", "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, 400, HANDLER, "out-of-vocab token id!", "allowed_token_ids"),
    ({"prompt_logprobs": -2}, 400, VALIDATION, "`prompt_logprobs` must be a positive value or -1.", "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, 400, VALIDATION, "not available when `stream=True`.", "prompt_logprobs"),
    ({"prompt_logprobs": 21}, 400, HANDLER, "logprobs of 21, which is greater than max allowed: 20", "prompt_logprobs"),
    ({"prompt_logprobs": -1}, 400, HANDLER, "greater than max allowed: 20", "prompt_logprobs"),
    ({"truncate_prompt_tokens": -2}, 400, VALIDATION, "greater_than_equal", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 513}, 400, HANDLER, "=513 cannot be greater than max_length", "truncate_prompt_tokens"),
    ({"use_beam_search": True, "n": 11}, 400, HANDLER, "Requested sample logprobs of 22", "n"),
    ({"use_beam_search": True, "guided_regex": "a"}, 400, HANDLER, "cannot be combined", "use_beam_search"),
    ({"cache_salt": ""}, 400, VALIDATION, "'cache_salt' must be a non-empty string if provided.", "cache_salt"),
    ({"cache_salt": 3}, 400, VALIDATION, "'cache_salt' must be a non-empty string if provided.", "cache_salt"),
    ({"cache_salt": "a" * 1025}, 400, HANDLER, "cache_salt may have 1024 characters", "cache_salt"),
    ({"vllm_xargs": {"a": [1]}}, 400, VALIDATION, "string_type", "vllm_xargs.a"),
    ({"logits_processors": ["a.b"]}, 400, HANDLER, "The `logits_processors` argument is not", "logits_processors"),
    ({"logits_processors": [{"qualname": "a", "x": 1}]}, 400, VALIDATION, "extra_forbidden", "logits_processors.0"),
    ({"request_id": "a\nb"}, 400, VALIDATION, "1 to 128 printable ASCII characters", "request_id"),
    ({"request_id": "a" * 129}, 400, VALIDATION, "1 to 128 printable ASCII characters", "request_id"),
    ({"stream_options": {"include_usage": True}}, 400, VALIDATION, "defined when `stream=True`.", "stream_options"),
    ({"stream_options": 3, "stream": True}, 400, VALIDATION, "stream_options", "stream_options"),
    ({"stream": "maybe"}, 400, VALIDATION, "bool_parsing", "stream"),
    ({"user": "a" * 1025}, 400, HANDLER, "user may have 1024 characters", "user"),
    ({"priority": "first"}, 400, VALIDATION, "int_parsing", "priority"),
    ({"response_format": {"type": "yaml"}}, 400, VALIDATION, "response_format.type must be 'text',", "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, VALIDATION, "json_schema", "response_format"),
    ({"response_format": "json"}, 400, VALIDATION, "dict_type", "response_format"),
    ({"guided_json": 3}, 400, VALIDATION, "string_type", "guided_json"),
    ({"guided_json": "{"}, 400, HANDLER, "JSON", "json"),
    ({"guided_choice": ["a", 1]}, 400, VALIDATION, "string_type", "guided_choice.1"),
    ({"guided_regex": "("}, 400, HANDLER, "unclosed group", "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, 400, HANDLER, "Choice '[]' cannot be an empty list", "choice"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, 400, VALIDATION, "kind of constraints", "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "grammar": "a"}}, 400, VALIDATION, "regex, grammar.", "structured_outputs"),
    ({"guided_json": {}, "guided_regex": "a"}, 400, HANDLER, "one kind of constraints", "structured_outputs"),
    ({"structured_outputs": {"regex": 3}}, 400, VALIDATION, "structured_outputs.regex must be a string", "regex"),
    ({"structured_outputs": {"regex": "a" * 16385}}, 400, HANDLER, "16,384", "regex"),
    ({"structured_outputs": {"json": {"type": 7}}}, 400, HANDLER, "type must be a string", "structured_outputs"),
    ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}}, 400, HANDLER, "nothing is fetched", "json"),
    ({"structured_outputs": []}, 400, VALIDATION, "dict_type", "structured_outputs"),
]

OF_COMPLETIONS = [
    ({"prompt": None}, VALIDATION, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"),
    ({"prompt": ""}, VALIDATION, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"),
    ({"prompt": []}, HANDLER, "please provide at least one prompt", "prompt"),
    ({"prompt": [[]]}, HANDLER, "please provide at least one prompt", "prompt"),
    ({"prompt": [[1], []]}, HANDLER, "The decoder prompt cannot be empty", "prompt"),
    ({"prompt": 3}, VALIDATION, "prompt must be text", "prompt"),
    ({"prompt": {"a": 1}}, VALIDATION, "prompt must be text", "prompt"),
    ({"prompt": ["a", [1]]}, VALIDATION, "prompt must be all texts", "prompt"),
    ({"prompt": [1, 2.5]}, VALIDATION, "token ids are integers", "prompt"),
    ({"prompt": [True]}, VALIDATION, "token ids are integers", "prompt"),
    ({"prompt": [[1, [2]]]}, VALIDATION, "token ids are integers", "prompt"),
    ({"prompt": [-1]}, HANDLER, "Token id -1 is out of vocabulary", "prompt"),
    ({"prompt": [320]}, HANDLER, "Token id 320 is out of vocabulary", "prompt"),
    ({"prompt": [2**40]}, HANDLER, "out of vocabulary", "prompt"),
    ({"prompt": ["a"] * 257}, HANDLER, "may hold 256 prompts, got 257", "prompt"),
    ({"prompt": ["a"] * 200, "n": 10}, HANDLER, "prompts times n may be 1,024", "n"),
    (
        {"prompt": [3] * 512, "max_tokens": None},
        HANDLER,
        "length is 512 tokens. However, your request has 512",
        "prompt",
    ),
    ({"prompt": [3] * 497}, HANDLER, "length is 496 tokens. However, your request has 497 input tokens.", "prompt"),
    ({"prompt": ["a", [3] * 497][1:]}, HANDLER, "your request has 497 input tokens", "prompt"),
    ({"max_tokens": 512}, HANDLER, "maximum context length is 512 tokens, prompt and answer together", "max_tokens"),
    ({"prompt": "a" * 10**6}, HANDLER, "your request has at least", "prompt"),
    ({"truncate_prompt_tokens": 497}, HANDLER, "=497 cannot be greater than max_length=496.", "truncate_prompt_tokens"),
    ({"suffix": "x"}, HANDLER, "suffix is not currently supported", "suffix"),
    ({"prompt_embeds": "QQ=="}, HANDLER, "prompt_embeds is not supported", "prompt_embeds"),
    ({"logprobs": -1}, VALIDATION, "`logprobs` must be a positive value.", "logprobs"),
    ({"logprobs": 21}, HANDLER, "Requested sample logprobs of 21, which is greater than max allowed: 20", "logprobs"),
    ({"logprobs": 2**40}, VALIDATION, "less_than_equal", "logprobs"),
    ({"echo": "loud"}, VALIDATION, "bool_parsing", "echo"),
]

OF_CHAT = [
    ({"messages": None}, VALIDATION, "list_type", "messages"),
    ({"messages": []}, VALIDATION, "too_short", "messages"),
    ({"messages": ["Hi"]}, VALIDATION, "messages", "messages.0"),
    ({"messages": [{"content": "a"}]}, VALIDATION, "missing", "messages.0.role"),
    ({"messages": [{"role": 3, "content": "a"}]}, VALIDATION, "string_type", "messages.0.role"),
    ({"messages": [{"role": "user", "content": 3}]}, VALIDATION, "string_type", "messages.0.content"),
    ({"messages": USER * 4097}, HANDLER, "messages may hold 4,096, got 4,097", "messages"),
    (said({"type": "x"}), HANDLER, "Unknown part type: x", "messages.0.content.0"),
    (said({"type": "text", "text": 3}), HANDLER, "text must be a string", "messages.0.content.0"),
    (said({"image_url": "a"}), HANDLER, "is an image, and this model is not a multimodal", "messages.0.content.0"),
    (said("a", {"type": "video_url", "video_url": "a"}), HANDLER, "content.1 is a video", "messages.0.content.1"),
    (said({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), HANDLER, "is an audio", PART),
    (said({"type": "image_url", "image_url": 3}), HANDLER, "must be a URL", "messages.0.content.0"),
    (said({"type": "input_audio", "input_audio": {}}), HANDLER, "data and format", "messages.0.content.0"),
    (said({"type": "image_embeds", "image_embeds": "a"}), HANDLER, "unpickles nothing", "messages.0.content.0"),
    (said({"type": "image_pil", "image_pil": "a"}), HANDLER, "cannot be sent over HTTP", "messages.0.content.0"),
    (said(*["a"] * 4097), VALIDATION, "too_long", "messages.0.content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, HANDLER, "function must be an object", TOOL_CALL),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        HANDLER,
        "function.arguments must be JSON",
        TOOL_CALL,
    ),
    ({"messages": [{"role": "user", "content": "a b " * 400}]}, HANDLER, "context length is 512 tokens.", "messages"),
    ({"max_tokens": 510}, HANDLER, "'max_tokens' or 'max_completion_tokens' is too large: 510.", "max_tokens"),
    ({"max_completion_tokens": 510}, HANDLER, "'max_completion_tokens' is too large: 510.", "max_tokens"),
    ({"truncate_prompt_tokens": 0}, HANDLER, "must be an integer >= 1 or -1, got 0", "truncate_prompt_tokens"),
    ({"top_logprobs": -2, "logprobs": True}, VALIDATION, "`top_logprobs` must be a positive value", "top_logprobs"),
    ({"top_logprobs": 2}, VALIDATION, "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, HANDLER, "greater than max allowed: 20", "logprobs"),
    ({"logprobs": 5}, VALIDATION, "bool_parsing", "logprobs"),
    ({"tool_choice": "auto"}, VALIDATION, "When using `tool_choice`, `tools` must be set.", "tool_choice"),
    ({"tool_choice": NAMED}, VALIDATION, "When using `tool_choice`, `tools` must be set.", "tool_choice"),
    ({"tool_choice": "x", "tools": [TOOL]}, VALIDATION, "Invalid value for `tool_choice`: x!", "tool_choice"),
    ({"tool_choice": 3, "tools": [TOOL]}, VALIDATION, "Invalid value for `tool_choice`: 3!", "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, VALIDATION, "Correct usage", "tool_choice"),
    ({"tool_choice": {"function": {"name": ""}}, "tools": [TOOL]}, VALIDATION, "Correct usage", "tool_choice"),
    ({"tool_choice": {"function": {"name": "g"}}, "tools": [TOOL]}, VALIDATION, "does not match any", "tool_choice"),
    ({"tool_choice": NAMED, "tools": [TOOL], "guided_regex": "a"}, HANDLER, "tools, not both", "tool_choice"),
    ({"tools": [TOOL]}, HANDLER, '"auto" tool choice requires --enable-auto-tool-choice', "tool_choice"),
    ({"tools": [TOOL, TOOL], "tool_choice": "none"}, HANDLER, "two tools are named 'f'", "tools"),
    ({"tools": [{"type": "x", "function": {"name": "a"}}]}, VALIDATION, "literal_error", "tools.0.type"),
    ({"tools": [{"type": "function"}]}, VALIDATION, "missing", "tools.0.function"),
    ({"tools": {"a": 1}}, VALIDATION, "list_type", "tools"),
    ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, HANDLER, "the limit is 128", "tools"),
    (tool(name="a b"), HANDLER, "tool name 'a b' must be 1 to 64 letters", "tools"),
    (tool(name=""), HANDLER, "tool name '' must be 1 to 64 letters", "tools"),
    (tool(name="a" * 65), HANDLER, "must be 1 to 64 letters", "tools"),
    (tool(name="{{ 1 }}"), HANDLER, "must be 1 to 64 letters", "tools"),
    (tool(parameters=[1]), VALIDATION, "dict_type", "tools.0.function.parameters"),
    (tool(description="a" * 300_000), HANDLER, "the limit is 262,144", "tools"),
    ({"reasoning_effort": "huge"}, VALIDATION, "literal_error", "reasoning_effort"),
    (
        {"add_generation_prompt": True, "continue_final_message": True},
        VALIDATION,
        "Cannot set both `continue_final_message` and `add_generation_prompt`",
        "continue_final_message",
    ),
    ({"continue_final_message": True}, HANDLER, "Send add_generation_prompt: false", "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, HANDLER, "may not set 'messages'", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, HANDLER, "may not set 'tokenize'", "chat_template_kwargs"),
    ({"chat_template": "x"}, HANDLER, "--trust-request-chat-template is not set", "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, HANDLER, "--trust-request-chat-template", "chat_template"),
    ({"documents": [{"a": 1}]}, VALIDATION, "string_type", "documents.0.a"),
    ({"bad_words": [""]}, HANDLER, "bad_words cannot contain an empty string.", "bad_words"),
    ({"bad_words": "a"}, VALIDATION, "list_type", "bad_words"),
    ({"mm_processor_kwargs": {"a": 1}}, HANDLER, "is for models that take media", "mm_processor_kwargs"),
]

# (path, fields, status, kind, says, param)
OF_OTHERS = [
    (TOKENIZE, {"model": "huge"}, 404, MISSING, "does not exist", "model"),
    (TOKENIZE, {"prompt": None}, 400, VALIDATION, "string_type", "prompt"),
    (TOKENIZE, {"prompt": ["a"]}, 400, VALIDATION, "string_type", "prompt"),
    (TOKENIZE, {"add_special_tokens": "x"}, 400, VALIDATION, "bool_parsing", "add_special_tokens"),
    (DETOKENIZE, {"tokens": ["a"]}, 400, VALIDATION, "int_type", "tokens.0"),
    (DETOKENIZE, {"tokens": [-1]}, 400, VALIDATION, "ids from 0 to 4294967295", "tokens"),
    (DETOKENIZE, {"tokens": [2**64]}, 400, VALIDATION, "ids from 0 to 4294967295", "tokens"),
    (DETOKENIZE, {"tokens": [True]}, 400, VALIDATION, "int_type", "tokens.0"),
    (DETOKENIZE, {"tokens": None}, 400, VALIDATION, "list_type", "tokens"),
    (DETOKENIZE, {"model": "huge"}, 404, MISSING, "does not exist", "model"),
    (INVOCATIONS, {}, 400, HANDLER, "Cannot find suitable handler for request.", None),
    (INVOCATIONS, {"input": "a"}, 400, HANDLER, "Expected one of: ['ChatRequest', 'CompletionRequest']", None),
    (INVOCATIONS, {"prompt": "a", "n": 0}, 400, HANDLER, "n must be at least 1", "n"),
    (INVOCATIONS, {"messages": []}, 400, VALIDATION, "too_short", "messages"),
]

DEEP = b'{"prompt": "a", "metadata": ' + b"[" * 64 + b"]" * 64 + b"}"
BODIES = [
    (b"", "Expecting value: line 1 column 1"),
    (b"null", "must be a JSON object"),
    (b"[]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b"3", "must be a JSON object"),
    (b'{"prompt": "a"} x', "Extra data"),
    (b'{"prompt": "a"', "Expecting ',' delimiter"),
    (b"{'prompt': 'a'}", "double quotes"),
    (b'{"prompt": "a",}', "line 1 column 16"),
    (b'{"prompt": "a\nb"}', "control character"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "BOM"),
    ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"),
    (b'{"prompt": "\xff"}', "byte 12"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
    (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
    (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
    (b'{"prompt": "a", "temperature": 1e999}', "too large"),
    (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "digits"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "'y' stands twice"),
    (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
    (b'{"prompt": "a", "x": [{"\\udc00": 1}]}', "half a surrogate pair"),
    (b'{"prompt": "a", "x": ' + b"[" * 100000 + b"]" * 100000 + b"}", "deeper than 64"),
    (DEEP, "deeper than 64"),
    (b'{"prompt": [' + b"1," * 1_000_001 + b"1]}", "more than 1,000,000 values"),
    (b'{"x": {' + b",".join(b'"%d":1' % i for i in range(100_001)) + b"}}", "more than 100,000 keys"),
]

NOT_JSON = "Unsupported Media Type: Only 'application/json' is allowed"
KINDS = [None, "text/plain", "application/xml", "application/jsonp", "multipart/form-data", "application/x-json"]

# (method, path, headers, status, kind, says)
OF_HTTP = [
    ("POST", COMPLETIONS, JSON | {"content-encoding": "gzip"}, 415, "UnsupportedMediaTypeError", "send it as it is"),
    ("GET", "/v1/nothing", {}, 404, MISSING, "there is no /v1/nothing here"),
    ("GET", "/", {}, 404, MISSING, "there is no / here"),
    ("GET", "/v1/models/tiny", {}, 404, MISSING, "/v1/models"),
    ("POST", "/generate", JSON, 404, MISSING, "/generate"),
    ("POST", "/v1/load_lora_adapter", JSON, 404, MISSING, "/v1/load_lora_adapter"),
    ("POST", "/sleep", JSON, 404, MISSING, "/sleep"),
    ("GET", COMPLETIONS, {}, 405, "MethodNotAllowedError", COMPLETIONS),
    ("DELETE", CHAT, {}, 405, "MethodNotAllowedError", CHAT),
    ("PUT", TOKENIZE, {}, 405, "MethodNotAllowedError", TOKENIZE),
    ("POST", "/health", {}, 405, "MethodNotAllowedError", "/health"),
    ("POST", "/v1/embeddings", JSON, 400, HANDLER, "The model does not support Embeddings API"),
    ("POST", "/v1/responses", JSON, 400, HANDLER, "The model does not support Responses API"),
    ("POST", "/rerank", JSON, 400, HANDLER, "The model does not support Rerank (Score) API"),
    ("POST", "/v1/audio/transcriptions", {}, 400, HANDLER, "The model does not support Transcriptions API"),
]


def rows() -> list[BadRequest]:
    found = [
        BadRequest("POST", path, GOOD[path] | fields, *rest) for path in (COMPLETIONS, CHAT) for fields, *rest in BOTH
    ]
    found += [BadRequest("POST", COMPLETIONS, GOOD[COMPLETIONS] | row[0], 400, *row[1:]) for row in OF_COMPLETIONS]
    found += [BadRequest("POST", CHAT, GOOD[CHAT] | row[0], 400, *row[1:]) for row in OF_CHAT]
    found += [BadRequest("POST", path, GOOD[path] | fields, *rest) for path, fields, *rest in OF_OTHERS]
    found += [BadRequest("POST", COMPLETIONS, data, 400, VALIDATION, says, None) for data, says in BODIES]
    for path in (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE, INVOCATIONS):
        for kind in KINDS:
            headers = {"content-type": kind} if kind else {}
            found.append(BadRequest("POST", path, b'{"prompt": "a"}', 400, VALIDATION, NOT_JSON, None, headers))
    for method, path, headers, status, kind, says in OF_HTTP:
        found.append(BadRequest(method, path, b"", status, kind, says, None, headers))
    return found
