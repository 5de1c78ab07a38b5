"""Documented fields that other files do not look at, one claim each."""

import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import ServerConfig
from openai_api.readers import Readers
from openai_api.schema import sampling
from openai_api.schema.chat import ChatRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server():
    server = LiveServer(FakeEngine(), ServerConfig())
    yield server
    server.close()


def test_fields_that_nothing_reads_are_said_once(server, caplog):
    sampling._say_unused.cache_clear()
    for _ in range(3):
        body = {"prompt": "a", "max_tokens": 1, "kv_transfer_params": {"a": 1}, "vllm_xargs": {"x": 1, "y": "z"}}
        assert server.post(COMPLETIONS, body).status_code == 200
    for name in ("kv_transfer_params", "vllm_xargs"):
        assert caplog.text.count(f"{name} is ignored") == 1


@pytest.mark.parametrize(
    "fields, most", [({}, None), ({"parallel_tool_calls": False}, 1), ({"parallel_tool_calls": True}, None)]
)
def test_parallel_tool_calls_false_holds_a_required_choice_to_one_call(fields, most):
    tool = {"type": "function", "function": {"name": "f"}}
    body = ChatRequest(messages=USER, tools=[tool], tool_choice="required", **fields)
    assert Readers(body, ServerConfig(), "").tool_schema().get("maxItems") == most
