"""POST /invocations: one route for every task, as SageMaker calls it"""

import pydantic
from sanic import Blueprint, Request

from openai_api.body import read_as, validated
from openai_api.gate import counted
from openai_api.operations import operation
from openai_api.routes import chat, completions
from openai_api.schema.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from openai_api.schema.chat import ChatRequest
from openai_api.schema.completions import CompletionRequest
from runtime.errors import RequestRefused

blueprint = Blueprint("invocations")
FORMS = (ChatRequest, CompletionRequest)


@blueprint.post("/invocations", stream=True)
@operation(
    "Chat or completion, whichever the body is",
    *FORMS,
    answer=(ChatCompletion, Completion),
    event=(ChatCompletionChunk, CompletionChunk),
)
@counted
async def invoke(request: Request):
    body = await read_as(request, _first_form)
    if isinstance(body, ChatRequest):
        return await chat.answer(request, body)
    return await completions.answer(request, body)


def _first_form(value: dict) -> ChatRequest | CompletionRequest:
    """The body as the first kind of request that takes it.

    Raises:
        pydantic.ValidationError: it is plainly meant as one of them, which does not take it.
        RequestRefused: it is like none of them.
    """
    for form in FORMS:
        try:
            return validated(form, value)
        except pydantic.ValidationError:
            if ("messages" if form is ChatRequest else "prompt") in value:
                raise
    names = [form.__name__ for form in FORMS]
    raise RequestRefused(f"Cannot find suitable handler for request. Expected one of: {names}")
