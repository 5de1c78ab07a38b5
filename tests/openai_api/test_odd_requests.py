"""What is odd in a request and still served, and that no field of any type makes a fault of ours."""

import pytest
from bad_requests import CHAT, COMPLETIONS, DEEP, USER
from fake_engine import FakeEngine
from live_server import LiveServer

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

    values = [None, True, -1, 2**70, "", "1", [None], {"a": 1}]
    for path, model, start in (
        (COMPLETIONS, CompletionRequest, {"prompt": "a", "max_tokens": 1}),
        (CHAT, ChatRequest, {"messages": USER, "max_tokens": 1}),
    ):
        for name in model.model_fields:
            for value in values:
                response = server.post(path, start | {name: value})
                assert response.status_code < 500, (name, value, response.text)
