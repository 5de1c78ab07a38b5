"""POST /v1/chat/completions"""

import dataclasses

from sanic import Blueprint, Request

from openai_api import generation, request_log
from openai_api.body import read_json
from openai_api.constraints import constraint_of
from openai_api.gate import counted, request_id
from openai_api.operations import operation
from openai_api.prompts import chat_prompt, room_for
from openai_api.readers import Readers, check_tool_choice
from openai_api.respond import stream, whole
from openai_api.schema.answers import ChatCompletion, ChatCompletionChunk
from openai_api.schema.chat import ChatRequest
from openai_api.schema.chat_answers import ChatFormat

blueprint = Blueprint("chat", url_prefix="/v1")


@blueprint.post("/chat/completions", stream=True)
@operation("The next message of a conversation", ChatRequest, answer=ChatCompletion, event=ChatCompletionChunk)
@counted
async def create(request: Request):
    return await answer(request, await read_json(request, ChatRequest))


async def answer(request: Request, body: ChatRequest):
    """The whole answer, or None once a stream has been sent."""
    context = request.app.ctx
    engine, config = context.engine, context.config
    model, adapter = context.models.find(body.model)
    body.check_supported(config.limits)
    check_tool_choice(body, config)
    hides_tools = body.tool_choice == "none" and config.exclude_tools_when_tool_choice_none
    rendered = await context.chat.render(body, with_tools=not hides_tools)
    prompt = await chat_prompt(engine, rendered, body, adapter)
    readers = Readers(body, config, rendered.text)
    room = room_for(engine, prompt, body.limit)
    params = body.params(engine.default_sampling, room, show_special_tokens=readers.needs_special_tokens)
    constraint = await constraint_of(
        engine, config, body, tool_schema=readers.tool_schema(), starts_after=readers.starts_after
    )
    if constraint is not None:
        params = dataclasses.replace(params, constraint=constraint)
    id = request_id(request, "chatcmpl-", body.request_id)
    role = config.response_role if body.add_generation_prompt else body.messages[-1].role
    format = ChatFormat(
        body,
        config,
        engine.tokenizer,
        prompt,
        model=model,
        id=id,
        role=role,
        last_text=body.echoed_text(role),
        readers=readers,
    )
    work = generation.Work(id, [prompt], [params], body.priority)
    request_log.asked(config, work)
    outputs = generation.run(engine, work)
    if body.stream:
        return await stream(request, format.chunks(outputs))
    return await whole(request, format.whole(outputs))
