"""The chat template of a model folder is data from outside: it runs in a process that is killed at its limits."""

import concurrent.futures

import httpx
import pytest

USER = [{"role": "user", "content": "Hi"}]
GOOD = "<|im_start|>{{ messages[-1].content }}{% if messages[-1].content == 'loop' %}"
ENDLESS = GOOD + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
HUNGRY = (
    GOOD + "{% set ns = namespace(x='a' * 9) %}{% for i in range(99) %}{% set ns.x = ns.x * 9 %}{% endfor %}{% endif %}"
)


def ask(server, content="Hi", **fields):
    return server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})


@pytest.fixture
def untrusted(serve):
    def start(template, **limits):
        config = {"trust_model_template": False}
        if limits:
            from openai_api.config import Limits

            config["limits"] = Limits(**limits)
        return serve(chat_template=template, config=config)

    return start


def test_the_prompt_is_the_same_as_in_the_servers_process(untrusted, serve):
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
    template = "{{ messages | tojson }}{{ tools | tojson }}{{ bos_token }}{{ x }}{{ add_generation_prompt }}"
    fields = {"tools": tools, "tool_choice": "none", "chat_template_kwargs": {"x": [1, None]}}
    prompts = []
    for server in (untrusted(template), serve(chat_template=template)):
        assert ask(server, "Hi \U0001f642<|im_end|>", **fields).status_code == 200
        prompts.append(server.engine.seen[0][0])
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "template, says", [(ENDLESS, "ran longer than 0.5 s"), (HUNGRY, "Memory"), ("{{ raise_exception('no') }}", "no")]
)
def test_a_bad_template_costs_one_process(untrusted, template, says):
    server = untrusted(template, model_template_timeout_s=0.5 if template == ENDLESS else 20.0)
    error = ask(server, "loop").json()["error"]
    assert error["code"] == 400 and error["param"] == "messages" and says in error["message"]
    if "loop" in template:
        assert ask(server).status_code == 200


def test_others_go_on_while_a_template_loops(untrusted):
    server = untrusted(ENDLESS, model_template_timeout_s=1.0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stuck = pool.submit(ask, server, "loop")
        assert ask(server).status_code == 200 and server.post("/v1/completions", {"prompt": "a"}).status_code == 200
        assert stuck.result().status_code == 400


def test_a_worker_is_there_before_the_first_chat(untrusted):
    server = untrusted(GOOD + "{% endif %}")
    server.wait_for(lambda: server.app.ctx.opening.done())
    (worker,) = server.app.ctx.chat._models_workers._idle
    assert ask(server).status_code == 200
    assert server.app.ctx.chat._models_workers._idle == [worker]


def test_no_worker_is_left_behind(untrusted):
    server = untrusted(GOOD + "{% endif %}")
    ask(server)
    workers = list(server.app.ctx.chat._models_workers._idle)
    server.call(server.app.ctx.chat.close())
    assert workers and not any(worker.is_alive for worker in workers)


def test_a_worker_that_was_killed_is_replaced(untrusted):
    server = untrusted(GOOD + "{% endif %}")
    ask(server)
    for worker in server.app.ctx.chat._models_workers._idle:
        worker.kill()
        server.wait_for(lambda worker=worker: not worker.is_alive)
    assert ask(server).status_code == 200


def test_who_leaves_takes_the_worker_along(untrusted):
    server = untrusted(ENDLESS, model_template_timeout_s=60.0)
    workers = server.app.ctx.chat._models_workers
    server.wait_for(lambda: server.app.ctx.opening.done())
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "loop"}]}, timeout=0.3
        )
    server.wait_for(lambda: not workers._busy)
    assert ask(server).status_code == 200


def test_closing_does_not_wait_for_a_template(untrusted):
    server = untrusted(ENDLESS, model_template_timeout_s=600.0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stuck = pool.submit(ask, server, "loop")
        server.wait_for(lambda: server.app.ctx.chat._models_workers._busy and server.app.ctx.opening.done())
        server.call(server.app.ctx.chat.close())
        assert stuck.result().status_code == 400
