"""What is odd in a request and still served, and that no field of any type makes a fault of ours."""

import threading

import pytest
from bad_requests import CHAT, COMPLETIONS, DEEP, USER
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api import body
from openai_api.config import ServerConfig


@pytest.fixture(scope="module")
def server():
    server = LiveServer(FakeEngine(max_model_len=64), ServerConfig())
    yield server
    server.close()


def test_a_body_at_the_depth_limit_is_served(server):
    data = DEEP.replace(b"[" * 64, b"[" * 63).replace(b"]" * 64, b"]" * 63)
    response = server.client.post(COMPLETIONS, content=data, headers={"content-type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize("text", ["a\\u0000b", "\\ud83d\\ude00", "\\ufffe", "\\u202eabc", "e" + "\\u0301" * 50])
def test_odd_but_whole_characters_are_served(server, text):
    data = f'{{"prompt": "{text}", "max_tokens": 1, "truncate_prompt_tokens": -1}}'.encode()
    response = server.client.post(COMPLETIONS, content=data, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_json_may_have_parameters_and_any_case(server, kind):
    response = server.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert response.status_code == 200


def test_unknown_fields_are_ignored(server):
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "no_such_field": {"x": 1}}).status_code == 200


def test_every_field_survives_every_json_type(server):
    """No field of any type makes a 500."""
    from openai_api.schema.chat import ChatRequest
    from openai_api.schema.completions import CompletionRequest

    numbers = [-1, -0.0, 1.0, 1.5, 1e300, 2**31, 2**32, 2**63, 2**64, 10**99]
    values = [None, True, *numbers, "", "1", [None], [[]], {"a": 1}]
    for path, model, start in (
        (COMPLETIONS, CompletionRequest, {"prompt": "a", "max_tokens": 1}),
        (CHAT, ChatRequest, {"messages": USER, "max_tokens": 1}),
    ):
        for name in model.model_fields:
            for value in values:
                response = server.post(path, start | {name: value})
                assert response.status_code < 500, (name, value, response.text)


@pytest.mark.parametrize("size, is_beside", [(10, False), (100_000, True)])
def test_a_large_body_is_read_beside_the_event_loop(server, monkeypatch, size, is_beside):
    threads = []
    parse = body.parse
    monkeypatch.setattr(body, "parse", lambda *args: threads.append(threading.current_thread()) or parse(*args))
    assert server.post(COMPLETIONS, {"prompt": "a" * size, "truncate_prompt_tokens": -1}).status_code == 200
    in_loop = server.call(current_thread())
    assert [thread is not in_loop for thread in threads] == [is_beside]


async def current_thread():
    return threading.current_thread()


@pytest.mark.parametrize(
    "path, fields",
    [
        (COMPLETIONS, {"stop_token_ids": ["x"] * 1000}),
        (COMPLETIONS, {"allowed_token_ids": ["x"] * 1000}),
        ("/detokenize", {"tokens": ["x"] * 1000}),
        (CHAT, {"messages": [{}] * 1000}),
        (CHAT, {"tools": [{}] * 100}),
    ],
)
def test_of_many_wrong_items_one_is_told(server, path, fields):
    start = {"messages": USER} if path == CHAT else {"prompt": "a"}
    error = server.post(path, start | fields).json()["error"]
    assert error["code"] == 400 and error["message"].count("'loc'") == 1
