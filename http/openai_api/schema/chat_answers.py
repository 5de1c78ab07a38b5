"""POST /v1/chat/completions: the answer, whole or in chunks."""

import contextlib
import time
from collections.abc import AsyncGenerator

from openai_api import request_log, respond
from openai_api.config import ServerConfig
from openai_api.readers import Reader, Readers, Reasoning
from openai_api.schema.chat import ChatRequest
from openai_api.schema.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from openai_api.schema.usage import bare, usage
from runtime.chat.tools import Arguments, CallBroken, CallStarted, Content, Event, collect
from runtime.errors import RequestRefused
from runtime.request import Prompt, RequestOutput

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


class Choice:
    """One choice so far: what the engine gave, and what the reader made of it."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list = []
        self.events: list[Event] = []
        self.reasoning: list[str] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._num_calls = 0

    def add(self, output: RequestOutput) -> list[Event | Reasoning]:
        """Takes an output; gives the events it leads to."""
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        events = self.reader.push(output.text, output.token_ids)
        if output.finish_reason is not None:
            events = [*events, *self.reader.finish()]
        for event in events:
            self._num_calls += isinstance(event, CallStarted)
            self._num_calls -= isinstance(event, CallBroken)
        self.reasoning += [event.text for event in events if isinstance(event, Reasoning)]
        self.events += [event for event in events if not isinstance(event, Reasoning)]
        if (reason := output.finish_reason) is not None:
            are_whole = reason == "stop" or (reason == "length" and not self.reader.is_broken)
            self.finish_reason = "tool_calls" if self._num_calls and are_whole else reason
            self.stop_reason = output.stop_reason
        return events


def delta_of(event: Event | Reasoning) -> dict | None:
    """An event as a stream shows it; None for what a stream cannot say."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStarted(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return None


class ChatFormat:
    """Builds the answer to one request.

    Args:
        prompt: as the engine got it.
        role: of the reply. last_text: what echo puts in front, or None.
        readers: make the reader of each choice.
    """

    def __init__(
        self,
        body: ChatRequest,
        config: ServerConfig,
        tokenizer,
        prompt: Prompt,
        *,
        model: str,
        id: str,
        role: str,
        last_text: str | None,
        readers: Readers,
    ):
        self.body, self.config, self.tokenizer, self.prompt = body, config, tokenizer, prompt
        self.id, self.model, self.created = id, model, int(time.time())
        self.role, self.last_text = role, last_text
        self.null_when_empty = readers.null_when_empty
        self.choices = [Choice(readers.reader()) for _ in range(body.n or 1)]
        self.num_cached = 0
        self.prompt_logprobs: list | None = None
        as_ids = body.return_tokens_as_token_ids
        self.names = TokenNames(tokenizer, config.return_tokens_as_token_ids if as_ids is None else as_ids)

    # ---- whole ------------------------------------------------------------------------------------------------------

    async def whole(self, outputs: Outputs) -> dict:
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                self._note_prompt(output)
                self.choices[output.index].add(output)
        self._log()
        self._check_required()
        shown = self.prompt_logprobs
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self.choices)],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self._usage(),
            "prompt_logprobs": None if shown is None else prompt_logprobs(shown, self.tokenizer),
            "prompt_token_ids": self.prompt.token_ids if self.body.return_token_ids else None,
            "kv_transfer_params": None,
        }

    def _check_required(self):
        """A stream has shown what there is by now; a whole answer must be what was asked for."""
        if self.body.tool_choice != "required":
            return
        for choice in self.choices:
            if choice.reader.is_broken:
                is_cut = choice.finish_reason == "length"
                why = f"after {len(choice.token_ids)} tokens; raise max_tokens" if is_cut else "by stop"
                message = f'tool_choice "required": the answer was cut before its tool calls were whole, {why}'
                raise RequestRefused(message, "max_tokens" if is_cut else "stop")

    def _choice(self, index, choice):
        reply = collect(choice.events)
        content = reply.content
        if content is None and not self.null_when_empty:
            content = ""
        if self.last_text:
            content = self.last_text + (content or "")
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
        return {
            "index": index,
            "message": {
                "role": self.role,
                "content": content,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": calls,
                "reasoning_content": "".join(choice.reasoning) or None,
            },
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self.body.return_token_ids else None,
        }

    # ---- in chunks --------------------------------------------------------------------------------------------------

    async def chunks(self, outputs: Outputs) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options
        include = self.config.enable_force_include_usage or bool(options and options.include_usage)
        continuous = include and bool(options and options.continuous_usage_stats)
        has_begun = False
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                self._note_prompt(output)
                if not has_begun:
                    has_begun = True
                    for chunk in self._openings():
                        yield respond.event(self._counted(chunk, 0) if continuous else chunk)
                choice = self.choices[output.index]
                for chunk in self._pieces(choice, output):
                    yield respond.event(self._counted(chunk, len(choice.token_ids)) if continuous else chunk)
        self._log()
        if include:
            yield respond.event(self._chunk([]) | {"usage": bare(self._usage())})

    def _openings(self):
        """The role of each choice, then what echo puts in front."""
        shown = self.prompt.token_ids if self.body.return_token_ids else None
        for index in range(len(self.choices)):
            part = self._part(index, {"role": self.role, "content": ""})
            yield self._chunk([part]) | {"prompt_token_ids": shown}
        if self.last_text:
            for index in range(len(self.choices)):
                yield self._chunk([self._part(index, {"content": self.last_text})])

    def _pieces(self, choice, output):
        """The chunks of one output: its logprobs and ids go with the first of them."""
        was_empty = not choice.token_ids
        deltas = [delta for event in choice.add(output) if (delta := delta_of(event)) is not None]
        is_last = output.finish_reason is not None
        if not deltas and is_last:
            deltas = [{}]
        if not (output.token_ids or output.text or is_last) and was_empty:
            return
        logprobs = self._logprobs(output.logprobs or []) if output.token_ids else None
        token_ids = list(output.token_ids) if self.body.return_token_ids else None
        if not deltas and (logprobs or token_ids):
            deltas = [{}]
        for position, delta in enumerate(deltas):
            part = self._part(output.index, delta, logprobs if position == 0 else None)
            part["token_ids"] = token_ids if position == 0 else None
            if is_last and position == len(deltas) - 1:
                part["finish_reason"], part["stop_reason"] = choice.finish_reason, choice.stop_reason
            yield self._chunk([part])

    def _part(self, index, delta, logprobs=None):
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _chunk(self, parts):
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": parts,
        }

    def _counted(self, chunk, num_new):
        return chunk | {"usage": bare(usage(len(self.prompt.token_ids), num_new))}

    # ---- parts of both ----------------------------------------------------------------------------------------------

    def _log(self):
        texts = ["".join(choice.texts) for choice in self.choices]
        request_log.answered(self.config, self.id, texts, [choice.finish_reason for choice in self.choices])

    def _note_prompt(self, output):
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.num_cached = max(self.num_cached, output.num_cached_tokens)

    def _logprobs(self, entries):
        count = self.body.top_logprobs
        return chat_logprobs(entries, count, self.names) if self.body.logprobs and count is not None else None

    def _usage(self):
        num_new = sum(len(choice.token_ids) for choice in self.choices)
        cached = self.num_cached if self.config.enable_prompt_tokens_details else None
        return usage(len(self.prompt.token_ids), num_new, cached)
