"""POST /tokenize, POST /detokenize, and GET /tokenizer_info where a flag asks for it"""

import asyncio

from sanic import Blueprint, HTTPResponse, Request

from openai_api.body import read_json
from openai_api.errors import InvalidBody, Refused
from openai_api.gate import counted
from openai_api.operations import OF_BODIES, operation
from openai_api.prompts import encode, encode_chat
from openai_api.respond import whole_json
from openai_api.schema.answers import Detokenized, TokenizerInfo, Tokens
from openai_api.schema.tokenize import DetokenizeRequest, TokenizeChat, TokenizeText
from runtime.chat.messages import UnknownPart

blueprint = Blueprint("tokenize")
info = Blueprint("tokenizer_info")


@blueprint.post("/tokenize", stream=True)
@operation(
    "Token ids of a text, or of a conversation", TokenizeText, TokenizeChat, answer=Tokens, refusals=(*OF_BODIES, 501)
)
@counted
async def tokenize(request: Request) -> HTTPResponse:
    body = await read_json(request, TokenizeText, TokenizeChat)
    context = request.app.ctx
    engine = context.engine
    context.models.find(body.model)
    add = body.add_special_tokens
    if isinstance(body, TokenizeText):
        token_ids = await encode(engine.tokenizer, body.prompt, add_special_tokens=add)
    else:
        try:
            chat = await context.chat.render(body)
        except UnknownPart as error:
            raise Refused(str(error), status_code=501) from None
        token_ids = await encode_chat(engine.tokenizer, chat, add_special_tokens=add)
    strings = [engine.tokenizer.piece(i) for i in token_ids] if body.return_token_strs else None
    return whole_json(
        {"count": len(token_ids), "max_model_len": engine.max_model_len, "tokens": token_ids, "token_strs": strings}
    )


@blueprint.post("/detokenize", stream=True)
@operation("The text of token ids", DetokenizeRequest, answer=Detokenized)
@counted
async def detokenize(request: Request) -> HTTPResponse:
    body = await read_json(request, DetokenizeRequest)
    context = request.app.ctx
    context.models.find(body.model)
    text = await asyncio.to_thread(_decoded, context.engine.tokenizer, body.tokens)
    return whole_json({"prompt": text})


def _decoded(tokenizer, token_ids):
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < 2**32):
        raise InvalidBody.of("value_error", "tokens must be ids from 0 to 4294967295", "tokens")
    return tokenizer.decode(token_ids, False)


@info.get("/tokenizer_info", stream=True)
@operation("Settings of the tokenizer", answer=TokenizerInfo)
@counted
async def tokenizer_info(request: Request) -> HTTPResponse:
    context = request.app.ctx
    settings = {k: v for k, v in context.engine.tokenizer.config.items() if k not in ("vocab_file", "merges_file")}
    if context.config.chat_template is not None:
        settings["chat_template"] = context.config.template_source()
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    return whole_json(settings)
