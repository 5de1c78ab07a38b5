"""The fields that completions and chat share, and how they become SamplingParams."""

import functools
import json
import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import Field

from openai_api.config import Limits
from openai_api.errors import WrongField
from runtime.beam import BeamParams
from runtime.errors import RequestRefused, shown
from runtime.grammar.constraint import check_fields
from runtime.params import INT64, SamplingParams

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
SAMPLING_DEFAULTS = {"repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
NO_PROCESSORS = (
    "The `logits_processors` argument is not supported by this server; "
    "use logit_bias, allowed_token_ids, bad_words or structured_outputs"
)


Ids = Annotated[list[int], Field(fail_fast=True)]  # one wrong item says enough; a million errors take seconds


class Body(pydantic.BaseModel):
    """A request body, or an object in one; names it does not have are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class LogitsProcessor(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    qualname: str
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None


RESPONSE_FORMAT = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
        "json_schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "schema": {"type": "object"}, "strict": {"type": "boolean"}},
            "required": ["name"],
        },
        "structures": {"type": "array", "items": {"type": "object"}},
        "triggers": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["type"],
}
STRUCTURED = {
    "type": "object",
    "properties": {
        "json": {"type": ["string", "object", "null"]},
        "regex": {"type": ["string", "null"]},
        "choice": {"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1},
        "grammar": {"type": ["string", "null"]},
        "json_object": {"type": ["boolean", "null"]},
        "structural_tag": {"type": ["string", "null"]},
        "whitespace_pattern": {"type": ["string", "null"]},
        "disable_any_whitespace": {"type": "boolean"},
        "disable_additional_properties": {"type": "boolean"},
        "disable_fallback": {"type": "boolean"},
    },
}


class SamplingFields(Body):
    """Documented names, types and defaults; bounds are checked by SamplingParams."""

    model: str | None = None
    n: int | None = 1
    best_of: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64 - 1)] | None = None
    stop: str | list[str] | None = []
    stop_token_ids: Ids | None = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Ids | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    priority: int = 0
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, str | int | float] | None = None
    logits_processors: list[str | LogitsProcessor] | None = None
    request_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    response_format: Annotated[dict[str, Any], pydantic.WithJsonSchema(RESPONSE_FORMAT)] | None = None
    structured_outputs: Annotated[dict[str, Any], pydantic.WithJsonSchema(STRUCTURED)] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structural_tag: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None

    @pydantic.field_validator("cache_salt", mode="before")
    @classmethod
    def _salt(cls, value):
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError("Parameter 'cache_salt' must be a non-empty string if provided.")
        return value

    @pydantic.field_validator("request_id")
    @classmethod
    def _id(cls, value):
        if value is not None and not REQUEST_ID.fullmatch(value):
            raise ValueError("request_id must be 1 to 128 printable ASCII characters without spaces")
        return value

    @pydantic.model_validator(mode="after")
    def _goes_with_stream(self):
        options = self.stream_options
        if options is not None and options.model_fields_set and not self.stream:  # an empty object asks for nothing
            raise WrongField("Stream options can only be defined when `stream=True`.", "stream_options")
        if self.prompt_logprobs is not None:
            if self.stream and (self.prompt_logprobs > 0 or self.prompt_logprobs == -1):
                raise WrongField("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
            if self.prompt_logprobs < 0 and self.prompt_logprobs != -1:
                raise WrongField("`prompt_logprobs` must be a positive value or -1.", "prompt_logprobs")
        return self

    @pydantic.model_validator(mode="after")
    def _one_constraint(self):
        try:
            check_fields(self.structured_outputs, self.response_format)
        except RequestRefused as error:
            raise WrongField(str(error), error.param or "structured_outputs") from None
        return self

    @property
    def reply_format(self) -> dict[str, Any] | None:
        """response_format, as far as it counts beside structured_outputs."""
        return self.response_format

    @property
    def guided(self) -> dict[str, Any]:
        """The deprecated constraint fields, by name."""
        names = ("json", "regex", "choice", "grammar", "whitespace_pattern")
        found = {f"guided_{name}": getattr(self, f"guided_{name}") for name in names}
        return found | {"structural_tag": self.structural_tag}

    def check_supported(self, limits: Limits) -> None:
        """Refuses by name what this server does not do, or not so much of.

        Raises:
            RequestRefused: `param` names the field.
        """
        n, best_of = 1 if self.n is None else self.n, self.best_of
        if best_of is not None and best_of < max(1, n):
            raise RequestRefused(f"best_of must be at least 1 and at least n={n}, got {best_of}.", "best_of")
        if best_of is not None and self.stream and best_of != n:
            raise RequestRefused("best_of must equal n to use output_kind=DELTA", "best_of")
        if best_of is not None and best_of > 1:
            raise RequestRefused("this server does not yet support best_of; ask for n choices", "best_of")
        if self.logits_processors is not None:
            raise RequestRefused(NO_PROCESSORS, "logits_processors")
        for name in ("kv_transfer_params", "vllm_xargs"):
            if getattr(self, name):
                _say_unused(name)
        if n > limits.max_n:
            raise RequestRefused(f"n must be at most {limits.max_n}, got {n}.", "n")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > limits.max_stop or any(len(text) > limits.max_stop_length for text in stop):
            raise RequestRefused(
                f"stop may hold {limits.max_stop} strings of {limits.max_stop_length} characters", "stop"
            )
        for name, most in (("logit_bias", limits.max_logit_bias),):
            if len(getattr(self, name) or ()) > most:
                raise RequestRefused(f"{name} may hold {most:,} entries, got {len(getattr(self, name)):,}", name)
        for name in ("user", "cache_salt"):
            if len(getattr(self, name) or "") > limits.max_text_field:
                raise RequestRefused(f"{name} may have {limits.max_text_field} characters", name)

    def beams(self, room: int) -> BeamParams:
        """These fields for beam search, which knows no others."""
        return BeamParams(
            n=1 if self.n is None else self.n,
            max_tokens=room,
            length_penalty=self.length_penalty,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            priority=self.priority,
        )

    def sampling(self, defaults: Mapping[str, Any], **settled: Any) -> SamplingParams:
        """These fields as SamplingParams.

        Args:
            defaults: what generation_config.json says, for fields left out.
            settled: fields that depend on the prompt or the route, such as max_tokens and logprobs.

        Raises:
            RequestRefused: a value is out of bounds.
        """
        standing = {}
        for name, otherwise in SAMPLING_DEFAULTS.items():
            value = getattr(self, name)
            standing[name] = defaults.get(name, otherwise) if value is None else value
        given = {
            "n": 1 if self.n is None else self.n,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "logit_bias": self._bias(),
            "allowed_token_ids": self.allowed_token_ids,
            "prompt_logprobs": self.prompt_logprobs,
            "skip_special_tokens": self.skip_special_tokens,
            "spaces_between_special_tokens": self.spaces_between_special_tokens,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }
        return SamplingParams(**standing | given | settled)

    def _bias(self):
        if self.logit_bias is None:
            return None
        try:
            return {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        except ValueError:
            bad = next(key for key in self.logit_bias if not re.fullmatch(r"\s*[+-]?\d+\s*", key))
            message = f"logit_bias keys must be token ids, got {json.dumps(shown(bad))}"
            raise RequestRefused(message, "logit_bias") from None


@functools.cache
def _say_unused(name: str) -> None:
    """Once a process: whoever sends such a field sends it with every request."""
    log.warning("%s is ignored: nothing is set up that would read it", name)
