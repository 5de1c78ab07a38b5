"""POST /v1/completions"""

import dataclasses

from sanic import Blueprint, Request

from openai_api import generation, request_log
from openai_api.body import read_json
from openai_api.constraints import constraint_of
from openai_api.gate import counted, request_id
from openai_api.operations import operation
from openai_api.prompts import completion_prompt, room_for
from openai_api.respond import stream, whole
from openai_api.schema.answers import Completion, CompletionChunk
from openai_api.schema.completions import CompletionFormat, CompletionRequest

blueprint = Blueprint("completions", url_prefix="/v1")


@blueprint.post("/completions", stream=True)
@operation("What follows a text", CompletionRequest, answer=Completion, event=CompletionChunk)
@counted
async def create(request: Request):
    return await answer(request, await read_json(request, CompletionRequest))


async def answer(request: Request, body: CompletionRequest):
    """The whole answer, or None once a stream has been sent."""
    context = request.app.ctx
    engine, config = context.engine, context.config
    model, adapter = context.models.find(body.model)
    body.check_supported(config.limits)
    items = [] if body.truncate_prompt_tokens == 0 else body.items  # nothing is left of any prompt
    prompts = [await completion_prompt(engine, item, body, adapter) for item in items]
    rooms = [room_for(engine, prompt, body.max_tokens) for prompt in prompts]
    params = [body.params(engine.default_sampling, room) for room in rooms]
    constraint = await constraint_of(engine, config, body)
    if constraint is not None:
        params = [dataclasses.replace(one, constraint=constraint) for one in params]
    id = request_id(request, "cmpl-", body.request_id)
    format = CompletionFormat(body, config, engine.tokenizer, prompts, model, id)
    work = generation.Work(id, prompts, params, body.priority)
    request_log.asked(config, work)
    outputs = generation.run(engine, work)
    if body.stream:
        return await stream(request, format.chunks(outputs))
    return await whole(request, format.whole(outputs))
