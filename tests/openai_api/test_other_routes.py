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
    ("POST", "/collective_rpc"),
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
    response = server.post(path.replace("<response_id:str>", "resp_1"), {"input": "a"})
    error = response.json()["error"]
    assert response.status_code == error["code"] == 400 and error["type"] == "BadRequestError"
    assert f"The model does not support {TASKS[path]} API" in error["message"] and server.engine.seen == []


@pytest.mark.parametrize("method, path", DEVELOPER)
def test_developers_routes_are_there_only_when_asked_for(serve, method, path):
    assert serve().client.request(method, path).status_code == 404
    assert serve(config={"dev_mode": True}).client.request(method, path).status_code in (200, 400)


@pytest.mark.parametrize("body", [b"", b"{}", b"a" * 100_000])
def test_a_body_that_nobody_wants_is_read_and_left(server, caplog, body):
    for _ in range(2):
        assert server.client.post("/ping", content=body).status_code == 200
    assert server.client.request("GET", "/v1/models", content=body).status_code == 200
    assert "not consumed" not in caplog.text


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


def test_engines_are_not_added_while_it_runs(server):
    assert server.client.post("/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}
    refused = server.post("/scale_elastic_ep", {"new_data_parallel_size": 2})
    assert refused.status_code == 400 and "start more servers" in refused.json()["error"]["message"]
    lost = server.client.get("/v1/responses/resp_1")
    assert lost.status_code == 400 and "Responses API" in lost.json()["error"]["message"]


def test_a_trace_is_begun_and_ended_by_hand(serve, tmp_path):
    assert serve().client.post("/start_profile").status_code == 404
    server = serve(config={"profile_dir": str(tmp_path)})

    def status(path):
        return server.client.post(path, timeout=60).status_code

    assert status("/stop_profile") == 400
    assert status("/start_profile") == 200 and status("/start_profile") == 400
    assert status("/stop_profile") == 200 and status("/stop_profile") == 400
    assert list(tmp_path.rglob("*.xplane.pb"))
