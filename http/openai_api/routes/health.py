"""What probes and dashboards ask: /health /live /ready /ping /version /load"""

from sanic import Blueprint, HTTPResponse, Request

import runtime
from openai_api.gate import counted
from openai_api.operations import operation
from openai_api.respond import whole_json
from openai_api.schema.answers import Load, Version

blueprint = Blueprint("health")
PROBE = (503,)


@blueprint.get("/health", stream=True)
@operation("Does the engine make progress?", refusals=PROBE)
@counted
async def health(request: Request) -> HTTPResponse:
    """200 while the engine makes progress; 503 once it is gone."""
    return _probe(request.app.ctx.engine.is_healthy)


@blueprint.get("/live", stream=True)
@operation("Is the process alive?", refusals=PROBE)
@counted
async def live(request: Request) -> HTTPResponse:
    """As /health, and 200 while the model loads, when runtime.listen.Doorman answers."""
    return _probe(request.app.ctx.engine.is_healthy)


@blueprint.get("/ready", stream=True)
@operation("Would a new request be taken?", refusals=PROBE)
@counted
async def ready(request: Request) -> HTTPResponse:
    """200 while a new request would be taken: not before the model is loaded, not once the server drains."""
    return _probe(request.app.ctx.engine.is_accepting)


@blueprint.route("/ping", methods=["GET", "POST"], stream=True)
@operation("The same as /health", refusals=PROBE)
@counted
async def ping(request: Request) -> HTTPResponse:
    return _probe(request.app.ctx.engine.is_healthy)


@blueprint.get("/version", stream=True)
@operation("Version of this server", answer=Version)
@counted
async def version(request: Request) -> HTTPResponse:
    return whole_json({"version": runtime.__version__})


@blueprint.get("/load", stream=True)
@operation("Open requests, where counting them was asked for", answer=Load)
@counted
async def load(request: Request) -> HTTPResponse:
    """Open requests of the task endpoints; 0 unless counting them was asked for."""
    context = request.app.ctx
    return whole_json({"server_load": context.gate.num_open if context.config.enable_server_load_tracking else 0})


def _probe(is_well: bool) -> HTTPResponse:
    return HTTPResponse(b"", 200 if is_well else 503, content_type="text/plain")
