"""GET /v1/models"""

from sanic import Blueprint, HTTPResponse, Request

from openai_api.gate import counted
from openai_api.operations import operation
from openai_api.respond import whole_json
from openai_api.schema.answers import ModelList

blueprint = Blueprint("models", url_prefix="/v1")


@blueprint.get("/models", stream=True)
@operation("Names that requests may ask for", answer=ModelList)
@counted
async def models(request: Request) -> HTTPResponse:
    return whole_json({"object": "list", "data": request.app.ctx.models.cards()})
