"""instructor: https://python.useinstructor.com"""

from typing import Literal

import instructor
import openai
import pydantic
import pytest

pytestmark = pytest.mark.clients
MESSAGES = [{"role": "user", "content": "It is 20 degrees in Paris."}]


class City(pydantic.BaseModel):
    name: Literal["Paris", "Rome"]


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: City
    degrees: int = pydantic.Field(ge=-40, le=60)
    note: str | None = pydantic.Field(max_length=5)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_pydantic_answer(server, mode):
    client = instructor.from_openai(
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0), mode=instructor.Mode[mode]
    )
    asked = dict(model=server.model, messages=MESSAGES, max_tokens=400, max_retries=0, seed=1)
    assert isinstance(client.chat.completions.create(**asked, response_model=Weather), Weather)
    answer, raw = client.chat.completions.create_with_completion(**asked, response_model=Weather)
    assert isinstance(answer, Weather) and raw.usage.total_tokens
    *_, last = client.chat.completions.create_partial(**asked, response_model=Weather)
    assert last.model_dump() == answer.model_dump()
