"""The API's document names every route and field, and what the routes answer is what it says."""

import html
import json
import re

import jsonschema
import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import ServerConfig
from openai_api.openapi import event_data
from openai_api.schema.chat import ChatRequest
from openai_api.schema.completions import CompletionRequest

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
EVERYTHING = {
    "dev_mode": True,
    "enable_tokenizer_info_endpoint": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "enable_prompt_tokens_details": True,
}


@pytest.fixture(scope="module")
def server():
    def script(prompt, params, index):
        return CALL if prompt.text and "call" in prompt.text else "Hello world"

    server = LiveServer(FakeEngine(script), ServerConfig(**EVERYTHING))
    server.engine.num_cached_tokens = 1
    yield server
    server.close()


@pytest.fixture(scope="module")
def document(server):
    return server.client.get("/openapi.json").json()


def check(document, schema, value):
    """Compares a value with a schema of the document; references lead into the document."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_every_route_is_described(server, document):
    for route in server.app.router.routes:
        if "<rest:path>" not in route.path:
            path = re.sub(r"<(\w+):\w+>", r"{\1}", f"/{route.path}")
            assert {method.lower() for method in route.methods} <= document["paths"][path].keys()
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names) and document["openapi"] == "3.1.0"


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_is_described(document, model):
    properties = document["components"]["schemas"][model.__name__]["properties"]
    assert properties.keys() == model.model_fields.keys()
    assert all(field["description"] for field in properties.values())
    assert properties["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def test_schemas_are_schemas(document):
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for ref in re.findall(r'"\$ref": "(.*?)"', json.dumps(document)):
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"]


ASKED = [
    ("POST", "/v1/completions", {"prompt": "a"}),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True}),
    ("POST", "/v1/completions", {"prompt": [1, 2], "prompt_logprobs": 1}),
    ("POST", "/v1/chat/completions", {"messages": USER}),
    ("POST", "/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("POST", "/v1/chat/completions", {"messages": USER, "prompt_logprobs": 1, "n": 2}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "call"}], "tools": [TOOL]}),
    ("POST", "/invocations", {"messages": USER}),
    ("POST", "/invocations", {"prompt": "a"}),
    ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": USER}),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("GET", "/v1/models", None),
    ("GET", "/version", None),
    ("GET", "/load", None),
    ("GET", "/tokenizer_info", None),
    ("GET", "/server_info?config_format=json", None),
    ("GET", "/server_info", None),
    ("GET", "/is_sleeping", None),
    ("GET", "/openapi.json", None),
    ("POST", "/sleep", None),
    ("POST", "/v1/embeddings", {"input": "a"}),
    ("POST", "/v1/completions", {"prompt": "a", "n": 0}),
    ("POST", "/v1/completions", {"prompt": "a", "model": "x"}),
]


@pytest.mark.parametrize("method, path, body", ASKED, ids=str)
def test_an_answer_is_as_described(server, document, method, path, body):
    response = server.client.request(method, path, json=body)
    described = document["paths"][path.partition("?")[0]][method.lower()]["responses"][str(response.status_code)]
    check(document, described["content"]["application/json"]["schema"], response.json())


@pytest.mark.parametrize("path, body", [(path, body) for _, path, body in ASKED[:9] if "prompt_logprobs" not in body])
def test_an_event_is_as_described(server, document, path, body):
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    options = {"include_usage": True, "continuous_usage_stats": "messages" in body}
    *events, done = server.events(path, body | {"stream_options": options})
    assert done == "[DONE]" and len(events) > 2
    for event in events:
        check(document, event_data(content["schema"]), event)


def test_an_error_in_a_stream_is_as_described(serve):
    server = serve()
    server.engine.failure, server.engine.fails_at = RuntimeError("secret"), 2
    document = server.client.get("/openapi.json").json()
    *_, error, done = server.events("/v1/completions", {"prompt": "a"})
    check(document, document["components"]["schemas"]["Error"], error)
    assert done == "[DONE]"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_page_shows_all_of_it_and_fetches_nothing(server, document, path):
    response = server.client.get(path)
    text = response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"<script|<img|<link|src=|url\(|@import|href=\"(?!#|openapi\.json)", text)
    for path in document["paths"]:
        assert f"<code>{html.escape(path)}</code>" in text
    for field in ChatRequest.model_fields:
        assert f"<code>{field}</code>" in text
    shown = set(re.findall(r'href="#(\w+)"', text))
    assert shown <= set(re.findall(r'id="(\w+)"', text))


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_a_flag_takes_the_pages_away(serve, path):
    assert serve(config={"disable_docs": True}).client.get(path).status_code == 404


def test_a_key_is_asked_for_and_said(serve):
    server = serve(config={"api_keys": ["k"]})
    assert server.client.get("/docs").status_code == 401
    document = server.client.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_a_root_path_is_the_documents_server(serve):
    server = serve(config={"root_path": "/llm/"})
    document = server.client.get("/llm/openapi.json").json()
    assert document["servers"] == [{"url": "/llm"}]
    assert not any(path.startswith("/llm") for path in document["paths"])


def test_no_route_lets_the_framework_read_a_body_of_any_size(server):
    assert [route.path for route in server.app.router.routes if not getattr(route.handler, "is_stream", False)] == []
