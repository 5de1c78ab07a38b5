"""--middleware: the operator's own code around every request."""

import json
import socket

import pytest
from fake_engine import FakeEngine

from openai_api.app import create_app
from openai_api.config import Limits, ServerConfig
from runtime.errors import ConfigError

BODY = {"prompt": "a", "max_tokens": 50}
PATH = "/v1/completions"
TEXT = "Hello world, this is a test."


@pytest.fixture
def inside(serve):
    """A server inside middleware of tests/support/sample_middleware.py, by name."""

    def start(*names, config=None, **engine):
        paths = [f"sample_middleware.{name}" for name in names]
        return serve(config={"middleware": paths} | (config or {}), **engine)

    return start


def test_a_class_sees_every_answer_and_the_last_is_the_outermost(inside):
    server = inside("Named", "Outer")
    for response in (server.post(PATH, BODY), server.client.get("/health"), server.client.get("/nothing")):
        assert response.headers["x-order"] == "inner;outer;"
    answer = server.post(PATH, BODY)
    assert answer.json()["choices"][0]["text"] == TEXT and int(answer.headers["content-length"]) == len(answer.content)


def test_a_stream_passes_piece_by_piece(inside):
    server = inside("Named", config={"limits": Limits(first_comment_s=0.05)})
    server.engine.gate.clear()
    with server.client.stream("POST", PATH, json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        server.loop.call_soon_threadsafe(server.engine.gate.set)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert response.headers["x-order"] == "inner;"


def test_it_may_answer_in_the_servers_place(inside):
    server = inside("Closed", config={"api_keys": ["k"]})
    refused = server.post(PATH, BODY)
    assert (refused.status_code, refused.text) == (418, "no") and server.engine.seen == []
    assert server.post(PATH, BODY, headers={"x-word": "sesame"}).status_code == 401
    both = {"x-word": "sesame", "authorization": "Bearer k"}
    assert server.post(PATH, BODY, headers=both).status_code == 200
    text = server.client.get("/metrics", headers=both).text
    assert 'http_requests_total{handler="other",method="POST",status="4xx"}' in text


def test_it_is_given_the_request_as_it_came(inside):
    response = inside("Echo").client.post("/a%20b?c=d", content=b"body" * 9)
    assert response.text == "POST /a b /a%20b?c=d " + "body" * 9 + "!"


@pytest.mark.parametrize("name", ["Echo", "Named"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_no_body_is_larger_than_any_may_be(inside, name, is_chunked):
    server = inside(name, config={"limits": Limits(max_body=1000)})
    content = iter([b'{"a": "', b"a" * 5000, b'"}']) if is_chunked else b'{"a": "' + b"a" * 5000 + b'"}'
    response = server.client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413 and "1,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["Broken", "Silent"])
def test_what_fails_in_it_is_an_error_of_the_server(inside, name):
    response = inside(name).post(PATH, BODY)
    error = response.json()["error"]
    assert response.status_code == error["code"] == 500 and "secret" not in error["message"]


def test_a_client_who_leaves_ends_the_request(inside):
    server = inside("Named", script="a" * 400, step_s=0.01)
    body = json.dumps({"prompt": "a", "max_tokens": 400, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(head.encode() + body)
        sock.recv(100)
    server.wait_for(lambda: server.engine.num_in_flight == 0)
    assert len(server.engine.aborted) == 1


def test_a_refusal_before_the_body_sends_no_continue(inside):
    server = inside("Named")
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nExpect: 100-continue\r\n"
        sock.sendall(f"{head}Content-Length: 10\r\n\r\n".encode())
        assert sock.makefile("rb").readline().split()[1] == b"400"


def test_a_function_takes_starlettes_requests(inside):
    pytest.importorskip("starlette")
    server = inside("timed")
    response = server.post(PATH, BODY)
    assert response.headers["x-path"] == PATH and response.json()["choices"][0]["text"] == TEXT
    assert int(response.headers["content-length"]) == len(response.content)
    events = server.events(PATH, BODY)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == TEXT


@pytest.mark.parametrize(
    "path, says",
    [
        ("sample_middleware.Missing", "cannot be imported"),
        ("no_such_module.Thing", "cannot be imported"),
        ("plain", "cannot be imported"),
        ("sample_middleware.NOT_ONE", "is a int; a class or a coroutine function is wanted"),
    ],
)
def test_a_path_that_leads_nowhere_stops_the_start(path, says):
    with pytest.raises(ConfigError, match=says):
        create_app(FakeEngine(), ServerConfig(middleware=[path]))
