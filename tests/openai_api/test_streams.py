"""Streams and waits: who leaves is forgotten, errors arrive, slow readers do no harm."""

import dataclasses
import json
import socket
import sys
import time

import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import Limits, ServerConfig
from runtime.errors import DeadlinePassed, NotReady, StepFailed

PATH = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
LOGPROBS = {"messages": [USER], "logprobs": True, "top_logprobs": 20}
LONG = "Hello world, this is a test of decoding: the quick brown fox. " * 20


def limited(**limits):
    return {"limits": Limits(**limits)}


def message(body, path=PATH):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def raw(server, body, path=PATH):
    """A connection that has sent a request."""
    sock = socket.create_connection(("127.0.0.1", server.port), 10)
    sock.sendall(message(body, path))
    return sock


@pytest.mark.parametrize(
    "body", [{}, {"stream": True}, {"prompt": ["a", "b", "c"]}, {"prompt": ["a", "b"], "stream": True}]
)
@pytest.mark.parametrize("begun", [False, True])
def test_who_leaves_is_aborted(serve, body, begun):
    server = serve(LONG, step_s=0.01)
    body = {"prompt": "a", "max_tokens": 400} | body
    if not begun:
        server.engine.gate.clear()
    sock = raw(server, body)
    num = len(body["prompt"]) if isinstance(body["prompt"], list) else 1
    server.wait_for(lambda: server.engine.num_in_flight == num)
    if begun and body.get("stream"):
        assert b"200 OK" in sock.recv(200)
    sock.close()
    server.wait_for(lambda: server.engine.num_in_flight == 0)
    assert len(server.engine.aborted) == num and server.app.ctx.gate.num_open == 0
    assert not server.app.ctx.streams


