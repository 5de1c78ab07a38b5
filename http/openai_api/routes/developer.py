"""What VLLM_SERVER_DEV_MODE=1 adds: /server_info, /reset_prefix_cache, the /sleep family and /collective_rpc"""

import dataclasses

from sanic import Blueprint, HTTPResponse, Request

from openai_api.gate import counted
from openai_api.operations import operation
from openai_api.respond import whole_json
from openai_api.schema.answers import IsSleeping, ServerInfo
from runtime.errors import RequestRefused

blueprint = Blueprint("developer")
STAYS_AWAKE = "weights stay loaded: this server does not sleep; stop it instead, a warm start takes seconds"
NO_WORKERS = "there are no workers to call: one process holds the server and the engine"
FORM = {"config_format": {"enum": ["text", "json"], "default": "text"}}


@blueprint.get("/server_info", stream=True)
@operation("Settings of this server, less its keys", answer=ServerInfo, query=FORM, refusals=(400, 401, 500))
@counted
async def server_info(request: Request) -> HTTPResponse:
    form = request.args.get("config_format", "text")
    if form not in ("text", "json"):
        raise RequestRefused("config_format must be text or json", "config_format")
    context = request.app.ctx
    server = dataclasses.asdict(context.config)
    server["api_keys"] = ["hidden"] * len(server["api_keys"])
    settings = {"server": server, "engine": dataclasses.asdict(context.engine.plan)}
    return whole_json({"vllm_config": settings if form == "json" else str(settings)})


@blueprint.post("/reset_prefix_cache", stream=True)
@operation("Forgets cached prefixes that no running request uses")
@counted
async def reset_prefix_cache(request: Request) -> HTTPResponse:
    request.app.ctx.engine.reset_prefix_cache()
    return HTTPResponse(b"", content_type="text/plain")


@blueprint.get("/is_sleeping", stream=True)
@operation("Always false: this server does not sleep", answer=IsSleeping)
@counted
async def is_sleeping(request: Request) -> HTTPResponse:
    return whole_json({"is_sleeping": False})


def _refusing(summary: str, why: str):
    @operation(f"Refused: {summary}", refusals=(400, 401), is_refused=True)
    @counted
    async def refuse(request: Request):
        raise RequestRefused(why)

    return refuse


for name, summary, why in (
    ("sleep", "this server does not sleep", STAYS_AWAKE),
    ("wake_up", "this server does not sleep", STAYS_AWAKE),
    ("collective_rpc", "there are no workers", NO_WORKERS),
):
    blueprint.add_route(_refusing(summary, why), f"/{name}", methods=["POST"], name=name, stream=True)
