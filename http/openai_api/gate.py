"""What every request passes on the way in and out: keys, ids, CORS, counting. One policy, every route."""

import asyncio
import functools
import hashlib
import hmac
import logging
import re
import time
import uuid

from sanic import HTTPResponse, Request, Sanic

from openai_api import errors
from openai_api.config import ServerConfig
from openai_api.errors import Refused
from runtime.errors import shown
from runtime.metrics import HttpMetrics

log = logging.getLogger(__name__)
access_log = logging.getLogger("openai_api.access")

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/ping", "/version", "/metrics"})
UNCOUNTED_PATHS = OPEN_PATHS | {"/load"}
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
PREFLIGHT_AGE_S = 600
NEEDS_KEY = "a valid API key is needed: send the header Authorization: Bearer KEY"


class Gate:
    """The policy of one app."""

    def __init__(self, config: ServerConfig, metrics: HttpMetrics):
        self.config, self.metrics = config, metrics
        self.num_open = 0  # requests of the task endpoints, for /load
        self._keys = [_digest(key.encode()) for key in config.api_keys]

    def attach(self, app: Sanic) -> None:
        app.on_request(self.enter, priority=100)
        app.on_response(self.dress, priority=-100)

    async def enter(self, request: Request) -> HTTPResponse | None:
        """Gives the request its id; answers preflights; turns away who has no key."""
        context = request.ctx
        context.began = time.monotonic()
        context.num_bytes_out = 0
        context.is_counted = False
        asked = request.headers.getall("x-request-id", [])
        context.client_id = asked[0] if len(asked) == 1 and REQUEST_ID.fullmatch(asked[0]) else None
        if request.raw_url == b"*":  # stands for a request that could not be read; the refusal of that is the answer
            return None
        if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
            return self._preflight(request)
        if self._keys and request.method != "OPTIONS" and self.path(request) not in OPEN_PATHS:
            if not self._has_key(request):
                error = Refused(NEEDS_KEY, status_code=401, headers={"WWW-Authenticate": "Bearer"})
                self.count(request, 401)
                return errors.handle(request, error)
        return None

    async def dress(self, request: Request, response: HTTPResponse) -> None:
        """Adds the headers that every answer has."""
        if self.config.enable_request_id_headers:
            response.headers["X-Request-Id"] = getattr(request.ctx, "client_id", None) or uuid.uuid4().hex
        if (origin := request.headers.get("origin")) and (allowed := self._origin(origin)):
            response.headers["Access-Control-Allow-Origin"] = allowed
            if allowed != "*":
                response.headers["Vary"] = "Origin"
            if self.config.allow_credentials:
                response.headers["Access-Control-Allow-Credentials"] = "true"
        if request.route is None:  # no handler ran that would count it
            self.count(request, response.status)

    def count(self, request: Request, status: int) -> None:
        """Counts a request and logs its line; the second call for one request does nothing."""
        context = request.ctx
        if getattr(context, "is_counted", False):
            return
        context.is_counted = True
        seconds = time.monotonic() - getattr(context, "began", time.monotonic())
        handler = f"/{request.route.path}" if request.route is not None else "other"
        if handler not in UNCOUNTED_PATHS:
            method = request.method if request.method in METHODS else "other"
            num_bytes_in = getattr(request.stream, "request_bytes", 0) or 0
            self.metrics.on_response(
                method, handler, status, seconds, num_bytes_in, getattr(context, "num_bytes_out", 0)
            )
        if not self.config.disable_access_log:
            access_log.info("%s %s %d %.3fs", shown(request.method, 10), shown(request.path), status, seconds)

    def path(self, request: Request) -> str:
        """The path below --root-path."""
        root = self.config.root_path.rstrip("/")
        path = request.path
        return path[len(root) :] if root and path.startswith(root + "/") else path

    def _has_key(self, request):
        """Compares digests, all of them and in constant time, so that neither length nor order shows."""
        given = request.headers.getall("authorization", [])
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = _digest(key.encode("utf-8", "surrogateescape"))
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return any(matches) and scheme.lower() == "bearer"

    def _origin(self, origin):
        if "*" in self.config.allowed_origins:
            return "*"
        return origin if origin in self.config.allowed_origins else None

    def _preflight(self, request):
        config = self.config
        self.count(request, 200)
        if self._origin(request.headers.get("origin", "")) is None:
            return HTTPResponse("Disallowed CORS origin", 400)
        asked = request.headers.get("access-control-request-headers", "")
        headers = {
            "Access-Control-Allow-Methods": ", ".join(
                ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]
                if "*" in config.allowed_methods
                else config.allowed_methods
            ),
            "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
            "Access-Control-Allow-Headers": asked
            if "*" in config.allowed_headers and asked.isprintable() and asked.isascii()
            else ", ".join(config.allowed_headers),
        }
        return HTTPResponse("OK", 200, headers)


def counted(handler):
    """A route's handler whose outcome is counted once it is over, however it ends."""

    @functools.wraps(handler)
    async def wrapped(request: Request, **kwargs):
        gate: Gate = request.app.ctx.gate
        status = 200
        is_task = gate.path(request) not in UNCOUNTED_PATHS
        gate.num_open += is_task
        try:
            response = await handler(request, **kwargs)
            if response is not None:
                status = response.status
                request.ctx.num_bytes_out += len(response.body or b"")
            return response
        except BaseException as error:
            status = errors.status_of(error)
            raise
        finally:
            gate.num_open -= is_task
            gate.count(request, status)

    return wrapped


def request_id(request: Request, prefix: str, from_body: str | None = None) -> str:
    """What the answer is called: the client's X-Request-Id, or the body's request_id, or a fresh one."""
    return prefix + (getattr(request.ctx, "client_id", None) or from_body or uuid.uuid4().hex)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def watch_writers(streams: set, limit_s: float) -> None:
    """Cuts connections whose reader has taken nothing for limit_s, for as long as the app runs."""
    while True:
        await asyncio.sleep(min(1.0, limit_s / 4))
        now = time.monotonic()
        for stream in list(streams):
            if stream.sending_since is not None and now - stream.sending_since > limit_s:
                log.warning("a reader took nothing for %g s; its connection is cut", limit_s)
                stream.cut()
