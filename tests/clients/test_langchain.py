"""langchain-openai: https://docs.langchain.com/oss/python/integrations/chat/openai"""

import asyncio
from typing import Literal

import pydantic
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

pytestmark = pytest.mark.clients


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int = pydantic.Field(ge=-40, le=60)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Says the weather of a city."""
    return f"20 degrees in {city}"


@pytest.fixture
def chat(server):
    return ChatOpenAI(base_url=server.url, api_key="none", model=server.model, max_tokens=300, max_retries=0, seed=1)


def test_invoke_and_stream(chat):
    short = chat.bind(max_tokens=8)
    answer = short.invoke([("system", "Be brief."), ("human", "Hello")])
    assert answer.usage_metadata["output_tokens"] <= 8
    pieces = list(short.stream([("system", "Be brief."), ("human", "Hello")]))
    assert "".join(piece.content for piece in pieces) == answer.content
    assert len(short.batch(["One", "Two"])) == 2
    assert asyncio.run(short.ainvoke("Hello")).content is not None


def test_logprobs(chat):
    answer = chat.bind(logprobs=True, top_logprobs=2, max_tokens=4).invoke("Hello")
    assert answer.response_metadata["logprobs"]["content"]


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_bind_tools(chat, choice):
    with_tools = chat.bind_tools([get_weather], tool_choice=choice)
    answer = with_tools.invoke("What is the weather in Paris?")
    (call,) = answer.tool_calls[:1]
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Paris", "Rome")
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert with_tools.bind(tool_choice="none").invoke([HumanMessage("Weather?"), answer, result]).tool_calls == []
    gathered = None
    for piece in with_tools.stream("What is the weather in Paris?"):
        gathered = piece if gathered is None else gathered + piece
    assert gathered.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_with_structured_output(chat, method):
    assert isinstance(chat.with_structured_output(Weather, method=method).invoke("Weather?"), Weather)


def test_text_completion(server):
    model = OpenAI(base_url=server.url, api_key="none", model=server.model, max_tokens=6, max_retries=0)
    assert isinstance(model.invoke("Hello"), str)
    assert list(model.stream("Hello"))
