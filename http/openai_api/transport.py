"""HTTP/1.1 read strictly, and never for longer than allowed. What two servers could read differently is refused.

Sanic's own reader takes header names with a space before the colon, NUL and bare CR in values, requests without Host,
and one byte a second without end; after an answer it waits for the rest of a body as long as the client likes.
"""

import asyncio
import math
import re

from httptools import HttpParserInvalidURLError, parse_url
from sanic import Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.headers import format_http1_response
from sanic.http import Http, Stage
from sanic.http.constants import HTTP
from sanic.http.http1 import HTTP_CONTINUE
from sanic.log import error_logger
from sanic.models.server_types import ConnInfo
from sanic.server import HttpProtocol

from openai_api import middleware
from openai_api.errors import Refused
from runtime.errors import shown

MAX_TARGET = 8192
LINGER_S = 2.0  # how long, and how much, of an unwanted body is swallowed so that the client gets to read the answer
LINGER_BYTES = 64 << 20
QUIET_S = 0.1  # of silence after a body that could not be read
UNREADABLE = "unreadable"

# A body that no handler wanted is nobody's error: StrictHttp swallows it.
error_logger.addFilter(lambda record: "body not consumed" not in record.getMessage())

UNPRINTABLE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")
REQUEST_LINE = re.compile(rb"[A-Z]{1,20} ([\x21-\x7e]+) HTTP/1\.([01])")
TARGET = re.compile(rb"/.*|\*|https?://.+")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
HOST = re.compile(rb"[A-Za-z0-9._~%:\[\]-]*")
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,12}")
MAX_CHUNK_LINE = 64
LENGTH = re.compile(rb"[0-9]{1,18}")


def check_head(head: bytes, max_headers: int) -> None:
    """Refuses a request line or headers that are not plainly right.

    Raises:
        Refused: 400, 404, 414 or 431.
    """
    if UNPRINTABLE.search(head):
        raise Refused("the header has a control character", status_code=400)
    request_line, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise Refused("the request line is not that of HTTP/1.1", status_code=400)
    if len(request_line) > MAX_TARGET:
        raise Refused(f"the URL is longer than {MAX_TARGET} bytes", status_code=414)
    _check_target(match[1])
    if len(lines) > max_headers:
        raise Refused(f"there are more than {max_headers} headers", status_code=431)
    found: dict[bytes, list[bytes]] = {b"host": [], b"content-length": [], b"transfer-encoding": []}
    for line in lines:
        header = HEADER.fullmatch(line)
        if header is None:
            raise Refused("a header line is not `name: value`", status_code=400)
        if (name := header[1].lower()) in found:
            found[name].append(header[2])
    hosts, lengths, codings = found.values()
    if len(hosts) > 1 or (not hosts and match[2] == b"1") or not all(HOST.fullmatch(host) for host in hosts):
        raise Refused("exactly one plain Host header is needed", status_code=400)
    if len(lengths) + len(codings) > 1 or not all(LENGTH.fullmatch(length) for length in lengths):
        raise Refused("the length of the body is not clear", status_code=400)
    if any(coding.lower() != b"chunked" for coding in codings):
        raise Refused("the only Transfer-Encoding is chunked", status_code=400)


def _check_target(target):
    if target.startswith(b"//"):  # Sanic would take the first name for a host, and serve the rest
        raise Refused(f"there is no {shown(target.decode())} here; paths begin with one slash", status_code=404)
    try:
        if TARGET.fullmatch(target) and parse_url(target):
            return
    except HttpParserInvalidURLError:
        pass
    raise Refused("the URL of the request line is neither a path nor that of HTTP", status_code=400)


