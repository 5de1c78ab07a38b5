"""Requests drawn from the API's own document: never a fault of the server, always an answer the document knows."""

import hypothesis
import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import ServerConfig
from runtime.grammar import Compiler, Vocabulary

pytestmark = pytest.mark.slow
NUM_EXAMPLES = 60
UNKNOWN_PART = 501  # what /tokenize answers to a content part of no known type
CONFIG = {
    "dev_mode": True,
    "enable_tokenizer_info_endpoint": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "trust_request_chat_template": True,
}


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine("Hi.")
    tokenizer = engine.tokenizer
    engine.compiler = Compiler(Vocabulary(tokenizer.backend, [tokenizer.eos_token_id], engine.vocab_size))
    server = LiveServer(engine, ServerConfig(**CONFIG))
    yield server
    server.close()
    engine.compiler.close()


@pytest.fixture(scope="module")
def operations(server):
    import schemathesis  # here, as it takes seconds, and every run of other tests reads this file

    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def run(server, operation, mode):
    """Sends NUM_EXAMPLES requests; the same ones each time."""
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi import checks

    checked = list(hypothesis.HealthCheck)
    answers = [checks.content_type_conformance, checks.response_schema_conformance, checks.status_code_conformance]

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=checked)
    @hypothesis.given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    def each(case):
        response = case.call(base_url=server.url)
        assert response.status_code < 500 or response.status_code == UNKNOWN_PART, response.text
        case.validate_response(response, checks=answers)

    each()


ROUTES = [
    "POST /v1/completions", "POST /v1/chat/completions", "POST /invocations", "POST /tokenize", "POST /detokenize",
    "POST /v1/embeddings", "POST /v1/responses", "GET /v1/models", "GET /health", "POST /ping", "GET /load",
    "GET /tokenizer_info", "GET /server_info", "POST /reset_prefix_cache", "POST /sleep", "GET /is_sleeping",
    "GET /v1/responses/{response_id}", "POST /is_scaling_elastic_ep",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("route", ROUTES)
def test_requests_from_the_schema(server, operations, route, mode):
    try:
        run(server, operations[route], mode)
    except hypothesis.errors.Unsatisfiable:
        pytest.skip("a route without fields has no wrong form")
    assert server.engine.num_in_flight == 0
