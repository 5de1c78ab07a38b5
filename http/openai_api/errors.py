"""One table from exceptions to OpenAI error bodies. Routes raise; they do not catch."""

import asyncio
import itertools
import logging
import math
import re
from typing import Any, cast

import orjson
import pydantic
from sanic import HTTPResponse, Request
from sanic.exceptions import NotFound, RequestCancelled, SanicException

from runtime import errors
from runtime.errors import RuntimeServerError, shown

log = logging.getLogger(__name__)

STATUS = {
    pydantic.ValidationError: 400,
    errors.UnknownModel: 404,
    errors.RequestRefused: 400,
    errors.Busy: 429,
    errors.Unavailable: 503,
    errors.DeadlinePassed: 504,
    RequestCancelled: 499,
    asyncio.CancelledError: 499,
}
KIND = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    414: "URITooLongError",
    415: "UnsupportedMediaTypeError",
    422: "Unprocessable Entity",
    429: "RateLimitError",
    431: "HeaderTooLargeError",
    501: "Not Implemented",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
VALIDATION_KIND = "Bad Request"
MAX_SHOWN_ERRORS = 5
UNION_MEMBER = re.compile(
    r"str|int|float|bool|[A-Z]\w*|\w+(-\w+)*\[.*"
)  # what pydantic adds to a path that tries types
OUR_FAULT = "internal error; the server log has the details"


class InvalidBody(Exception):
    """The body is not what the route takes. `details` reads like pydantic's: type, loc, msg, input."""

    def __init__(self, details: list[dict]):
        super().__init__(str(details))
        first = details[0]
        where = () if first["type"] == "json_invalid" else first["loc"][1:]  # there it is a position, not a field
        names = itertools.takewhile(lambda name: not UNION_MEMBER.fullmatch(name), map(str, where))
        self.param = ".".join(names) or None

    @classmethod
    def of(cls, kind: str, message: str, *where: str | int) -> "InvalidBody":
        return cls([{"type": kind, "loc": ("body", *where), "msg": message}])


class WrongField(ValueError):
    """Raised by a check of a whole body, which pydantic blames on no field; `param` is the one."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class Refused(SanicException):
    """A refusal that belongs to HTTP itself: a key, a size, a time."""

    quiet = True


def status_of(error: BaseException) -> int:
    if isinstance(error, InvalidBody):
        return 400
    if isinstance(error, SanicException) and not isinstance(error, RequestCancelled):
        return error.status_code
    return next((STATUS[c] for c in type(error).__mro__ if c in STATUS), 500)


def body_of(error: BaseException) -> dict:
    """The error object. What is our fault is in the log, not in the message."""
    status = status_of(error)
    kind = KIND.get(status, "BadRequestError" if status < 500 else "Internal Server Error")
    if isinstance(error, pydantic.ValidationError):
        error = InvalidBody(details_of(error))
    if isinstance(error, InvalidBody):
        kind = VALIDATION_KIND
    ours = isinstance(error, RuntimeServerError | InvalidBody) or (isinstance(error, SanicException) and status != 500)
    message = str(error) if ours else OUR_FAULT
    param = getattr(error, "param", None)
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def details_of(error: pydantic.ValidationError) -> list[dict]:
    """Pydantic's list, with what the caller sent shortened."""
    details = []
    for item in error.errors(include_url=False)[:MAX_SHOWN_ERRORS]:
        cause = item.get("ctx", {}).get("error")
        where = ("body", *item["loc"], *([cause.param] if isinstance(cause, WrongField) else []))
        value = item["input"]
        short = value if isinstance(value, int | float | None) else shown(str(value))
        details.append({"type": item["type"], "loc": where, "msg": item["msg"], "input": short})
    return details


def response_of(error: BaseException) -> HTTPResponse:
    status = status_of(error)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return HTTPResponse(orjson.dumps(body_of(error)), status, headers, "application/json")


def handle(request: Request, error: BaseException) -> HTTPResponse:
    """Sanic's handler of every exception."""
    note(error)
    if isinstance(error, NotFound):
        error = Refused(f"there is no {shown(request.path)} here; GET /v1/models lists the models", status_code=404)
    stream = cast(Any, request.stream)  # an Http, which Sanic's annotation does not say
    if getattr(stream, "expecting_continue", False):
        stream.expecting_continue = False  # else a `100 Continue` would go out before the refusal
        stream.request_body = None
        stream.keep_alive = False
    if status_of(error) in (408, 413):  # the rest of the body may never come, or be too much to swallow
        stream.keep_alive = False
    return response_of(error)


def note(error: BaseException) -> None:
    """Logs what is our fault, with where it happened."""
    if status_of(error) == 500:
        log.error("a request failed", exc_info=error)
