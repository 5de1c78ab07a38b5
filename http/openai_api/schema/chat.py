"""POST /v1/chat/completions: what is asked."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from openai_api.config import Limits
from openai_api.errors import WrongField
from openai_api.schema.sampling import Body, SamplingFields
from runtime.beam import BeamParams
from runtime.chat.messages import MEDIA_PARTS
from runtime.chat.tools import check_number, check_tools
from runtime.errors import RequestRefused
from runtime.params import SamplingParams

CORRECT_USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'
BOTH_FLAGS = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."


MAX_PARTS = 4096  # of one message
PART = {
    "type": "object",
    "properties": {
        "type": {
            "enum": ["text", "input_text", "refusal", "thinking", *MEDIA_PARTS],
            "description": "Where it is missing, the key of the payload says it.",
        },
        "text": {"type": ["string", "null"]},
    },
}
Part = Annotated[dict[str, Any], pydantic.WithJsonSchema(PART)]


class Message(Body):
    """One message; which of its other keys reach the template depends on the role."""

    role: str
    content: str | Annotated[list[str | Part], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    name: Annotated[Any, pydantic.WithJsonSchema({"type": "string"})] = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class ChatFields(Body):
    """What makes a prompt of messages; other routes take the same."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _one_ending(self):
        explicit = "add_generation_prompt" in self.model_fields_set
        if explicit and self.add_generation_prompt and self.continue_final_message:
            raise WrongField(BOTH_FLAGS, "continue_final_message")
        return self

    @property
    def tool_dicts(self) -> list[dict]:
        """The tools as they were sent, which is how templates take them."""
        return [
            {"type": tool.type, "function": tool.function.model_dump(exclude_unset=True)} for tool in self.tools or ()
        ]

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables for the template, beyond the standard ones."""
        return self.chat_template_kwargs or {}

    def message_dicts(self) -> list[dict]:
        return [message.model_dump(exclude_unset=True) for message in self.messages]

    def check_sizes(self, limits: Limits) -> None:
        """Refuses more messages or tools than may be sent."""
        if len(self.messages) > limits.max_messages:
            raise RequestRefused(f"messages may hold {limits.max_messages:,}, got {len(self.messages):,}", "messages")
        check_number(len(self.tools or ()))
        check_tools(self.tool_dicts)


NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["function"],
}
TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, NAMED_TOOL, {"type": "null"}]}


class ChatRequest(SamplingFields, ChatFields):
    """A conversation to be continued, and how."""

    bad_words: list[str] | None = []
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tool_choice: Annotated[Any, pydantic.WithJsonSchema(TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    include_reasoning: bool = True
    echo: bool = False

    @pydantic.model_validator(mode="after")
    def _logprobs_go_together(self):
        top = self.top_logprobs
        if top is not None:
            if top < 0 and top != -1:
                raise WrongField("`top_logprobs` must be a positive value or -1.", "top_logprobs")
            if top and not self.logprobs:
                raise WrongField("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
        return self

    @pydantic.model_validator(mode="after")
    def _choice_fits_tools(self):
        choice = self.tool_choice
        if choice is None:
            if "tool_choice" not in self.model_fields_set:
                self.tool_choice = "auto" if self.tools else "none"
            return self
        if choice == "none":
            return self
        if self.tools is None:
            raise WrongField("When using `tool_choice`, `tools` must be set.", "tool_choice")
        if isinstance(choice, dict):
            self._check_named(choice)
        elif choice not in ("auto", "required"):
            raise WrongField(
                f"Invalid value for `tool_choice`: {str(choice)[:60]}! "
                'Only named tools, "none", "auto" or "required" are supported.',
                "tool_choice",
            )
        elif not self.tools:
            self.tool_choice = "none"
        return self

    @property
    def template_kwargs(self) -> dict[str, Any]:
        effort = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        return effort | super().template_kwargs

    def _check_named(self, choice):
        function = choice.get("function")
        if not isinstance(function, dict):
            raise WrongField(f"`tool_choice` must have a `function` object. {CORRECT_USAGE}", "tool_choice")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise WrongField(f"`tool_choice` must name its function. {CORRECT_USAGE}", "tool_choice")
        if function["name"] not in {tool.function.name for tool in self.tools or ()}:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise WrongField(message, "tool_choice")

    @property
    def limit(self) -> int | None:
        """The most tokens asked for; None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice["function"]["name"] if isinstance(self.tool_choice, dict) else None

    def echoed_text(self, role: str) -> str | None:
        """What echo puts before the reply: the last message, if it is of the reply's role."""
        last = self.messages[-1]
        if not self.echo or last.role != role or not last.content:
            return None
        if isinstance(last.content, str):
            return last.content
        texts = [part if isinstance(part, str) else part.get("text") for part in last.content]
        return "\n".join(text for text in texts if isinstance(text, str))

    def check_supported(self, limits: Limits) -> None:
        super().check_supported(limits)
        self.check_sizes(limits)

    def params(self, defaults: dict, room: int, show_special_tokens: bool = False) -> SamplingParams | BeamParams:
        """For a prompt that leaves `room` tokens; some parsers look for special tokens in the text."""
        if self.use_beam_search:
            return self.beams(room)
        settled: dict[str, Any] = {"max_tokens": room, "bad_words": self.bad_words}
        settled["logprobs"] = self.top_logprobs if self.logprobs else None
        if show_special_tokens:
            settled["skip_special_tokens"] = False
        if self.echo and self.prompt_logprobs is None:
            settled["prompt_logprobs"] = self.top_logprobs
        return self.sampling(defaults, **settled)
