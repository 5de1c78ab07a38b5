"""A crowd of clients over HTTP on the real engine: every answer right, nothing left behind, nothing compiled."""

import asyncio
import contextlib
import dataclasses
import json
import random

import httpx
import jsonschema
import openai
import pytest
import tiny

NUM_CLIENTS = 64


@contextlib.asynccontextmanager
async def client_of(server):
    """The official client, closed with all its connections."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        yield openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0)


def wish(number: int) -> dict:
    """One client's request: chat or completions, streamed or not, with settings of its own; always seeded."""
    rng = random.Random(number)
    settings = {
        "max_tokens": rng.randint(2, 24),
        "temperature": rng.choice([0.0, 0.7, 1.3]),
        "top_p": rng.choice([1.0, 0.8]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "seed": number,
        "extra_body": {"top_k": rng.choice([0, 5]), "ignore_eos": True, "min_p": rng.choice([0.0, 0.05])},
    }
    text = " ".join(rng.choice(["one", "two", "three", "four"]) for _ in range(rng.randint(1, 30)))
    if rng.random() < 0.5:
        return {"chat": True, "messages": [{"role": "user", "content": text}]} | settings
    return {"chat": False, "prompt": text} | settings


async def ask(client, wishes: dict, *, stream: bool, leaves: bool = False) -> str | None:
    """The answer's text; None from a client that leaves a long stream after its first piece."""
    wishes = wishes | ({"max_tokens": 50} if leaves else {})
    is_chat = wishes.pop("chat")
    create = client.chat.completions.create if is_chat else client.completions.create
    if not stream:
        answer = (await create(model="tiny", **wishes)).choices[0]
        return answer.message.content if is_chat else answer.text
    pieces, events = [], await create(model="tiny", stream=True, **wishes)
    async for chunk in events:
        if chunk.choices:
            pieces.append((chunk.choices[0].delta.content if is_chat else chunk.choices[0].text) or "")
        if leaves and pieces:
            await events.close()
            return None
    return "".join(pieces)


def gauges(server) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.split("{")[0]: float(value) for name, value in values.items()}


def test_64_mixed_clients_get_the_answers_they_would_get_alone(server):
    async def alone(client):
        return [await ask(client, wish(i), stream=False) for i in range(NUM_CLIENTS)]

    async def crowd(client):
        leavers = {i for i in range(NUM_CLIENTS) if i % 10 == 3}
        return await asyncio.gather(
            *(ask(client, wish(i), stream=i % 2 == 0 or i in leavers, leaves=i in leavers) for i in range(NUM_CLIENTS))
        )

    async def both():
        async with client_of(server) as client:
            return await alone(client), await crowd(client)

    compiled = gauges(server)["runtime:recompiles_total"]  # by other tests of this process
    expected, got = asyncio.run(both())
    assert sum(text is None for text in got) == len(range(3, NUM_CLIENTS, 10))
    assert [text for text in got if text is not None] == [
        text for text, answer in zip(expected, got, strict=True) if answer is not None
    ]
    assert len(set(expected)) > NUM_CLIENTS // 2  # answers differ, so a mix-up would show

    pool = server.engine.engine.scheduler.pool
    server.wait_for(lambda: not server.engine.engine.has_work and server.engine.num_in_flight == 0)
    assert pool.num_used == 0
    seen = gauges(server)
    assert seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0
    assert seen["vllm:kv_cache_usage_perc"] == 0
    assert seen["runtime:recompiles_total"] == compiled


def test_a_json_schema_is_obeyed_beside_other_requests(server):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = {
        "chat": True,
        "messages": [{"role": "user", "content": "one"}],
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    }

    async def run():
        async with client_of(server) as client:
            asked = [ask(client, wanted, stream=False), ask(client, wanted, stream=True)]
            return await asyncio.gather(*asked, *(ask(client, wish(i), stream=True) for i in range(6)))

    whole, streamed, *_ = asyncio.run(run())
    assert whole == streamed
    jsonschema.validate(json.loads(whole), schema)


def test_a_full_queue_turns_requests_away(server, monkeypatch):
    engine = server.engine
    monkeypatch.setattr(engine, "plan", dataclasses.replace(engine.plan, max_queued=0))
    response = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert response.status_code == 429 and response.json()["error"]["type"] == "RateLimitError"
    assert int(response.headers["retry-after"]) >= 1
    monkeypatch.undo()
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wishes",
    [
        {"structured_outputs": {"choice": ["red"]}, "allowed_token_ids": [40, 41]},
        {"allowed_token_ids": [tiny.IM_END], "min_tokens": 3},
    ],
    ids=["constraint", "min_tokens"],
)
def test_wishes_that_leave_no_token_are_the_requests_fault(server, wishes, stream):
    response = server.post("/v1/completions", {"prompt": "a", "seed": 1, "stream": stream} | wishes)
    error = response.json()["error"]
    assert response.status_code == error["code"] == 400 and error["type"] == "BadRequestError"
    assert "after 0 tokens there is none left that this request allows" in error["message"]


@pytest.mark.parametrize("others", ["same", "same-0", "sam"])
def test_a_client_that_leaves_stops_no_request_but_its_own(server, others):
    body = {"prompt": "one two", "max_tokens": 200, "seed": 3, "ignore_eos": True, "stream": True}

    def texts(lines):
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return "".join(part["text"] for chunk in chunks for part in chunk["choices"])

    def opened(request_id):
        return server.client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": request_id})

    with opened("alone") as response:
        expected = texts(response.iter_lines())
    with opened(others) as stays:
        lines = stays.iter_lines()
        first = [next(lines)]
        with opened("same") as leaves:
            next(leaves.iter_lines())
        assert texts([*first, *lines]) == expected
    server.wait_for(lambda: server.engine.num_in_flight == 0)
