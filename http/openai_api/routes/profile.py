"""What VLLM_TORCH_PROFILER_DIR=FOLDER adds: /start_profile and /stop_profile"""

from sanic import Blueprint, HTTPResponse, Request

from openai_api.gate import counted
from openai_api.operations import operation

blueprint = Blueprint("profile")
REFUSALS = (400, 401, 500)


@blueprint.post("/start_profile", stream=True)
@operation("Begins a trace of the process and its devices", refusals=REFUSALS)
@counted
async def start(request: Request) -> HTTPResponse:
    await request.app.ctx.profiler.start()
    return HTTPResponse(b"", content_type="text/plain")


@blueprint.post("/stop_profile", stream=True)
@operation("Ends the trace and writes it to the folder that was named at the start", refusals=REFUSALS)
@counted
async def stop(request: Request) -> HTTPResponse:
    await request.app.ctx.profiler.stop()
    return HTTPResponse(b"", content_type="text/plain")
