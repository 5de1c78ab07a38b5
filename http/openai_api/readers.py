"""What the model writes to what a message holds: reasoning, content, tool calls.

A reader belongs to one choice and turns text, as it comes, into events. A whole answer is all its events added up, so
streaming or not, the same text gives the same message.
"""

import dataclasses
from collections.abc import Sequence

from openai_api.config import ServerConfig
from openai_api.schema.chat import ChatRequest
from runtime.chat import reasoning, tools
from runtime.chat.reasoning import ReasoningParser
from runtime.chat.tools import Content, Event, NewId, ToolParser
from runtime.errors import RequestRefused

NEEDS_FLAGS = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """Text the model wrote before its answer."""

    text: str


class Reader:
    """The reader of one choice: reasoning is taken off first, then calls.

    Args:
        reasoning_parser, tool_parser: None where there is nothing to take off.
        shows_reasoning: False drops it.
    """

    def __init__(self, reasoning_parser: ReasoningParser | None, tool_parser: ToolParser | None, shows_reasoning: bool):
        self._reasoning, self._tools = reasoning_parser, tool_parser
        self._shows_reasoning = shows_reasoning

    @property
    def is_broken(self) -> bool:
        """Whether something that looked like a call was none, or was cut off."""
        return self._tools is not None and self._tools.is_broken

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event | Reasoning]:
        """New text and the tokens it came with; gives what is certain of it."""
        if self._reasoning is not None:
            return self._sorted(self._reasoning.feed(text))
        if self._tools is not None:
            return [*self._tools.feed(text)]
        return [Content(text)] if text or token_ids else []  # a token without text is an empty piece of content

    def finish(self) -> list[Event | Reasoning]:
        """No more comes; gives what was held back."""
        events = self._sorted(self._reasoning.finish()) if self._reasoning is not None else []
        return [*events, *self._tools.finish()] if self._tools is not None else events

    def _sorted(self, parts):
        events: list[Event | Reasoning] = []
        for kind, text in parts:
            if kind == "content":
                events += self._tools.feed(text) if self._tools is not None else [Content(text)]
            elif self._shows_reasoning:
                events.append(Reasoning(text))
        return events


class Readers:
    """Makes the readers of one request's choices, which `check_tool_choice` has passed.

    Args:
        prompt: its text, which may have begun the reasoning.
    """

    def __init__(self, body: ChatRequest, config: ServerConfig, prompt: str):
        self._body, self._config, self._prompt = body, config, prompt
        self._tools = body.tool_dicts
        self._reasoning_name = reasoning_name(config)
        self._new_id = self._numbering()
        first_reasoning, first_tools = self._parsers()
        self.starts_after = first_reasoning.starts_after if first_reasoning is not None else None
        parsers = [parser for parser in (first_reasoning, first_tools) if parser is not None]
        self.needs_special_tokens = any(parser.needs_special_tokens for parser in parsers)
        is_forced = isinstance(body.tool_choice, dict) or body.tool_choice == "required"
        self.null_when_empty = bool(parsers) and not is_forced

    def reader(self) -> Reader:
        return Reader(*self._parsers(), self._body.include_reasoning)

    def tool_schema(self) -> dict | None:
        """What a named or required choice makes the reply be."""
        body = self._body
        return tools.reply_schema(self._tools, body.tool_choice, at_most_one=body.parallel_tool_calls is False)

    def _parsers(self):
        name = self._reasoning_name
        first = reasoning.create(name, self._prompt, self._body.chat_template_kwargs) if name else None
        second = tools.choice_parser(self._body.tool_choice, self._tools, self._config.tool_call_parser, self._new_id)
        return first, second

    def _numbering(self) -> NewId | None:
        """Some models' templates take ids of one form alone."""
        if self._config.tool_call_parser == "kimi_k2":
            return tools.kimi_id(sum(len(message.tool_calls or ()) for message in self._body.messages))
        return tools.mistral_id if self._config.tool_call_parser == "mistral" else None


def check_tool_choice(body: ChatRequest, config: ServerConfig) -> None:
    """Refuses to leave the choice of tools to the model where the server was not told how it calls.

    Raises:
        RequestRefused: the flags that it takes are not set.
    """
    if body.tool_choice == "auto" and not (config.enable_auto_tool_choice and config.tool_call_parser):
        raise RequestRefused(NEEDS_FLAGS, "tool_choice")


def reasoning_name(config: ServerConfig) -> str | None:
    return config.reasoning_parser or config.structured_outputs_config.get("reasoning_parser") or None


def check_parsers(config: ServerConfig) -> None:
    """Raises ConfigError for a parser that is not known."""
    if config.tool_call_parser:
        tools.create(config.tool_call_parser)
    if name := reasoning_name(config):
        reasoning.create(name)
