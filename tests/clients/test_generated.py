"""A client generated from /openapi.json: openapi-python-client, https://github.com/openapi-generators."""

import importlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.clients
MESSAGE = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def generated(server, tmp_path_factory):
    """(the package, a client of it)."""
    home = tmp_path_factory.mktemp("generated")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command += ["--url", f"{server.root}/openapi.json", "--output-path", str(home / "our_client")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stdout, done.stdout + done.stderr
    sys.path.insert(0, str(home))
    yield importlib.import_module("our_client").Client(base_url=server.root, timeout=60)
    sys.path.remove(str(home))


def operation(name):
    return importlib.import_module(f"our_client.api.default.{name}")


def model(name):
    return getattr(importlib.import_module("our_client.models"), name)


def test_a_chat(generated, server):
    wanted = {"model": server.model, "messages": [MESSAGE], "max_tokens": 8, "seed": 1, "logprobs": True}
    answer = operation("post_v1_chat_completions").sync(client=generated, body=model("ChatRequest").from_dict(wanted))
    assert isinstance(answer, model("ChatCompletion")) and answer.usage.completion_tokens <= 8
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and len(choice.logprobs.content) == answer.usage.completion_tokens


def test_a_completion(generated, server):
    body = model("CompletionRequest")(model=server.model, prompt=["a", "b"], max_tokens=4, echo=True, logprobs=2)
    answer = operation("post_v1_completions").sync(client=generated, body=body)
    assert isinstance(answer, model("Completion")) and [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("b") and answer.choices[0].logprobs.token_logprobs[0] is None


def test_a_refusal_is_an_object_of_its_own(generated):
    body = model("CompletionRequest")(prompt="a", temperature=-1.0)
    refused = operation("post_v1_completions").sync(client=generated, body=body)
    assert isinstance(refused, model("Error")) and refused.error.param == "temperature" and refused.error.code == 400


def test_the_routes_around_it(generated, server):
    assert [card.id for card in operation("get_v1_models").sync(client=generated).data] == [server.model]
    tokens = operation("post_tokenize").sync(client=generated, body=model("TokenizeText")(prompt="Hello"))
    text = operation("post_detokenize").sync(client=generated, body=model("DetokenizeRequest")(tokens=tokens.tokens))
    assert text.prompt == "Hello" and tokens.count == len(tokens.tokens)
