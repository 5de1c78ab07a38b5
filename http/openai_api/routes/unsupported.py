"""Documented routes of what there is none of here: each refuses in words, so that no client has to guess"""

import re

from sanic import Blueprint, HTTPResponse, Request

from openai_api.gate import counted
from openai_api.operations import operation
from openai_api.respond import whole_json
from openai_api.schema.answers import IsScaling
from runtime.errors import RequestRefused

blueprint = Blueprint("unsupported")
TASKS = {
    "/v1/embeddings": "Embeddings",
    "/pooling": "Pooling",
    "/classify": "Classification",
    "/score": "Score",
    "/v1/score": "Score",
    "/rerank": "Rerank (Score)",
    "/v1/rerank": "Rerank (Score)",
    "/v2/rerank": "Rerank (Score)",
    "/v1/audio/transcriptions": "Transcriptions",
    "/v1/audio/translations": "Translations",
    "/v1/responses": "Responses",
    "/v1/responses/<response_id:str>/cancel": "Responses",
}
DOES_NOT_SCALE = "one engine serves, and their number is not changed while it runs; start more servers behind a proxy"


def _refusing(task: str):
    @operation(f"{task}: not supported by the served model", refusals=(400, 401), is_refused=True)
    @counted
    async def refuse(request: Request, **place: str):
        raise RequestRefused(f"The model does not support {task} API; it generates text")

    return refuse


for path, task in TASKS.items():
    name = re.sub(r"\W+", "_", path).strip("_")
    blueprint.add_route(_refusing(task), path, methods=["POST"], name=name, stream=True)
place = "/v1/responses/<response_id:str>"
blueprint.add_route(_refusing("Responses"), place, methods=["GET"], name="response", stream=True)


@blueprint.post("/scale_elastic_ep", stream=True)
@operation("Refused: the number of engines is not changed", refusals=(400, 401), is_refused=True)
@counted
async def scale(request: Request):
    raise RequestRefused(DOES_NOT_SCALE)


@blueprint.post("/is_scaling_elastic_ep", stream=True)
@operation("Always false: the number of engines is not changed", answer=IsScaling)
@counted
async def is_scaling(request: Request) -> HTTPResponse:
    return whole_json({"is_scaling_elastic_ep": False})
