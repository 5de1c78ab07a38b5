"""Messages as a request has them to messages as a template takes them, with their media set aside."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.chat.template import ContentFormat
from runtime.errors import RequestRefused, shown

log = logging.getLogger(__name__)

TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal", "thinking": "thinking"}
MEDIA_PARTS = {
    "image_url": "image",
    "input_image": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
NOT_OVER_HTTP = {
    "image_embeds": "image_embeds is not supported: such tensors are pickled, and this server unpickles nothing",
    "image_pil": "image_pil holds a Python object and cannot be sent over HTTP; use image_url",
}


class UnknownPart(RequestRefused):
    """A content part of a type that is not known here."""


@dataclasses.dataclass(frozen=True, slots=True)
class Media:
    """One image, sound or film of a chat, not yet fetched.

    kind: "image", "audio" or "video".
    url: http(s), data or file; None when only `uuid` names it.
    """

    kind: str
    url: str | None
    uuid: str | None = None


# (kind, how many of that kind came before) -> what stands for it in the text; None where the model has no such input.
Placeholder = Callable[[str, int], str | None]


def convert(
    messages: Sequence[Mapping[str, Any]], content_format: ContentFormat, placeholder: Placeholder | None = None
) -> tuple[list[dict], list[Media]]:
    """Messages for the template, and the media in their order.

    Args:
        messages: role, content (text, a list of parts, or null), and by role tool_calls, tool_call_id, name.
        content_format: "openai" keeps the parts, "string" joins them into one text.
        placeholder: None for a model that reads only text.

    Raises:
        RequestRefused: a part of the wrong form or of media this model does not take; arguments that are not JSON.
    """
    media: list[Media] = []
    return [_message(m, i, content_format, placeholder, media) for i, m in enumerate(messages)], media


def _message(message, position, content_format, placeholder, media):
    where = f"messages.{position}"
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content or []
    pieces, marks = [], []
    for i, part in enumerate(parts):
        piece = _part(part, place := f"{where}.content.{i}")
        pieces += [] if piece is None else [piece]
        marks += [_mark(piece, placeholder, media, place)] if isinstance(piece, Media) else []
    if content_format == "openai":
        kept = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind} for p in pieces]
        result = {"role": message["role"], "content": kept}
    else:
        result = {"role": message["role"], "content": _joined([p for p in pieces if isinstance(p, str)], marks, where)}
    if isinstance(message.get("name"), str):
        result["name"] = message["name"]
    if message["role"] == "assistant" and message.get("tool_calls"):
        result["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(message["tool_calls"])
        ]
    if message["role"] == "tool" and message.get("tool_call_id") is not None:
        result["tool_call_id"] = message["tool_call_id"]
    return result


def _mark(item, placeholder, media, where):
    """What stands for a medium in the text; notes the medium."""
    mark = placeholder(item.kind, sum(other.kind == item.kind for other in media)) if placeholder else None
    if placeholder is None:
        message = f"{where} is an {item.kind}, and this model is not a multimodal model; send text alone"
        raise RequestRefused(message.replace("an video", "a video"), where)
    if mark is None:
        raise RequestRefused(f"{where}: this model takes no {item.kind}; leave it out", where)
    media.append(item)
    return mark


def _joined(texts, marks, where):
    """Texts on lines of their own, and before them the marks that they do not spell out already."""
    text, missing = "\n".join(texts), []
    for mark in dict.fromkeys(marks):
        wanted, written = marks.count(mark), text.count(mark) if mark else 0
        if written > wanted:
            message = f"{where} spells {written} of {mark} but brings {wanted}; send as many items as placeholders"
            raise RequestRefused(message, where)
        missing += [mark] * (wanted - written)
    return "\n".join([*filter(None, missing), text]) if missing else text


def _part(part, where):
    """A string, a Media, or None for a part that is skipped."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestRefused(f"{where} must be a string or an object with a type", where)
    kind = part.get("type") or next((k for k in (*MEDIA_PARTS, *NOT_OVER_HTTP) if k in part), None)
    if kind in NOT_OVER_HTTP:
        raise RequestRefused(NOT_OVER_HTTP[kind], where)
    if kind in TEXT_PARTS:
        text = part.get(TEXT_PARTS[kind])
        if text is None:
            log.warning("a content part of type %s has no text; it is skipped", kind)
        elif not isinstance(text, str):
            raise RequestRefused(f"{where}.{TEXT_PARTS[kind]} must be a string", where)
        return text
    if kind in MEDIA_PARTS:
        return Media(MEDIA_PARTS[kind], _media_url(kind, part, where), part.get("uuid"))
    known = ", ".join([*TEXT_PARTS, *MEDIA_PARTS])
    raise UnknownPart(f"Unknown part type: {shown(str(kind))} at {where}; known types: {known}", where)


def _media_url(kind, part, where):
    payload = part.get(kind) if kind != "input_image" else part.get("image_url")
    if payload is None and part.get("uuid") is not None:
        return None
    if kind == "input_audio":
        if not isinstance(payload, Mapping) or not all(isinstance(payload.get(k), str) for k in ("data", "format")):
            raise RequestRefused(f"{where}.input_audio must be an object with the strings data and format", where)
        return f"data:audio/{payload['format']};base64,{payload['data']}"
    url = payload.get("url") if isinstance(payload, Mapping) else payload
    if not isinstance(url, str):
        raise RequestRefused(f"{where}.{kind} must be a URL, or an object with the string url", where)
    return url


def _tool_call(call, where):
    """The same call with its arguments as an object, which is how templates take them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestRefused(f"{where}.function must be an object with name and arguments", where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError):
            raise RequestRefused(f"{where}.function.arguments must be JSON", where) from None
    return {**call, "function": {**function, "arguments": arguments}}
