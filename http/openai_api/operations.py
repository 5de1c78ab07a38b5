"""What a route takes and answers, said beside its handler; openapi.py makes the document of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

Model = type[pydantic.BaseModel]
REFUSALS = {
    400: "The request is wrong; the message names the field and the limit.",
    401: "A key is needed and was not sent.",
    404: "Nothing here has that name.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "A fault of the server; its log has the details.",
    501: "A content part of a type that is not known.",
    503: "The server is starting, stopping or without its engine.",
    504: "The request ran longer than it may.",
}
OF_BODIES = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        summary: a line; the handler's docstring says more.
        bodies: the forms a JSON body may have; none for a route without a body.
        answers: what status 200 carries: models, or a media type of plain text, or nothing for an empty body.
        events: a streamed answer's events, where the route streams.
        query: names of query parameters and their JSON schemas.
        refusals: statuses of error objects.
        is_refused: it never answers 200.
    """

    summary: str
    bodies: tuple[Model, ...] = ()
    answers: tuple[Model, ...] | str = ()
    events: tuple[Model, ...] = ()
    query: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    refusals: tuple[int, ...] = (401, 500)
    is_refused: bool = False


def operation(
    summary: str,
    *bodies: Model,
    answer: Model | str | tuple[Model, ...] = (),
    event: Model | tuple[Model, ...] = (),
    refusals: tuple[int, ...] = (),
    **details: Any,
) -> Callable:
    """Attaches an Operation to a handler; every route must have one."""
    details["answers"] = answer if isinstance(answer, str | tuple) else (answer,)
    details["events"] = event if isinstance(event, tuple) else (event,)
    stated = refusals or (OF_BODIES if bodies else (401, 500))
    described = Operation(summary=summary, bodies=bodies, refusals=stated, **details)

    def attach(handler):
        handler.operation = described
        return handler

    return attach
