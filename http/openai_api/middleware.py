"""--middleware: code of the operator's around every request, as ASGI has it.

A class is called with the application inside it and is an ASGI application itself; a coroutine function takes a request
and what comes next, as Starlette has it, and needs that package. The last one named is the outermost. Without any, no
request passes through here.

Source: the ASGI specification 3.0, HTTP and WebSocket message format 2.3.
"""

import asyncio
import importlib
import inspect
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from sanic import HTTPResponse, Request
from sanic.asgi import ASGIApp
from sanic.compat import Header
from sanic.exceptions import ServerError

from openai_api.errors import Refused
from runtime.errors import ConfigError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
CONNECTION = "openai_api.connection"  # the extension under which a scope carries the request that came over the socket
PLAIN = "text/plain; charset=utf-8"


def around(app: Any, paths: Sequence[str]) -> Application | None:
    """The app as an ASGI application inside the middleware at these import paths; None where there is none.

    Raises:
        ConfigError: a path leads nowhere, or to something of another kind.
    """
    if not paths:
        return None
    outermost: Application = _innermost(app)
    for path in paths:
        outermost = _load(path)(outermost)
    return outermost


async def pass_through(outermost: Application, request: Request) -> None:
    """Answers a request that came over the socket with what the application says.

    Raises:
        ServerError: it said nothing.
    """
    exchange = _Exchange(request)
    await outermost(exchange.scope(), exchange.receive, exchange.send)
    if exchange.response is None:
        raise ServerError("the middleware gave no answer")
    if exchange.inner is None:  # it answered by itself, so the gate has not seen the request
        request.app.ctx.gate.count(request, exchange.response.status)


def hang_up(request: Request) -> None:
    """Drops the connection at once, unsent bytes and all; Sanic then cancels the handler."""
    scope = getattr(request.transport, "scope", None)  # there inside middleware, and behind an ASGI server
    exchange = scope and scope.get("extensions", {}).get(CONNECTION)
    transport: Any = exchange.request.transport if exchange else request.transport
    if hasattr(transport, "abort"):
        transport.abort()


def _load(path: str) -> Any:
    """What makes an application of the one inside it."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--middleware {path} cannot be imported: {error}; write module.name, see PYTHONPATH"
        ) from None
    if inspect.isclass(found):
        return found
    if not inspect.iscoroutinefunction(found):
        raise ConfigError(f"--middleware {path} is a {type(found).__name__}; a class or a coroutine function is wanted")
    try:
        from starlette.middleware.base import BaseHTTPMiddleware
    except ImportError:
        message = (
            "a function takes Starlette's requests, and that package is not installed; install it, or write a class"
        )
        raise ConfigError(f"--middleware {path}: {message}") from None
    return lambda inner: BaseHTTPMiddleware(inner, dispatch=found)


def _innermost(app) -> Application:
    async def answer(scope, receive, send):
        start: Message = {}

        async def send_with_length(message):
            """What Sanic sends, with headers as a list, and with the length of an answer that comes at once."""
            if message["type"] == "http.response.start":
                start.update(message, headers=list(message["headers"]))
                return
            if start:
                if not message.get("more_body", False):
                    start["headers"].append((b"content-length", str(len(message.get("body", b""))).encode()))
                await send(dict(start))
                start.clear()
            await send(message)

        app.asgi = True  # else Sanic, which does not run this app by itself, would not give its loop
        inner = await ASGIApp.create(app, scope, receive, send_with_length)
        scope["extensions"][CONNECTION].inner = inner
        await inner()

    return answer


class _Exchange:
    """One request over the socket, as the scope and the messages of ASGI.

    Attributes:
        inner: the request's twin inside the middleware, once that was reached.
        response: what was answered, once that has begun.
    """

    def __init__(self, request: Request):
        self.request = request
        self.inner: Any = None
        self.response: HTTPResponse | None = None
        self._stream: Any = request.stream
        self._start: Message = {}
        self._is_read = False
        self._num_bytes = 0

    def scope(self) -> Message:
        request = self.request
        path, _, query = request.raw_url.partition(b"?")
        place = request.conn_info
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.version,
            "method": request.method,
            "scheme": "https" if place and place.ssl else "http",
            "path": urllib.parse.unquote(request.path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(name.encode(), _bytes(value)) for name, value in request.headers.items()],
            "client": (place.client_ip, place.client_port) if place and place.client_port else None,
            "server": place.sockname[:2] if place and isinstance(place.sockname, tuple) else None,
            "state": {},
            "extensions": {CONNECTION: self},
        }

    async def receive(self) -> Message:
        """The body in pieces; then nothing more, as a client who goes away cancels the whole exchange.

        Raises:
            Refused: the body is larger than any may be, whoever reads it.
        """
        if self._is_read:
            await asyncio.get_running_loop().create_future()
        data = await self._stream.read() if self._stream.request_body else b""
        self._num_bytes += len(data or b"")
        if self._num_bytes > (most := self.request.app.ctx.config.limits.max_body):
            raise Refused(f"the body is larger than {most:,} bytes; shorten it", status_code=413)
        if self.inner is not None:
            self.inner.request_bytes = self._stream.request_bytes
        self._is_read = not self._stream.request_body
        return {"type": "http.request", "body": data or b"", "more_body": not self._is_read}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            if self.response is None:
                self._begin()
            await self.response.send(message.get("body", b""), end_stream=not message.get("more_body", False))

    def _begin(self):
        stream = self._stream
        if getattr(self.inner, "keep_alive", True) is False:
            stream.keep_alive = False
        if stream.expecting_continue:  # answered before the body was asked for: a `100 Continue` must not go out
            stream.expecting_continue = False
            stream.request_body = None
            stream.keep_alive = False
        headers = Header([(name.decode(), value.decode(errors="surrogateescape")) for name, value in self._headers()])
        self.response = HTTPResponse(status=self._start["status"], headers=headers, content_type=PLAIN)
        stream.respond(self.response)

    def _headers(self):
        """Less what belongs to a connection."""
        mine = (b"connection", b"transfer-encoding", b"keep-alive")
        return [(name.lower(), value) for name, value in self._start.get("headers", ()) if name.lower() not in mine]


def _bytes(value: str) -> bytes:
    return value.encode(errors="surrogateescape")
