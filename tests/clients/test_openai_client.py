"""openai, 2.x and 3.x: https://github.com/openai/openai-python"""

import asyncio
import json
from typing import Literal

import openai
import pydantic
import pytest

pytestmark = pytest.mark.clients
USER = {"role": "user", "content": "What is the weather in Paris?"}


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int = pydantic.Field(ge=-40, le=60)


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": Weather.model_json_schema()}}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_models(client, server):
    assert [model.id for model in client.models.list()] == [server.model]


def test_chat(client, server):
    answer = client.chat.completions.create(
        model=server.model, messages=[USER], max_completion_tokens=8, n=2, logprobs=True, top_logprobs=3
    )
    assert len(answer.choices) == 2 and answer.usage.completion_tokens <= 16
    for choice in answer.choices:
        assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_a_stream_gives_what_a_whole_answer_gives(client, server):
    asked = dict(model=server.model, messages=[USER], max_tokens=12, seed=3)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper(client, server):
    with client.chat.completions.stream(
        model=server.model, messages=[USER], max_tokens=300, response_format=Weather
    ) as s:
        kinds = {event.type for event in s}
        final = s.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Weather)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_tools(client, server, choice):
    asked = dict(model=server.model, messages=[USER], tools=[TOOL], tool_choice=choice, max_tokens=300, seed=1)
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    call = whole.message.tool_calls[0]
    assert call.function.name == "get_weather"
    arguments = ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            arguments += piece.function.arguments or ""
    Weather.model_validate_json(arguments)
    assert json.loads(arguments) == json.loads(call.function.arguments)
    # The call's result goes back in the next turn.
    turns = [USER, whole.message.model_dump(exclude_none=True)]
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "20"}]
    assert client.chat.completions.create(model=server.model, messages=turns, tools=[TOOL], max_tokens=4).choices


def test_structured_output(client, server):
    answer = client.chat.completions.parse(model=server.model, messages=[USER], response_format=Weather, max_tokens=300)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_completions(client, server):
    answer = client.completions.create(model=server.model, prompt=["One", "Two"], max_tokens=4, logprobs=2, echo=True)
    assert [choice.text[:3] for choice in answer.choices] == ["One", "Two"]
    assert all(choice.logprobs.token_logprobs[0] is None for choice in answer.choices)
    extra = {"top_k": 5, "structured_outputs": {"choice": ["yes", "no"]}, "return_token_ids": True}
    answer = client.completions.create(model=server.model, prompt="Sure?", max_tokens=8, extra_body=extra)
    assert answer.choices[0].text in ("yes", "no") and answer.choices[0].token_ids


def test_errors_are_of_the_clients_own_kinds(client, server):
    with pytest.raises(openai.NotFoundError, match="huge"):
        client.chat.completions.create(model="huge", messages=[USER])
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=server.model, messages=[USER], temperature=-1)
    assert refusal.value.param == "temperature"


def test_async(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            stream = await client.chat.completions.create(
                model=server.model, messages=[USER], max_tokens=6, stream=True, extra_body={"ignore_eos": True}
            )
            return [chunk async for chunk in stream]

    assert asyncio.run(run())[-1].choices[0].finish_reason == "length"
