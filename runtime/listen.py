"""The listening socket, taken before anything slow, and what answers on it until the server does.

While the model loads, the Doorman answers: liveness 200, everything else 503 with Retry-After.
"""

import asyncio
import errno
import json
import os
import socket
import ssl
import stat
from typing import Any

from runtime.errors import ConfigError

BACKLOG = 1024
HEADER_LIMIT = 16 * 1024
DOORMAN_TIMEOUT_S = 10.0


def bind(host: str | None, port: int, uds: str | None = None) -> socket.socket:
    """A listening socket: from here on nobody else can have the address.

    Args:
        host: a name or an address; None or "" is every IPv4 interface.
        port: 0 takes any free one.
        uds: path of a Unix socket, which then stands in for host and port.

    Raises:
        ConfigError: the address cannot be had; the message says why.
    """
    if uds:
        return _bind_unix(uds)
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} is not a port; choose one from 1 to 65535, or 0 for any free one")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host {host} is not an address of this machine; leave it out for all") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_why(error, host, port)) from None
    return listener


def _why(error: OSError, host: str | None, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; stop the server that has it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is not an address of this machine; leave it out for all"
    return f"cannot listen on {host or '0.0.0.0'}:{port}: {error.strerror}; choose others with --host and --port"


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            _remove_stale(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--uds {path}: {error.strerror or error}; name a path in a folder you can write") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Removes a socket that a killed server left; never anything else."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigError(f"--uds {path} exists and is no socket; name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) == 0:
            raise ConfigError(f"--uds {path} is in use; stop the server that has it, or name another path")
    os.unlink(path)


def url(listener: socket.socket, secure: bool) -> str:
    """An address that works from this machine."""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host, port = address[:2]
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if secure else 'http'}://{host}:{port}"


def tls(
    certfile: str | None, keyfile: str | None, ca_certs: str | None = None, cert_reqs: int = 0
) -> ssl.SSLContext | None:
    """The TLS context of these files; None without a certificate.

    Raises:
        ConfigError: a file is missing or is not what its flag says.
    """
    if not certfile:
        if keyfile or ca_certs:
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return None
    if cert_reqs not in (0, 1, 2):
        raise ConfigError(f"--ssl-cert-reqs {cert_reqs} is not known; 0 asks for none, 1 may, 2 must be shown")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile)
        if ca_certs:
            context.load_verify_locations(ca_certs)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or getattr(error, "reason", None) or "not PEM"
        raise ConfigError(f"the TLS files cannot be used ({reason}); see --ssl-certfile and --ssl-keyfile") from None
    context.verify_mode = ssl.VerifyMode(cert_reqs)
    return context


class Doorman(asyncio.Protocol):
    """Answers one request a connection, without looking further than its first line."""

    alive = (b"GET /live ", b"GET /live?", b"HEAD /live ")

    seen: bytes | None = b""

    def connection_made(self, transport: Any):  # uvloop's transports are not asyncio's by class
        self.transport = transport
        self.timer = asyncio.get_running_loop().call_later(DOORMAN_TIMEOUT_S, transport.abort)

    def data_received(self, data):
        if self.seen is None:
            return
        self.seen += data
        if b"\r\n\r\n" in self.seen or len(self.seen) > HEADER_LIMIT:
            self.transport.write(self.answer(self.seen))
            self.seen = None
            self.timer.cancel()
            # What the client still sends is read and dropped, or it would see a reset in place of the answer.
            self.timer = asyncio.get_running_loop().call_later(1.0, self.transport.close)

    def connection_lost(self, exc):
        self.timer.cancel()

    @classmethod
    def answer(cls, request: bytes) -> bytes:
        if request.startswith(cls.alive):
            status, body = "200 OK", b""
        else:
            message = "the server is starting: the model is being loaded; try again shortly"
            error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
            status, body = "503 Service Unavailable", json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return (head + "Retry-After: 5\r\nConnection: close\r\n\r\n").encode() + body
