"""A request's body as a checked JSON object.

Bounded before it is read: size, time, how many values, how deep. Then strict where Python's parser is not: no NaN, no
repeated keys, no half surrogates.
"""

import asyncio
import json
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import pydantic
from sanic import Request

from openai_api.config import Limits
from openai_api.errors import InvalidBody, Refused
from runtime.errors import shown

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=pydantic.BaseModel)
Other = TypeVar("Other", bound=pydantic.BaseModel)
Result = TypeVar("Result")
INLINE_BYTES = 65_536  # a smaller body is read faster than a thread is reached
NOT_JSON = "Unsupported Media Type: Only 'application/json' is allowed"
MAX_WARNED = 100
_warned: set[str] = set()


async def read_json(request: Request, model: type[Model], otherwise: type[Other] | None = None) -> Model | Other:
    """The body as this model; as the other one when it has messages and no prompt.

    Raises:
        InvalidBody: it is not JSON, or not what the model takes.
        Refused: it is too large or too slow.
    """

    def understand(value):
        if otherwise is not None and "messages" in value and "prompt" not in value:
            return validated(otherwise, value)
        return validated(model, value)

    return await read_as(request, understand)


async def read_as(request: Request, understand: Callable[[dict], Result]) -> Result:
    """The body as `understand` takes its JSON object. A large one is read beside the event loop.

    Raises:
        InvalidBody: it is not a JSON object.
        Refused: it is too large or too slow.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidBody.of("value_error", NOT_JSON)
    limits: Limits = request.app.ctx.config.limits
    body = await read(request, limits)
    if len(body) <= INLINE_BYTES:
        return understand(parse(body, limits))
    return await asyncio.to_thread(lambda: understand(parse(body, limits)))


def validated(model: type[Model], value: dict) -> Model:
    """The object as this model; unknown fields are said once.

    Raises:
        pydantic.ValidationError: it is not what the model takes.
    """
    if unknown := value.keys() - model.model_fields.keys() - _warned:
        warn_unknown(unknown)
    return model.model_validate(value)


async def read(request: Request, limits: Limits) -> bytes:
    """The bytes, at most limits.max_body of them, within the time allowed."""
    declared = request.headers.get("content-length", "")
    too_large = f"the body is larger than {limits.max_body:,} bytes; shorten it"
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused("a compressed body is not read; send it as it is", status_code=415)
    if declared.isascii() and declared.isdigit() and int(declared) > limits.max_body:
        raise Refused(too_large, status_code=413)
    body, num_pieces = bytearray(), 0
    stream = cast(Any, request.stream)  # an Http, which Sanic's annotation does not say
    try:
        async with asyncio.timeout(limits.body_timeout_s) as clock:
            start = clock.when() or math.inf
            while stream.request_body:
                body += await stream.read() or b""
                num_pieces += 1
                if len(body) > limits.max_body:
                    raise Refused(too_large, status_code=413)
                if num_pieces > limits.max_body_pieces:
                    raise Refused("the body comes in too many pieces; send larger ones", status_code=400)
                clock.reschedule(start + len(body) / (1 << 20))
    except TimeoutError:
        raise Refused("the body took too long to arrive", status_code=408) from None
    return bytes(body)


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """A JSON object from bytes.

    Raises:
        InvalidBody: it is something else; the message has the position.
    """
    if body.count(b",") + body.count(b":") > limits.max_json_values:
        raise InvalidBody.of("json_invalid", f"JSON of more than {limits.max_json_values:,} values")
    num_keys = 0

    def object_of(pairs):
        nonlocal num_keys
        num_keys += len(pairs)
        if num_keys > limits.max_json_keys:
            raise ValueError(f"more than {limits.max_json_keys:,} keys")
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {shown(repeated)!r} stands twice in one object")
        return found

    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=object_of, parse_constant=_constant, parse_float=_float)
        if "\\u" in text:
            _check_surrogates(value)
    except json.JSONDecodeError as error:
        raise InvalidBody.of("json_invalid", f"JSON decode error: {error}", error.pos) from None
    except UnicodeDecodeError as error:
        raise InvalidBody.of("json_invalid", f"JSON must be UTF-8; byte {error.start} is not", error.start) from None
    except RecursionError:
        raise InvalidBody.of("json_invalid", f"JSON nested deeper than {limits.max_json_depth} levels") from None
    except ValueError as error:
        raise InvalidBody.of("json_invalid", f"JSON decode error: {error}") from None
    if body.count(b"[") + body.count(b"{") > limits.max_json_depth and _is_deeper(value, limits.max_json_depth):
        raise InvalidBody.of("json_invalid", f"JSON nested deeper than {limits.max_json_depth} levels")
    if not isinstance(value, dict):
        raise InvalidBody.of("model_attributes_type", "the body must be a JSON object")
    return value


def warn_unknown(names: set[str]) -> None:
    """Fields that no model has are ignored, and said once."""
    room = MAX_WARNED - len(_warned)
    for name in sorted(names)[: max(0, room)]:
        _warned.add(name)
        log.warning("the request field %r is not known here and is ignored", shown(name))


def _constant(name):
    raise ValueError(f"{name} is not a JSON number")


def _float(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shown(text, 30)} is too large")
    return value


def _is_deeper(value, limit):
    level = [value]
    for _ in range(limit):
        level = [child for item in level for child in _children(item) if isinstance(child, list | dict)]
        if not level:
            return False
    return True


def _children(item):
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _check_surrogates(value):
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, dict):
            for name in item:
                _check_text(name)
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _check_text(text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair (\\u{ord(text[error.start]):04x}) is not a character") from None
