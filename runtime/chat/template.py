"""Messages and tools to one prompt, by the model's own template or another."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2
import jinja2.meta
from jinja2 import nodes

from runtime.chat import rendering
from runtime.errors import RequestRefused

log = logging.getLogger(__name__)

ContentFormat = Literal["string", "openai"]
MAX_CHARS = 64 << 20
# Arguments of a tokenizer's own template method: a request may not set them through chat_template_kwargs.
RESERVED = frozenset(
    "messages conversation tools tokenize padding truncation max_length return_tensors return_dict"
    " return_assistant_tokens_mask tokenizer_kwargs tokenizer".split()
)
NO_TEMPLATE = (
    "this model has no chat template, and a default one is no longer allowed; "
    "start the server with --chat-template, or use /v1/completions"
)
BOTH = (
    "continue_final_message and add_generation_prompt are not compatible: the first writes on in the last message, the "
    "second begins a new one. Send add_generation_prompt: false with continue_final_message"
)
NOT_SHOWN = (
    "continue_final_message is set, but the chat template does not show the last message as it is; "
    "continue a message that it shows, or leave continue_final_message out"
)


class ChatTemplate:
    """A template, or several under names, with what every rendering gets.

    Args:
        source: Jinja text, or {"default": …, "tool_use": …} as some models have.
        special_tokens: bos_token and so on, which templates write.
        content_format: how message content is given to it; None finds out from the template.
    """

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str] | None = None,
        content_format: ContentFormat | None = None,
    ):
        self._sources: dict[str, str] = {"default": source} if isinstance(source, str) else dict(source or {})
        self.special_tokens = dict(special_tokens or {})
        self._format: ContentFormat | None = content_format

    def with_source(self, source: str) -> "ChatTemplate":
        """The same with another text."""
        return ChatTemplate(source, self.special_tokens, self._format)

    @property
    def has_any(self) -> bool:
        return bool(self._sources)

    def pick(self, has_tools: bool) -> str:
        """The text that is used.

        Raises:
            RequestRefused: there is none.
        """
        if has_tools and "tool_use" in self._sources:
            return self._sources["tool_use"]
        if "default" in self._sources:
            return self._sources["default"]
        raise RequestRefused(NO_TEMPLATE, "messages")

    def content_format(self, has_tools: bool = False) -> ContentFormat:
        return self._format or detect_content_format(self.pick(has_tools))

    def variables(
        self,
        messages: Sequence[Mapping],
        *,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> dict:
        """What the template is rendered with: the standard variables, then of `kwargs` those that it names.

        Raises:
            RequestRefused: kwargs sets what has a field of its own, or the two flags contradict each other.
        """
        if taken := sorted(RESERVED & set(kwargs or ())):
            message = f"chat_template_kwargs may not set {', '.join(map(repr, taken))}; use the field of that name"
            raise RequestRefused(message, "chat_template_kwargs")
        standard = {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        wanted = standard.keys() | names_used(self.pick(bool(tools)))
        extra = {name: value for name, value in (kwargs or {}).items() if name in wanted and name != "chat_template"}
        variables = self.special_tokens | standard | extra
        if variables["add_generation_prompt"] and variables["continue_final_message"]:
            raise RequestRefused(BOTH, "continue_final_message")
        return variables

    def render(self, messages: Sequence[Mapping], **options) -> str:
        """Renders here and now; the options are those of `variables`.

        Raises:
            RequestRefused: the template refuses the messages; the message is its own.
        """
        variables = self.variables(messages, **options)
        try:
            text = rendering.render(self.pick(bool(variables["tools"])), variables, MAX_CHARS)
        except ValueError as error:
            raise RequestRefused(str(error), "messages") from None
        return self.finish(text, variables)

    def finish(self, text: str, variables: Mapping) -> str:
        """Cuts a rendering after its last message where that one is to be continued."""
        return cut_after(text, variables["messages"]) if variables["continue_final_message"] else text


def cut_after(text: str, messages: Sequence[Mapping]) -> str:
    """The rendered text up to the end of the last message's content, less what the template trimmed from it.

    Raises:
        RequestRefused: the last message has no text, or the template does not show it.
    """
    content = messages[-1]["content"] if messages else None
    if not isinstance(content, str):
        parts = [part["text"] for part in content or () if isinstance(part, Mapping) and "text" in part]
        content = parts[-1] if parts else ""
    core = content.strip()
    if not core or core not in text:
        raise RequestRefused(NOT_SHOWN, "continue_final_message")
    start = text.rindex(core)
    whole = content.lstrip()
    return text[: start + len(whole)] if text.startswith(whole, start) else text[: start + len(core)]


@functools.lru_cache(maxsize=32)
def names_used(source: str) -> frozenset[str]:
    """Variables the template reads and does not set."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(rendering.environment().parse(source)))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()  # rendering says what is wrong with it


@functools.lru_cache(maxsize=32)
def detect_content_format(source: str) -> ContentFormat:
    """Does the template loop over the parts of a message's content ("openai"), or take it as one string?"""
    try:
        tree = rendering.environment().parse(source)
        messages = _names_for_messages(tree)
        items = {_name(loop.target) for loop in tree.find_all(nodes.For) if _names_one_of(loop.iter, messages)}
        loops_over_parts = any(_is_content_of(loop.iter, items) for loop in tree.find_all(nodes.For))
    except (jinja2.TemplateError, RecursionError, _UnusualTemplate):
        return "string"
    found: ContentFormat = "openai" if loops_over_parts else "string"
    log.info("Detected the chat template content format to be '%s'", found)
    return found


class _UnusualTemplate(Exception):
    """A form that says nothing certain about the content."""


def _names_for_messages(tree):
    """`messages` and every name the template sets to it, directly or over other such names."""
    names, found = {"messages"}, True
    assignments = list(tree.find_all(nodes.Assign))
    while found:
        new = {_name(a.target) for a in assignments if _names_one_of(a.node, names)}
        found = not new <= names
        names |= new
    return names


def _name(target):
    if not isinstance(target, nodes.Name):
        raise _UnusualTemplate
    return target.name


def _bare(node):
    """The expression under filters, tests and slices."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _names_one_of(node, names):
    node = _bare(node)
    return isinstance(node, nodes.Name) and node.name in names


def _is_content_of(node, names):
    node = _bare(node)
    if isinstance(node, nodes.Getattr):
        key = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key = node.arg.value
    else:
        return False
    return key == "content" and isinstance(node.node, nodes.Name) and node.node.name in names
