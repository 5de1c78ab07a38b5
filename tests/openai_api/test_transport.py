"""Raw bytes: what is not plainly HTTP/1.1 is refused, once, and the connection closed."""

import random
import socket
import time

import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api import transport
from openai_api.config import Limits, ServerConfig

HOST = b"Host: a\r\n"
GET = b"GET /version HTTP/1.1\r\n" + HOST


@pytest.fixture(scope="module")
def server():
    server = LiveServer(FakeEngine(), ServerConfig(limits=Limits(max_connections=40)))
    yield server
    server.close()


def answers(server, data, timeout_s=5.0):
    """Status codes of all the answers until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout_s) as sock:
        sock.sendall(data)
        got = sock.makefile("rb").read()
    return [int(line.split()[1]) for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


def post(*headers, body=b"{}"):
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n" + lines + b"\r\n" + body


BAD = {
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "version": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "no version": b"GET /\r\n\r\n",
    "no path": b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "relative path": b"GET version HTTP/1.1\r\n" + HOST + b"\r\n",
    "no host in the URL": b"GET http:// HTTP/1.1\r\n" + HOST + b"\r\n",
    "other scheme": b"GET file:///version HTTP/1.1\r\n" + HOST + b"\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n",
    "space before colon": GET + b"X-A : b\r\n\r\n",
    "folded": GET + b"X-A: b\r\n c\r\n\r\n",
    "no colon": GET + b"X-A\r\n\r\n",
    "name": GET + "é: b\r\n\r\n".encode(),
    "no host": b"GET /version HTTP/1.1\r\n\r\n",
    "two hosts": GET + HOST + b"\r\n",
    "host with a path": b"GET /version HTTP/1.1\r\nHost: x/?\r\n\r\n",
    "host with a hash": b"GET /version HTTP/1.1\r\nHost: x#\r\n\r\n",
    "both lengths": post(b"Content-Length: 2", b"Transfer-Encoding: chunked"),
    "two lengths": post(b"Content-Length: 2", b"Content-Length: 2"),
    "plus": post(b"Content-Length: +2"),
    "underscore": post(b"Content-Length: 0_2"),
    "negative": post(b"Content-Length: -2"),
    "list": post(b"Content-Length: 2, 2"),
    "hex": post(b"Content-Length: 0x2"),
    "other digits": post("Content-Length: ٢".encode()),
    "other coding": post(b"Transfer-Encoding: gzip, chunked"),
    "identity": post(b"Transfer-Encoding: identity"),
    "chunk size": post(b"Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "short extension": post(b"Transfer-Encoding: chunked", body=b"2;a=b\r\n{}\r\n0\r\n\r\n"),
    "chunk prefix": post(b"Transfer-Encoding: chunked", body=b"0x2\r\n{}\r\n0\r\n\r\n"),
    "chunk extension": post(b"Transfer-Encoding: chunked", body=b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", BAD)
def test_unclear_requests_get_one_400(server, name):
    assert answers(server, BAD[name]) == [400]


@pytest.mark.parametrize("target", [b"//version", b"//a/version", b"//v1/models", b"//"])
def test_a_second_slash_does_not_hide_a_path(server, target):
    assert answers(server, b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n") == [404]


def test_no_url_goes_unanswered(server):
    rng = random.Random(5)
    for _ in range(300):
        target = bytes(rng.choice(b"/:@[]?#%.*ahtps0~|\\^`{") for _ in range(rng.randrange(1, 12)))
        (status,) = answers(server, b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert status in (400, 404), target


@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive\r\n"])
def test_a_stream_over_http_1_0_has_no_chunks_and_ends_the_connection(server, keep):
    body = b'{"prompt": "a", "max_tokens": 3, "stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n" + keep
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        header, _, events = sock.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in header.lower() and b"connection: close" in header.lower()
    *chunks, done, end = events.split(b"\n\n")
    assert len(chunks) == 3 and all(chunk.startswith(b'data: {"id"') for chunk in chunks)
    assert (done, end) == (b"data: [DONE]", b"")


@pytest.mark.parametrize("byte", [*range(0, 9), 11, 12, *range(14, 32), 127])
def test_control_bytes_in_a_value_get_400(server, byte):
    assert answers(server, GET + b"X-A: b" + bytes([byte]) + b"c\r\n\r\n") == [400]


def test_what_follows_a_bad_request_is_no_second_one(server):
    smuggled = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    for bad in (
        post(b"Content-Length : 34", body=smuggled),
        post(b"Content-Length: 0", b"Content-Length: 34", body=smuggled),
    ):
        assert answers(server, bad) == [400]


def test_random_bytes_never_hang_or_crash(server):
    draw = random.Random(0)
    for _ in range(60):
        data = draw.randbytes(draw.randrange(1, 60)) + b"\r\n\r\n"
        assert answers(server, data) == [400]
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("extra, status", [(-1, 200), (0, 431)])
def test_the_header_block_has_a_limit(server, extra, status):
    start = GET + b"Connection: close\r\nX-A: "
    data = start + b"a" * (16384 - len(start) + extra)
    assert answers(server, data + b"\r\n\r\n") == [status]


def test_a_header_without_end_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(GET + b"X-A: ")
        with pytest.raises(OSError):
            for _ in range(10_000):
                sock.sendall(b"a" * 65536)


@pytest.mark.parametrize("num, status", [(98, 200), (99, 431)])
def test_the_number_of_headers_has_a_limit(server, num, status):
    headers = b"".join(b"X-%d: a\r\n" % i for i in range(num))
    assert answers(server, GET + b"Connection: close\r\n" + headers + b"\r\n") == [status]


def test_a_long_url_is_414(server):
    assert answers(server, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n") == [414]


def test_headers_have_the_limits_that_were_set(serve):
    server = serve(config={"limits": Limits(max_headers=5, max_header=300)})
    few, long = b"".join(b"X-%d: a\r\n" % i for i in range(9)), b"X-A: " + b"a" * 400 + b"\r\n"
    for headers, status in ((few, 431), (long, 431), (b"X-A: a\r\n", 200)):
        assert answers(server, GET + b"Connection: close\r\n" + headers + b"\r\n") == [status]
    locked = serve(config={"limits": Limits(max_headers=5), "api_keys": ["k"]})
    assert answers(locked, GET + b"Connection: close\r\n" + few + b"\r\n") == [431]


def test_a_header_that_drips_is_408_however_often_it_drips(serve):
    server = serve(config={"limits": Limits(header_timeout_s=0.3)})
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        began, sent = time.monotonic(), 0
        try:
            for byte in GET * 20:
                sock.sendall(bytes([byte]))
                sent += 1
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - began < 3 and sent < 200


@pytest.mark.parametrize("key, status", [((), 401), ((b"Authorization: Bearer k",), 413)])
def test_no_100_continue_before_a_refusal(serve, key, status):
    server = serve(config={"api_keys": ["k"], "limits": Limits(max_body=100)})
    data = post(*key, b"Expect: 100-continue", b"Content-Length: 5000", body=b"")
    assert answers(server, data) == [status]


def test_100_continue_comes_when_the_body_is_wanted(server):
    body = b'{"prompt": "a", "max_tokens": 1}'
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(post(b"Expect: 100-continue", b"Content-Length: %d" % len(body), b"Connection: close", body=b""))
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert b"HTTP/1.1 200" in sock.makefile("rb").read()


def test_a_refusal_is_readable_by_a_client_that_sends_all_of_a_large_body(serve):
    server = serve(config={"limits": Limits(max_body=1000)})
    response = server.client.post(
        "/v1/completions", content=b"a" * 20_000_000, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413


@pytest.mark.parametrize("coding", [b"Content-Length: 5000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("paths", [[], ["sample_middleware.Outer"]])
def test_a_connection_is_not_said_to_be_kept_that_is_not(serve, coding, paths):
    server = serve(config={"limits": Limits(max_body=100), "middleware": paths})
    body = b"c8\r\n" + b"a" * 200 + b"\r\n" if b"chunked" in coding else b"a" * 200
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(post(coding, body=body))
        header, _, _ = sock.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"HTTP/1.1 413" in header and b"connection: close" in header.lower()


@pytest.mark.parametrize("line", [b"POST /nothing", b"POST /version", b"GET /version"])
def test_a_body_nobody_wants_is_not_waited_for(server, monkeypatch, line):
    monkeypatch.setattr(transport, "LINGER_S", 0.2)
    began = time.monotonic()
    answers(server, line + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n")
    assert time.monotonic() - began < 4


def test_many_tiny_chunks_are_refused(serve):
    server = serve(config={"limits": Limits(max_body_pieces=50)})
    body = b"1\r\n{\r\n" * 60
    assert answers(server, post(b"Transfer-Encoding: chunked", body=body)) == [400]


def test_pipelined_requests_are_answered_in_order(server):
    data = b"".join(b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % p for p in (b"version", b"nothing", b"health"))
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(data + GET + b"Connection: close\r\n\r\n")
        got = sock.makefile("rb").read()
    assert [part.split()[0] for part in got.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200", b"200"]


def test_connections_over_the_limit_are_turned_away(server):
    socks = [socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(60)]
    try:
        server.wait_for(lambda: len(server.client.headers) > 0)
        refused = 0
        for sock in socks:
            sock.settimeout(0.05)
            try:
                refused += sock.recv(100).startswith(b"HTTP/1.1 503")
            except TimeoutError:
                pass
        assert refused >= 19
    finally:
        for sock in socks:
            sock.close()
    server.wait_for(lambda: True)
    assert server.client.get("/health").status_code == 200


def test_an_idle_connection_is_closed_after_its_time(serve):
    server = serve(config={"keep_alive_s": 0.3})
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        for _ in range(2):  # it is kept for a second request, and no longer
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in sock.recv(4096)
        assert sock.recv(4096) == b""
