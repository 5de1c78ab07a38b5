"""Two ways to answer: all at once, or as server-sent events ended by [DONE].

Both close what they read from however they end, so a caller who goes away frees its pages at once.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

import orjson
from sanic import HTTPResponse, Request

from openai_api import errors, middleware
from runtime.errors import DeadlinePassed

EVENT_STREAM = "text/event-stream; charset=utf-8"
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
# Characters that end a line for Python's str.splitlines, and so for clients that read events with httpx's iter_lines.
LINE_ENDS = {"\u0085".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}


def whole_json(body: object, status: int = 200) -> HTTPResponse:
    return HTTPResponse(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), status, None, "application/json")


def event(body: object) -> bytes:
    """One server-sent event: one line, however its reader splits lines."""
    data = orjson.dumps(body)
    if b"\x85" in data or b"\xe2\x80" in data:
        for character, escape in LINE_ENDS.items():
            data = data.replace(character, escape)
    return b"data: " + data + b"\n\n"


async def whole(request: Request, answer: Awaitable[dict]) -> HTTPResponse:
    """Waits for the answer.

    Raises:
        DeadlinePassed: it took longer than a request may.
    """
    limit_s = request.app.ctx.config.limits.request_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return whole_json(await answer)
    except TimeoutError:
        raise DeadlinePassed(f"the request ran longer than {limit_s:g} s; ask for fewer tokens") from None


class Stream:
    """An open answer. `sending_since` is set while the reader has not taken what was sent."""

    def __init__(self, request: Request):
        self._request = request
        self._response: Any = None
        self.sending_since: float | None = None

    @property
    def is_open(self) -> bool:
        return self._response is not None

    async def send(self, data: bytes) -> None:
        self.sending_since = time.monotonic()
        if self._response is None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            self._response = await self._request.respond(headers=headers, content_type=EVENT_STREAM)
        await self._response.send(data)
        self._request.ctx.num_bytes_out += len(data)
        self.sending_since = None

    async def end(self) -> None:
        if self._response is not None:
            await self._response.eof()

    def cut(self) -> None:
        self.sending_since = None
        middleware.hang_up(self._request)


async def stream(request: Request, events: AsyncGenerator[bytes, None]) -> None:
    """Sends events as they come, then [DONE].

    An error before the first event is raised, while it can still be an HTTP status; a later one is the last event.
    While there is nothing to send yet, comments keep proxies from giving up.
    """
    limits = request.app.ctx.config.limits
    out = Stream(request)
    open_streams = request.app.ctx.streams
    open_streams.add(out)
    try:
        async with asyncio.timeout(limits.request_timeout_s), contextlib.aclosing(events):
            first = await _first(events, out, limits.first_comment_s)
            if first is not None:
                await out.send(first)
            async for piece in events:
                await out.send(piece)
    except Exception as error:  # the boundary of a stream: whatever it was, the caller hears of it
        if isinstance(error, TimeoutError):
            error = DeadlinePassed(f"the request ran longer than {limits.request_timeout_s:g} s; ask for fewer tokens")
        if not out.is_open:
            raise error from None
        errors.note(error)
        await out.send(event(errors.body_of(error)))
    finally:
        open_streams.discard(out)
    await out.send(DONE)
    await out.end()


async def _first(events, out, comment_s):
    """The first event; comments go out while it takes long. None when there is none."""
    task = asyncio.ensure_future(anext(events, None))
    try:
        while not task.done():
            done, _ = await asyncio.wait({task}, timeout=comment_s)
            if not done:
                await out.send(COMMENT)
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
