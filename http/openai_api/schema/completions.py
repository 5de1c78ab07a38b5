"""POST /v1/completions: what is asked, and the answer whole or in chunks."""

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from openai_api import request_log
from openai_api.config import Limits, ServerConfig
from openai_api.errors import WrongField
from openai_api.respond import event
from openai_api.schema.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from openai_api.schema.sampling import SamplingFields
from openai_api.schema.usage import bare, usage
from runtime.beam import BeamParams
from runtime.errors import RequestRefused
from runtime.grammar.constraint import KINDS
from runtime.params import SamplingParams
from runtime.request import Prompt, RequestOutput

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
NEEDS_PROMPT = "Either prompt or prompt_embeds must be provided and non-empty."
NO_EMBEDS = "prompt_embeds is not supported: such tensors are pickled, and this server unpickles nothing; send a prompt"


def _prompt(value: Any) -> Any:
    """Text, token ids, or a list of either; checked here because a union would report an error an item."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "prompt must be text, a list of token ids, or a list of either")
    kinds = {str if isinstance(i, str) else list if isinstance(i, list) else int if _is_id(i) else None for i in value}
    if len(kinds) > 1 or None in kinds or (list in kinds and not all(_is_id(i) for ids in value for i in ids)):
        message = "prompt must be all texts, all token ids, or all lists of token ids; token ids are integers"
        raise PydanticCustomError("prompt_type", message)
    return value


def _is_id(item):
    return isinstance(item, int) and not isinstance(item, bool)


IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT = {
    "anyOf": [
        {"type": "string"},
        IDS,
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": IDS, "minItems": 1},
        {"type": "null"},
    ]
}


class CompletionRequest(SamplingFields):
    """A text to be continued, and how."""

    prompt: Annotated[Any, pydantic.BeforeValidator(_prompt), pydantic.WithJsonSchema(PROMPT)] = None
    prompt_embeds: str | list[str] | None = None
    max_tokens: int | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=-(2**31), le=2**31)] | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    @pydantic.model_validator(mode="after")
    def _has_prompt(self):
        if self.prompt in (None, "") and not self.prompt_embeds:
            raise WrongField(NEEDS_PROMPT, "prompt")
        if self.logprobs is not None and self.logprobs < 0:
            raise WrongField("`logprobs` must be a positive value.", "logprobs")
        return self

    @property
    def items(self) -> list[str | list[int]]:
        """The prompts, one an answer set."""
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt or []

    @property
    def reply_format(self) -> dict[str, Any] | None:
        """Here a constraint in structured_outputs goes before it; a chat refuses two kinds, and of one takes this."""
        return None if any((self.structured_outputs or {}).get(kind) for kind in KINDS) else self.response_format

    @property
    def hides_text(self) -> bool:
        """Only the prompt is wanted: one token is generated and not shown."""
        return bool(self.echo) and self.max_tokens == 0

    def check_supported(self, limits: Limits) -> None:
        if self.suffix is not None:
            raise RequestRefused("suffix is not currently supported", "suffix")
        if self.prompt_embeds:
            raise RequestRefused(NO_EMBEDS, "prompt_embeds")
        super().check_supported(limits)
        items = self.items
        if not items or items[0] == []:
            raise RequestRefused("please provide at least one prompt", "prompt")
        if len(items) > limits.max_prompts:
            raise RequestRefused(f"a request may hold {limits.max_prompts} prompts, got {len(items):,}", "prompt")
        if len(items) * (self.n or 1) > limits.max_choices:
            raise RequestRefused(f"prompts times n may be {limits.max_choices:,}; send fewer at once", "n")

    def params(self, defaults: dict, room: int) -> SamplingParams | BeamParams:
        """For a prompt that leaves `room` tokens."""
        if self.use_beam_search:
            return self.beams(room)
        settled: dict[str, Any] = {"max_tokens": room, "logprobs": self.logprobs}
        if self.hides_text:
            settled["max_tokens"] = 1
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            settled["prompt_logprobs"] = self.logprobs
        return self.sampling(defaults, **settled)


class Choice:
    """One choice so far."""

    def __init__(self):
        self.texts: list[str] = []
        self.next_offset = 0  # of the next token's text among those of all tokens shown
        self.token_ids: list[int] = []
        self.logprobs: list = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, output: RequestOutput) -> None:
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


@dataclasses.dataclass
class PromptState:
    """What the engine said of a prompt."""

    prompt: Prompt
    logprobs: list | None = None
    num_cached: int = 0

    def add(self, output: RequestOutput) -> None:
        if output.prompt_logprobs is not None:
            self.logprobs = output.prompt_logprobs
        self.num_cached = max(self.num_cached, output.num_cached_tokens)


class CompletionFormat:
    """Builds the answer to one request.

    Args:
        prompts: as the engine got them.
        model: the name that is shown.
    """

    def __init__(
        self, body: CompletionRequest, config: ServerConfig, tokenizer, prompts: Sequence[Prompt], model: str, id: str
    ):
        self.body, self.config, self.tokenizer = body, config, tokenizer
        self.head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        self.n = body.n or 1
        self.prompts = [PromptState(prompt) for prompt in prompts]
        as_ids = body.return_tokens_as_token_ids
        self.names = TokenNames(tokenizer, config.return_tokens_as_token_ids if as_ids is None else as_ids)

    # ---- whole ------------------------------------------------------------------------------------------------------

    async def whole(self, outputs: Outputs) -> dict:
        choices = [Choice() for _ in range(len(self.prompts) * self.n)]
        async with contextlib.aclosing(outputs):
            async for which, output in outputs:
                self.prompts[which].add(output)
                choices[which * self.n + output.index].add(output)
        self._log(choices)
        num_new = sum(len(choice.token_ids) for choice in choices)
        return self.head | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self._usage(num_new),
            "kv_transfer_params": None,
        }

    def _choice(self, index, choice):
        state = self.prompts[index // self.n]
        text, token_ids, entries = "".join(choice.texts), choice.token_ids, choice.logprobs
        if self.body.hides_text:
            text, token_ids, entries = "", [], []
        if self.body.echo:
            text = self._prompt_text(state) + text
        wants_logprobs = self.body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(state, token_ids, entries, 0, bool(self.body.echo)) if wants_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": list(token_ids) if self.body.return_token_ids else None,
            "prompt_logprobs": None if state.logprobs is None else prompt_logprobs(state.logprobs, self.tokenizer),
            "prompt_token_ids": state.prompt.token_ids if self.body.return_token_ids else None,
        }

    # ---- in chunks --------------------------------------------------------------------------------------------------

    async def chunks(self, outputs: Outputs) -> AsyncGenerator[bytes, None]:
        choices = [Choice() for _ in range(len(self.prompts) * self.n)]
        options = self.body.stream_options
        include = self.config.enable_force_include_usage or bool(options and options.include_usage)
        continuous = include and bool(options and options.continuous_usage_stats)
        if self.body.use_beam_search:  # nothing is known before all is
            yield event(await self.whole(outputs))
            return
        async with contextlib.aclosing(outputs):
            async for which, output in outputs:
                index = which * self.n + output.index
                if not choices[index].texts and not (output.text or output.token_ids or output.finish_reason):
                    continue
                self.prompts[which].add(output)
                chunk = self._chunk(index, choices[index], output)
                if continuous:
                    num_prompt = len(self.prompts[which].prompt.token_ids)
                    chunk["usage"] = usage(num_prompt, len(choices[index].token_ids))
                yield event(chunk)
        self._log(choices)
        if include:
            total = self._usage(sum(len(choice.token_ids) for choice in choices))
            yield event(self.head | {"choices": [], "usage": bare(total)})

    def _chunk(self, index, choice, output):
        body, state = self.body, self.prompts[index // self.n]
        is_first = not choice.texts
        choice.add(output)
        text, token_ids, entries = output.text, output.token_ids, output.logprobs or []
        if body.hides_text:
            text, token_ids, entries = "", [], []
        shows_prompt = is_first and bool(body.echo)
        if shows_prompt:
            text = self._prompt_text(state) + text
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._logprobs(state, token_ids, entries, choice.next_offset, shows_prompt)
            choice.next_offset += sum(map(len, logprobs["tokens"]))
        part = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "prompt_token_ids": state.prompt.token_ids if is_first and body.return_token_ids else None,
            "token_ids": list(token_ids) if body.return_token_ids else None,
        }
        return self.head | {"choices": [part], "usage": None}

    # ---- parts of both ----------------------------------------------------------------------------------------------

    def _log(self, choices):
        texts, reasons = ["".join(c.texts) for c in choices], [c.finish_reason for c in choices]
        request_log.answered(self.config, self.head["id"], texts, reasons)

    def _prompt_text(self, state):
        if state.prompt.text is not None:
            return state.prompt.text
        return self.tokenizer.decode(state.prompt.token_ids)

    def _logprobs(self, state, token_ids, entries, offset, shows_prompt):
        entries, token_ids = list(entries), list(token_ids)
        if shows_prompt and state.logprobs is not None:
            entries, token_ids = state.logprobs + entries, state.prompt.token_ids + token_ids
        return completion_logprobs(entries, token_ids, self.body.logprobs or 0, self.names, offset)

    def _usage(self, num_new):
        num_prompt = sum(len(state.prompt.token_ids) for state in self.prompts)
        cached = self.prompts[-1].num_cached if self.config.enable_prompt_tokens_details and self.prompts else None
        return usage(num_prompt, num_new, cached)
