"""Routes beside OpenAI's: /invocations, those of other tasks, and those for developers."""

import pytest

from openai_api.routes.unsupported import TASKS

USER = [{"role": "user", "content": "Hi"}]
DEVELOPER = [
    ("GET", "/server_info"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
]


@pytest.mark.parametrize(
    "body, kind", [({"messages": USER}, "chat.completion"), ({"prompt": "a", "max_tokens": 5}, "text_completion")]
)
def test_invocations_take_every_form(server, body, kind):
    answer = server.post("/invocations", body).json()
    assert answer["object"] == kind and answer["usage"]["completion_tokens"] > 0
    assert server.events("/invocations", body)[-1] == "[DONE]"


@pytest.mark.parametrize(
    "body, says, param",
    [
        ({}, "Cannot find suitable handler for request. Expected one of: ['ChatRequest', 'CompletionRequest']", None),
        ({"messages": USER, "top_logprobs": -5}, "`top_logprobs` must be a positive value", "top_logprobs"),
        ({"prompt": 3}, "prompt must be text", "prompt"),
        ({"prompt": "a", "n": 0}, "n must be at least 1", "n"),
    ],
)
def test_an_invocation_is_refused_by_the_form_it_has(server, body, says, param):
    response = server.post("/invocations", body)
    error = response.json()["error"]
    assert response.status_code == 400 and says in error["message"] and error["param"] == param


@pytest.mark.parametrize("path", TASKS)
def test_a_task_the_model_does_not_have_is_refused(server, path):
    response = server.post(path, {"input": "a"})
    error = response.json()["error"]
    assert response.status_code == error["code"] == 400 and error["type"] == "BadRequestError"
    assert f"The model does not support {TASKS[path]} API" in error["message"] and server.engine.seen == []


@pytest.mark.parametrize("method, path", DEVELOPER)
def test_developers_routes_are_there_only_when_asked_for(serve, method, path):
    assert serve().client.request(method, path).status_code == 404
    assert serve(config={"dev_mode": True}).client.request(method, path).status_code in (200, 400)


def test_what_developers_see(serve):
    server = serve(config={"dev_mode": True, "api_keys": ["sesame"]})
    server.client.headers["authorization"] = "Bearer sesame"
    info = server.client.get("/server_info?config_format=json").json()["vllm_config"]
    assert info["server"]["dev_mode"] is True and info["server"]["api_keys"] == ["hidden"]
    text = server.client.get("/server_info").json()["vllm_config"]
    assert isinstance(text, str) and "sesame" not in text
    assert server.client.get("/server_info?config_format=xml").status_code == 400
    assert server.client.post("/reset_prefix_cache").status_code == 200 and server.engine.num_resets == 1
    assert server.client.get("/is_sleeping").json() == {"is_sleeping": False}
    error = server.client.post("/sleep?level=1").json()["error"]
    assert error["code"] == 400 and "does not sleep" in error["message"]
