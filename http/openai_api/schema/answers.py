"""What routes answer, as the API's document shows it. Answers are built as plain dicts, which is faster; tests compare.

A field without a default is always there. One with a default is there only at times.
"""

from typing import Any, Literal

import pydantic
from pydantic import ConfigDict


class Answer(pydantic.BaseModel):
    """An answer has these fields and no others."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetails(Answer):
    message: str
    type: str
    param: str | None
    code: int


class Error(Answer):
    """What went wrong, for people and for programs. The status of the answer is `code`."""

    error: ErrorDetails


class CachedTokens(Answer):
    cached_tokens: int


class Usage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class PromptLogprob(Answer):
    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None] | None

# ---- /v1/completions ------------------------------------------------------------------------------------------------


class CompletionLogprobs(Answer):
    """Lists side by side, an entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: int | str | None
    token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs
    prompt_token_ids: list[int] | None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: str | None
    system_fingerprint: str | None
    usage: Usage
    kv_transfer_params: dict[str, Any] | None


class CompletionPart(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: int | str | None
    prompt_token_ids: list[int] | None
    token_ids: list[int] | None


class CompletionChunk(Answer):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPart]
    usage: Usage | None = None


# ---- /v1/chat/completions -------------------------------------------------------------------------------------------


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]


class CalledFunction(Answer):
    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Reply(Answer):
    role: str
    content: str | None
    refusal: str | None
    annotations: dict[str, Any] | None
    audio: dict[str, Any] | None
    function_call: dict[str, Any] | None
    tool_calls: list[ToolCall]
    reasoning_content: str | None


class ChatChoice(Answer):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "tool_calls"] | None
    stop_reason: int | str | None
    token_ids: list[int] | None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    service_tier: str | None
    system_fingerprint: str | None
    usage: Usage
    prompt_logprobs: PromptLogprobs
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None


class FunctionDelta(Answer):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Answer):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatPart(Answer):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "tool_calls"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPart]
    prompt_token_ids: list[int] | None = None
    usage: Usage | None = None


# ---- the others -----------------------------------------------------------------------------------------------------


class Permission(Answer):
    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: str | None
    is_blocking: bool


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Permission]


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str


class TokenizerInfo(pydantic.BaseModel):
    """tokenizer_config.json, without its files."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None = None


class Version(Answer):
    version: str


class Load(Answer):
    server_load: int


class ServerInfo(Answer):
    vllm_config: str | dict[str, Any]


class IsSleeping(Answer):
    is_sleeping: bool


class IsScaling(Answer):
    is_scaling_elastic_ep: bool


class Document(pydantic.BaseModel):
    """An OpenAPI document."""

    model_config = ConfigDict(extra="allow")

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
