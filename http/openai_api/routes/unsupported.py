"""Documented routes of tasks that no served model has: each refuses in words, so that no client has to guess"""

from sanic import Blueprint, Request

from openai_api.gate import counted
from openai_api.operations import operation
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
}


def _refusing(task: str):
    @operation(f"{task}: not supported by the served model", refusals=(400, 401), is_refused=True)
    @counted
    async def refuse(request: Request):
        raise RequestRefused(f"The model does not support {task} API; it generates text")

    return refuse


for path, task in TASKS.items():
    blueprint.add_route(_refusing(task), path, methods=["POST"], name=path.strip("/").replace("/", "_"), stream=True)
