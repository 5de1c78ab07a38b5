"""GET /metrics"""

import asyncio

from sanic import Blueprint, HTTPResponse, Request

from openai_api.gate import counted
from openai_api.operations import operation
from runtime.metrics import CONTENT_TYPE

blueprint = Blueprint("metrics")


@blueprint.get("/metrics", stream=True)
@blueprint.get("/metrics/<rest:path>", name="metrics_below", stream=True)
@operation("Metrics for Prometheus", answer="text/plain")
@counted
async def metrics(request: Request, rest: str = "") -> HTTPResponse:
    text = await asyncio.to_thread(request.app.ctx.exposition.text)
    return HTTPResponse(text, content_type=CONTENT_TYPE)
