"""Constraints drawn at random, over HTTP, in crowds of every other setting: what comes out fits.

Whether it fits is for jsonschema, re and lark to say. A text that max_tokens cut off is not broken, but has to be rare.
Of one that a stop string cut off, the whole is known: it is the same seeded request without that string.
"""

import asyncio
import collections
import json
import random
import re

import httpx
import pytest
import random_constraints

CROWD = 24
NUM_TOKENS = 400
FEW, ALL = 25, 200


@pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["json", "regex", "choice", "grammar"])
def test_random_constraints_are_obeyed(server, kind, count):
    drawn = [random_constraints.draw(kind, number) for number in range(count)]
    before = server.engine.engine.num_recompiles  # of a server that other tests of this process share

    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
            room = asyncio.Semaphore(CROWD)

            async def one(number):
                async with room:
                    choices = await ask(client, drawn[number], number)
                    if number % 4 == 0 and choices[0][1] == "stop" and choices[0][0]:
                        await check_stop(client, drawn[number], number, choices)
                    return choices

            return await asyncio.gather(*map(one, range(count)))

    tally: collections.Counter = collections.Counter()
    for one, choices in zip(drawn, asyncio.run(run()), strict=True):
        for text, finish, stop in choices:
            tally[finish] += 1
            assert finish == "length" or one.accepts(text), f"{text!r} ({stop}) does not fit {kind} {one.value!r}"
    print(f"{kind}: {tally['stop']} ended by themselves, {tally['length']} were cut off by max_tokens")
    assert tally["length"] < tally["stop"] / 10
    assert server.engine.engine.num_recompiles == before


async def check_stop(client, drawn, number, choices) -> None:
    """With a stop string out of the first choice's text, every choice ends where that comes."""
    whole = choices[0][0]
    start = random.Random(number).randrange(len(whole))
    stop = whole[start : start + 2]
    for (text, finish, reason), cut in zip(choices, await ask(client, drawn, number, stop), strict=True):
        expected = (text[: text.index(stop)], "stop", stop) if stop in text else (text, finish, reason)
        assert cut == expected, (drawn.value, text)


async def ask(client, drawn, number: int, stop: str = "\u2603") -> list[tuple[str, str, object]]:
    """(text, finish_reason, stop_reason) of each choice; settings come from the number."""
    rng = random.Random(number)
    body: dict = {"max_tokens": NUM_TOKENS, "seed": number, "temperature": rng.choice([0.7, 1.0, 1.3])}
    if rng.random() < 0.3:
        body["n"] = rng.randint(2, 3)
    elif rng.random() < 0.3:
        body["temperature"] = 0
    if rng.random() < 0.3:
        body |= {"frequency_penalty": rng.choice([-0.5, 1.5]), "presence_penalty": 0.5, "repetition_penalty": 1.2}
    if rng.random() < 0.5 or stop != "\u2603":
        body["stop"] = [stop, "\u2602"]
    if rng.random() < 0.2:
        body |= {"ignore_eos": True}
    elif number % 4 and rng.random() < 0.3:  # before min_tokens there is no stop string, which is tried with the others
        body |= {"min_tokens": rng.choice([2, 9, 40])}  # a text that cannot go on ends all the same
    body["stream"] = rng.random() < 0.5
    is_chat = rng.random() < 0.5
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if is_chat else {"prompt": "Hello"}
    body |= field(rng, drawn)
    response = await client.post("/v1/chat/completions" if is_chat else "/v1/completions", json=body)
    assert response.status_code == 200, (response.text, drawn.value)
    if not body["stream"]:
        return [
            (
                choice["message"]["content"] if is_chat else choice["text"],
                choice["finish_reason"],
                choice["stop_reason"],
            )
            for choice in response.json()["choices"]
        ]
    texts, ends = collections.defaultdict(str), {}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for part in json.loads(line.removeprefix("data: "))["choices"]:
            texts[part["index"]] += (part["delta"].get("content") or "") if is_chat else part["text"]
            if part["finish_reason"]:
                ends[part["index"]] = part["finish_reason"], part["stop_reason"]
    assert ends.keys() == set(range(body.get("n", 1))), response.text
    return [(texts[i], *ends[i]) for i in sorted(ends)]


def field(rng, drawn) -> dict:
    """The constraint in one of the fields that take it. JSON is mostly held to little white space, or it has no end."""
    if drawn.kind != "json":
        return rng.choice([{"structured_outputs": {drawn.kind: drawn.value}}, {f"guided_{drawn.kind}": drawn.value}])
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": drawn.value}}
    ways = [
        {"structured_outputs": {"json": drawn.value, "whitespace_pattern": "[ \\n]?"}},
        {"structured_outputs": {"json": json.dumps(drawn.value), "disable_any_whitespace": True}},
        {"guided_json": drawn.value, "guided_whitespace_pattern": " {0,2}"},
        {"response_format": format, "structured_outputs": {"disable_any_whitespace": True}},
    ]
    return {"response_format": format} if rng.random() < 0.05 else rng.choice(ways)


TAG = {"structures": [{"begin": "e=", "schema": {"type": "integer"}, "end": ";"}], "triggers": ["e"]}
USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": USER, "response_format": TAG | {"type": "structural_tag"}},
        {"messages": USER, "structured_outputs": {"structural_tag": json.dumps(TAG)}},
        {"messages": USER, "structural_tag": json.dumps(TAG)},
        {"prompt": "Hi", "response_format": TAG | {"type": "structural_tag"}},
        {"prompt": "Hi", "structured_outputs": {"structural_tag": json.dumps(TAG)}},
    ],
    ids=lambda body: "-".join(body),
)
def test_what_follows_a_trigger_is_one_of_its_structures(server, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    num_tags = 0
    for seed in range(4):
        (choice,) = server.post(path, body | {"max_tokens": 150, "seed": seed, "ignore_eos": True}).json()["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        parts = text.split("e")[1:]
        num_tags += len(parts)
        assert all(re.match(r"=\s*-?\d+\s*;", part) for part in parts[:-1]), text
    assert num_tags > 4