class StrictHttp(Http):
    """Sanic's reader behind a check of its own."""

    request_body: str | bool | None

    async def http1_request_header(self):
        limits = self.protocol.app.ctx.config.limits
        limit = limits.max_header
        try:
            async with asyncio.timeout(limits.header_timeout_s):
                end = await self._end_of_head(limit)
        except TimeoutError:
            raise Refused("the header took too long to arrive", status_code=408) from None
        if end < 0:
            raise Refused(f"the header is larger than {limit:,} bytes", status_code=431)
        check_head(bytes(self.recv_buffer[:end]), limits.max_headers)
        await super().http1_request_header()

    async def http1_response_header(self, data, end_stream):
        response = self.response
        has_length = end_stream or getattr(response, "body", None) or "content-length" in response.headers
        if has_length or self.request.version != "1.0":
            await super().http1_response_header(data, end_stream)
            return
        self.keep_alive = False  # HTTP/1.0 has no chunks: the answer ends where the connection does
        response.headers["connection"] = "close"
        self.response_func = self._until_closed
        await self._send(format_http1_response(response.status, response.processed_headers) + data)
        self.stage = Stage.RESPONSE

    async def _until_closed(self, data, end_stream):
        if data:
            await self._send(data)
        if end_stream:
            self.response_func = None
            self.stage = Stage.IDLE

    async def __aiter__(self):
        """What Sanic reads of a body that no handler wanted: a little, for a short while, and then it hangs up."""
        self.request_max_size = math.inf
        self.expecting_continue = False
        left = LINGER_BYTES
        try:
            async with asyncio.timeout(LINGER_S):
                while self.request_body and left > 0:
                    data = await (self._anything() if self.request_body == UNREADABLE else self.read())
                    left -= len(data or b"")
                    yield data or b""
        except TimeoutError:
            pass
        if self.request_body:
            self.request_body = None
            self.keep_alive = False

    async def read(self):
        if self.request_body == "chunked" and self.request_bytes_left == 0:
            await self._check_chunk_size()
        return await super().read()

    async def _anything(self):
        """Bytes as they come, for no one: where a broken body ends cannot be told."""
        data = bytes(self.recv_buffer)
        self.recv_buffer.clear()
        try:
            async with asyncio.timeout(QUIET_S):
                await self._receive_more()
        except TimeoutError:
            self.request_body = None
        return data

    async def _check_chunk_size(self):
        """The next chunk's size is plain hexadecimal, with no extension after it."""
        if self.expecting_continue:
            self.expecting_continue = False
            await self._send(HTTP_CONTINUE)
        buffer = self.recv_buffer  # begins with the line end before the size
        while (end := buffer.find(b"\r\n", 3)) < 0 and len(buffer) <= MAX_CHUNK_LINE:
            await self._receive_more()
        if end < 0 or not CHUNK_SIZE.fullmatch(buffer, 2, end):
            self.request_body = UNREADABLE
            self.keep_alive = False
            raise Refused("a chunk's size must be plain hexadecimal", status_code=400)

    async def _end_of_head(self, limit):
        """Where the header ends in the buffer; -1 when it is too large."""
        at = 0
        while (end := self.recv_buffer.find(b"\r\n\r\n", at)) < 0:
            if len(self.recv_buffer) > limit:
                return -1
            at = max(0, len(self.recv_buffer) - 3)
            await self._receive_more()
        return end if end < limit else -1


class StrictProtocol(HttpProtocol):
    HTTP_CLASS = StrictHttp

    def connection_made(self, transport):
        if len(self.connections) >= self.app.ctx.config.limits.max_connections:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n")
            transport.write(b"Connection: close\r\n\r\n")
            self.transport, self.conn_info, self.recv_buffer = transport, ConnInfo(transport), bytearray()
            transport.close()
            return
        super().connection_made(transport)


class Server(Sanic):
    """Sanic, reading with StrictProtocol unless told otherwise, inside the middleware that it was given."""

    async def handle_request(self, request):
        outermost = getattr(self.ctx, "outermost", None)
        if outermost is not None and isinstance(request.stream, Http):
            await middleware.pass_through(outermost, request)
        else:
            await super().handle_request(request)

    def create_server(self, *args, **options):
        options.setdefault("protocol", StrictProtocol)
        # Sanic puts an empty Alt-Svc header into every answer of a server that it was not told of.
        self.state.server_info = [ApplicationServerInfo(settings={"version": HTTP.VERSION_1})]
        return super().create_server(*args, **options)
