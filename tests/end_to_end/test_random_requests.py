"""Valid requests drawn from the whole schema, in crowds: none fails, none compiles, and seeded answers come again.

Each seeded answer is asked for once more, alone and in the other way (streamed or whole), and must be the same.
"""

import asyncio
import json

import httpx
import pytest
import random_requests
from random_requests import Drawn

from openai_api.schema.chat import ChatRequest
from openai_api.schema.completions import CompletionRequest

CROWD = 24
# What tool_choice "required" asks for and does not fit is refused when it is whole, and ends early in a stream.
CUT: dict = {"choices": {"cut": True}, "num_prompt": None}
CLOSE = 1e-4  # float32 logprobs of the same tokens, computed in steps of other sizes


def test_every_field_is_drawn():
    drawn = [random_requests.draw(number) for number in range(1000)]
    for model, is_chat in ((ChatRequest, True), (CompletionRequest, False)):
        seen = set().union(*(d.body for d in drawn if d.is_chat == is_chat))
        assert model.model_fields.keys() - seen == set()
        refused = {name for d in drawn for name in random_requests.NULL_ONLY if d.body.get(name) is not None}
        assert not refused


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_requests_succeed_and_seeded_ones_repeat(server, count):
    drawn = [random_requests.draw(number) for number in range(count)]

    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
            room = asyncio.Semaphore(CROWD)

            async def ask_in_crowd(one):
                async with room:
                    return await ask(client, one)

            crowd = await asyncio.gather(*map(ask_in_crowd, drawn))
            alone = {i: await ask(client, one.flipped()) for i, one in enumerate(drawn) if one.is_seeded}
            return crowd, alone

    before = server.engine.engine.num_recompiles  # of a server that other tests of this process share
    crowd, alone = asyncio.run(run())
    failed = {i: (answer, drawn[i].body) for i, answer in enumerate(crowd) if isinstance(answer, str)}
    assert not failed, f"{len(failed)} of {count} failed; the first: {next(iter(failed.items()))}"
    differing = {i: where for i, answer in alone.items() if (where := difference(crowd[i], answer))}
    assert not differing, f"{differing} of {len(alone)} differ; the first: {drawn[next(iter(differing))].body}"
    assert len(alone) > count // 2
    engine = server.engine.engine
    server.wait_for(lambda: not engine.has_work and server.engine.num_in_flight == 0)
    assert engine.scheduler.pool.num_used == 0
    assert engine.num_recompiles == before


async def ask(client, one: Drawn) -> dict | str:
    """The answer in one form, whether it was streamed or not; a string says how it failed."""
    response = await client.post(one.path, json=one.body)
    if response.status_code == 400 and one.body.get("tool_choice") == "required" and "was cut before" in response.text:
        return CUT
    if response.status_code != 200:
        return f"{response.status_code}: {response.text}"
    if not one.body.get("stream"):
        return whole(response.json(), one)
    blocks = [block for block in response.text.split("\n\n") if block.startswith("data: ")]
    if not blocks or blocks[-1] != "data: [DONE]":
        return f"the stream has no end: {response.text[-300:]}"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    if error := next((chunk for chunk in chunks if "error" in chunk), None):
        return f"in the stream: {error}"
    if not one.is_chat and one.body.get("use_beam_search"):
        return whole(chunks[0], one)
    return gathered(chunks, one)


def whole(answer: dict, one: Drawn) -> dict:
    """What must come again of an answer that came at once."""
    choices = {}
    for choice in answer["choices"]:
        found = {name: choice[name] for name in ("finish_reason", "stop_reason", "token_ids", "logprobs")}
        if one.is_chat:
            message = choice["message"]
            found["text"] = message["content"] or ""
            found["calls"] = [call["function"] for call in message["tool_calls"]]
        else:
            found["text"] = choice["text"]
            found["prompt_token_ids"] = choice["prompt_token_ids"]
        choices[choice["index"]] = found
    return {"choices": choices, "num_prompt": answer["usage"]["prompt_tokens"]}


def gathered(chunks: list[dict], one: Drawn) -> dict:
    """The same from a stream."""
    choices, num_prompt = {}, None
    for chunk in chunks:
        num_prompt = (chunk.get("usage") or {}).get("prompt_tokens", num_prompt)
        for part in chunk["choices"]:
            found = choices.setdefault(part["index"], {"token_ids": None, "logprobs": None, "text": ""})
            if one.is_chat:
                found.setdefault("calls", [])
                add_delta(found, part["delta"])
            else:
                found["text"] += part["text"]
                found["prompt_token_ids"] = part["prompt_token_ids"] or found.get("prompt_token_ids")
            if part.get("token_ids") is not None:
                found["token_ids"] = (found["token_ids"] or []) + part["token_ids"]
            if part.get("logprobs") is not None:
                before = found["logprobs"] or {name: [] for name in part["logprobs"]}
                found["logprobs"] = {name: before[name] + more for name, more in part["logprobs"].items()}
            if part["finish_reason"] is not None:
                assert "finish_reason" not in found, "two ends"
                found["finish_reason"], found["stop_reason"] = part["finish_reason"], part["stop_reason"]
    if one.body.get("tool_choice") == "required" and any(c["finish_reason"] != "tool_calls" for c in choices.values()):
        return CUT
    return {"choices": choices, "num_prompt": num_prompt}


def add_delta(found: dict, delta: dict) -> None:
    found["text"] += delta.get("content") or ""
    for call in delta.get("tool_calls", ()):
        if "id" in call:
            found["calls"].append({"name": call["function"]["name"], "arguments": ""})
        found["calls"][call["index"]]["arguments"] += call["function"]["arguments"]


def difference(one, other, where: str = "") -> str | None:
    """Where two answers part; floats may be CLOSE, and what a stream did not tell is left out."""
    if isinstance(one, float) and isinstance(other, float):
        return None if abs(one - other) < CLOSE else f"{where}: {one} and {other}"
    if isinstance(one, dict) and isinstance(other, dict):
        if where == "" and None in (one["num_prompt"], other["num_prompt"]):
            one, other = one["choices"], other["choices"]
        if one.keys() != other.keys():
            return f"{where}: {sorted(one)} and {sorted(other)}"
        found = (difference(one[key], other[key], f"{where}.{key}") for key in one)
        return next((place for place in found if place), None)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where}: {one} and {other}"
        found = (difference(a, b, f"{where}.{i}") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next((place for place in found if place), None)
    return None if one == other else f"{where}: {one!r} and {other!r}"
