"""litellm, provider hosted_vllm: https://docs.litellm.ai/docs/providers/vllm"""

import asyncio
import json
from typing import Literal

import litellm
import pydantic
import pytest

pytestmark = pytest.mark.clients
USER = {"role": "user", "content": "What is the weather in Paris?"}


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int = pydantic.Field(ge=-40, le=60)


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": Weather.model_json_schema()}}


@pytest.fixture
def asked(server):
    return dict(model=f"hosted_vllm/{server.model}", api_base=server.url, messages=[USER], max_tokens=300, seed=1)


def test_completion(asked):
    answer = litellm.completion(**asked | {"max_tokens": 8}, temperature=0.5)
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.usage.completion_tokens <= 8


def test_streaming(asked):
    asked |= {"max_tokens": 12}
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]  # the last has usage alone
    assert "".join(pieces) == whole.choices[0].message.content
    built = litellm.stream_chunk_builder(chunks, messages=[USER])
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_tools(asked, choice):
    asked |= {"tools": [TOOL], "tool_choice": choice}
    message = litellm.completion(**asked).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"
    Weather.model_validate_json(message.tool_calls[0].function.arguments)
    built = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True)))
    streamed = built.choices[0].message.tool_calls
    assert [json.loads(c.function.arguments) for c in streamed] == [
        json.loads(c.function.arguments) for c in message.tool_calls
    ]


def test_structured_output(asked):
    answer = litellm.completion(**asked, response_format=Weather)
    Weather.model_validate_json(answer.choices[0].message.content)


def test_fields_of_the_server(asked):
    answer = litellm.completion(**asked, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].message.content in ("yes", "no")


def test_async(asked):
    async def run():
        stream = await litellm.acompletion(**asked | {"max_tokens": 6}, stream=True)
        return [chunk async for chunk in stream]

    assert asyncio.run(run())[-1].choices[0].finish_reason


def test_text_completion(server):
    answer = litellm.text_completion(
        model=f"hosted_vllm/{server.model}", api_base=server.url, prompt="Hello", max_tokens=4
    )
    assert isinstance(answer.choices[0].text, str)


def test_errors(asked):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked, temperature=-1)