def test_an_event_is_one_line_for_every_reader_of_lines(serve):
    script = "a\u0085b\u2028c\u2029d\x1ee\r\n–"
    with serve(script).client.stream("POST", PATH, json={"prompt": "a", "max_tokens": 99, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]  # str.splitlines: it knows ten ends of a line
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == script


def test_the_others_are_aborted_when_one_prompt_fails(serve):
    server = serve(step_s=0.005)

    def script(prompt, params, index):
        if prompt.text == "b":
            raise StepFailed("the step failed")
        return LONG

    server.engine.script = script
    response = server.post(PATH, {"prompt": ["a", "b", "c"], "max_tokens": 400})
    assert response.status_code == 500
    server.wait_for(lambda: server.engine.num_in_flight == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error, status, kind",
    [
        (StepFailed("the step failed"), 500, "Internal Server Error"),
        (NotReady("draining", 7.2), 503, "ServiceUnavailableError"),
        (DeadlinePassed("too slow"), 504, "TimeoutError"),
        (RuntimeError("/secret/path"), 500, "Internal Server Error"),
    ],
)
def test_an_early_error_is_a_status(serve, error, status, kind, stream):
    server = serve()
    server.engine.failure = error
    response = server.post(PATH, {"prompt": "a", "stream": stream})
    got = response.json()["error"]
    assert response.status_code == got["code"] == status and got["type"] == kind and "secret" not in got["message"]
    assert response.headers.get("retry-after") == ("8" if status == 503 else None)


def test_a_full_queue_says_when_to_come_back(serve):
    server = serve()
    server.engine.is_full = True
    for stream in (False, True):
        response = server.post(PATH, {"prompt": "a", "stream": stream})
        assert response.status_code == 429 and response.headers["retry-after"] == "3"
        assert response.json()["error"]["type"] == "RateLimitError"


def test_a_late_error_is_the_last_event(serve):
    server = serve()
    server.engine.failure, server.engine.fails_at = StepFailed("the step failed"), 2
    *chunks, error, done = server.events(PATH, {"prompt": "a"})
    assert len(chunks) == 2 and done == "[DONE]"
    assert error == {
        "error": {"message": "the step failed", "type": "Internal Server Error", "param": None, "code": 500}
    }


def test_comments_come_while_there_is_nothing_to_say(serve):
    server = serve(config=limited(first_comment_s=0.05))
    server.engine.gate.clear()
    with raw(server, {"prompt": "a", "stream": True}) as sock:
        got = b""
        while got.count(b": keep-alive\n\n") < 2:
            got += sock.recv(1000)
        assert got.startswith(b"HTTP/1.1 200 OK")
        server.loop.call_soon_threadsafe(server.engine.gate.set)
        while b"[DONE]" not in got:
            got += sock.recv(1000)
    assert b"event" not in got.split(b"\r\n\r\n", 1)[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_at_its_deadline(serve, stream):
    server = serve(LONG, config=limited(request_timeout_s=0.2), step_s=0.01)
    if stream:
        *_, error, done = server.events(PATH, {"prompt": "a", "max_tokens": 400})
        assert error["error"]["code"] == 504 and done == "[DONE]"
    else:
        assert server.post(PATH, {"prompt": "a", "max_tokens": 400}).status_code == 504
    server.wait_for(lambda: server.engine.num_in_flight == 0)
    assert server.engine.aborted


@pytest.mark.parametrize("path, body", [(PATH, {"prompt": "a", "logprobs": 20}), ("/v1/chat/completions", LOGPROBS)])
def test_a_reader_that_takes_nothing_is_cut(serve, path, body):
    """And nothing is left to the garbage collector: until its turn came, the request would hold its pages."""
    server = serve(lambda *_: "a" * 5000, config=limited(stalled_writer_s=0.4), max_model_len=6000)
    left = []

    async def watch():
        sys.set_asyncgen_hooks(finalizer=left.append)

    server.call(watch())
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(message(body | {"max_tokens": 5000, "stream": True, "n": 4}, path))
    server.wait_for(lambda: server.engine.num_in_flight == 1)
    server.wait_for(lambda: server.engine.num_in_flight == 0 or left)
    assert len(server.engine.aborted) == 1 and left == []
    sock.close()


def test_many_streams_at_once_each_get_their_own(serve):
    server = serve(lambda prompt, params, index: (prompt.text + " ") * 20)
    socks = [raw(server, {"prompt": f"fox{i}", "max_tokens": 300, "stream": True}) for i in range(20)]
    for i, sock in enumerate(socks):
        got = b""
        while b"[DONE]" not in got:
            got += sock.recv(65536)
        chunks = [json.loads(line[6:]) for line in got.splitlines() if line.startswith(b"data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f"fox{i} " * 20
        sock.close()


@pytest.fixture(scope="module")
def small():
    limits = dataclasses.replace(Limits(), max_body=1000, body_timeout_s=0.3)
    server = LiveServer(FakeEngine(), ServerConfig(limits=limits))
    yield server
    server.close()


def test_a_declared_size_over_the_limit_is_refused_unread(small):
    response = small.client.post(PATH, content=b'{"prompt": "' + b"a" * 5000 + b'"}', headers=JSON)
    assert response.status_code == 413 and "1,000 bytes" in response.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", small.port), 5) as sock:
        sock.sendall(HEAD + b"Content-Length: 5000\r\n\r\n")
        assert sock.makefile("rb").readline().split()[1] == b"413"


JSON = {"content-type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def test_a_chunked_body_is_refused_once_it_is_too_large(small):
    with socket.create_connection(("127.0.0.1", small.port), 5) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n")
        sock.sendall(b"200\r\n" + b"a" * 512 + b"\r\n")
        assert sock.makefile("rb").readline().split()[1] == b"413"


@pytest.mark.parametrize("sent", [b"", b'{"prompt": "a"'])
def test_a_body_that_stalls_is_refused_and_the_socket_closed(small, sent):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", small.port), 5) as sock:
        sock.sendall(HEAD + b"Content-Length: 15\r\n\r\n" + sent)
        answer = sock.makefile("rb").read()  # until it is closed
    assert answer.split()[1] == b"408" and 0.2 < time.monotonic() - began < 5
