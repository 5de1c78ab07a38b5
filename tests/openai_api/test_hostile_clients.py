"""Clients that mean harm or leave at a bad moment: each hurts only itself."""

import json
import socket

import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import ServerConfig
from openai_api.schema.completions import CompletionFormat

PATH = "/v1/completions"
LONG = "Hello world, this is a test of decoding: the quick brown fox. " * 20
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"]
TARGETS = [
    "/", "//", "/v1", "/v1/", "/v1/completions/", "//v1/completions", "/V1/COMPLETIONS", "/v1/completions/../models",
    "/v1/%63ompletions", "/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd", "/v1/completions%00", "/v1/completions;a=b",
    "/v1/completions?x=1", "/v1/completions#x", "/*", "*", "http://elsewhere/v1/models", "/metrics/../../etc/passwd",
    "/docs/../v1/models", "/%ff%fe", "/v1/models/%0d%0aX-Injected:1", "/health%20", "/?" + "a=b&" * 500,
    "/" + "a/" * 500,
]  # fmt: skip
HOSTS = ["", "x/?", "x#", "x\\y", "x y", "a@b", "[::1", "x:99999999"]


@pytest.fixture(scope="module")
def open_server():
    server = LiveServer(FakeEngine(), ServerConfig())
    yield server
    server.close()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), 10)


def answer(server, data):
    """(status, headers, body) of the one answer to these bytes; the connection then closes."""
    with connect(server) as sock:
        sock.sendall(data)
        head, _, body = sock.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.count(b"HTTP/1.1 ") == 1
    return int(head.split()[1]), head.lower(), body


def request(method, target, *headers, body=b""):
    lines = [f"{method} {target} HTTP/1.1", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def completion(**fields):
    body = json.dumps({"prompt": "a", "max_tokens": 400} | fields).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("method", METHODS)
def test_no_path_is_a_fault_of_ours(open_server, method):
    for target in TARGETS:
        status, head, body = answer(open_server, request(method, target, "Host: a"))
        assert status < 500 and b"x-injected" not in head, target
        if status >= 400 and body:
            error = json.loads(body)["error"]
            assert error["code"] == status and b"content-type: application/json" in head
            assert "root:" not in error["message"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/docs", "/server_info"])
def test_no_host_is_a_way_round_the_key(serve, host, path):
    server = serve(config={"api_keys": ["k"], "dev_mode": True})
    method = "POST" if path == "/tokenize" else "GET"
    assert answer(server, request(method, path, f"Host: {host}"))[0] in (400, 401)


@pytest.mark.parametrize("protocol", ["websocket", "h2c", "TLS/1.0"])
def test_no_other_protocol_is_switched_to(open_server, protocol):
    headers = ["Host: a", f"Upgrade: {protocol}", "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==", "HTTP2-Settings: AAA"]
    status, head, _ = answer(open_server, request("GET", "/version", *headers))
    assert status in (200, 400) and b"upgrade:" not in head


def test_a_hundred_pipelined_requests_get_their_own_answers(open_server):
    bodies = [json.dumps({"prompt": f"nonce {i}"}).encode() for i in range(100)]
    data = b"".join(
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
        for body in bodies
    )
    with connect(open_server) as sock:
        sock.sendall(data + request("GET", "/version", "Host: a"))
        got = sock.makefile("rb").read()
    answers = [json.loads(part.split(b"\r\n\r\n", 1)[1]) for part in got.split(b"HTTP/1.1 200 OK")[1:]]
    encode = open_server.engine.tokenizer.encode
    assert [found["tokens"] for found in answers[:-1]] == [encode(f"nonce {i}") for i in range(100)]


@pytest.mark.parametrize("stream", [False, True])
def test_who_closes_one_half_is_gone(serve, stream):
    server = serve(LONG, step_s=0.01)
    with connect(server) as sock:
        sock.sendall(completion(stream=stream))
        server.wait_for(lambda: server.engine.num_in_flight == 1)
        sock.shutdown(socket.SHUT_WR)
        server.wait_for(lambda: server.engine.num_in_flight == 0)
    assert len(server.engine.aborted) == 1


def test_who_leaves_is_counted_as_such(serve, caplog):
    caplog.set_level("INFO", logger="openai_api.access")
    server = serve(LONG, step_s=0.01)
    with connect(server) as sock:
        sock.sendall(completion())
        server.wait_for(lambda: server.engine.num_in_flight == 1)
    server.wait_for(lambda: caplog.records)
    assert [record.getMessage().split()[2] for record in caplog.records] == ["499"]
    text = server.client.get("/metrics").text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0' in text


def test_two_hundred_streams_that_end_at_once_leave_nothing(serve):
    server = serve(LONG, step_s=0.02)
    socks = [connect(server) for _ in range(200)]
    for sock in socks:
        sock.sendall(completion(stream=True))
    server.wait_for(lambda: server.engine.num_in_flight == 200)
    for sock in socks:
        sock.close()
    server.wait_for(lambda: server.engine.num_in_flight == 0 and not server.app.ctx.streams)
    assert len(server.engine.aborted) == 200 and server.app.ctx.gate.num_open == 0


def test_a_fault_while_one_stream_is_written_ends_that_one(serve, monkeypatch):
    server = serve()
    chunk = CompletionFormat._chunk

    def faulty(self, index, choice, output):
        if self.body.user == "unlucky" and len(choice.texts) == 2:
            raise KeyError("/secret/path")
        return chunk(self, index, choice, output)

    monkeypatch.setattr(CompletionFormat, "_chunk", faulty)
    *_, error, done = server.events(PATH, {"prompt": "a", "user": "unlucky"})
    assert error["error"]["code"] == 500 and "secret" not in error["error"]["message"] and done == "[DONE]"
    lucky = server.events(PATH, {"prompt": "a", "max_tokens": 50})
    assert "".join(part["choices"][0]["text"] for part in lucky[:-1]) == "Hello world, this is a test."
    server.wait_for(lambda: server.engine.num_in_flight == 0)


@pytest.mark.parametrize("field", ["prompt", "stop", "user", "request_id", "cache_salt", "guided_regex", "model"])
def test_odd_characters_in_any_text_are_no_fault_of_ours(open_server, field):
    for text in ("\0", "\ufffe", "e" + "\u0301" * 500, "\u202eabc", "🙂" * 200, "\x1b[31m", "\r\nX-A: b", "\u2028"):
        response = open_server.post(PATH, {"prompt": "a", "max_tokens": 2, field: text})
        assert response.status_code < 500 and "x-a" not in response.headers
        response.content.decode()
