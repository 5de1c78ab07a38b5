"""GET /openapi.json, /docs and /redoc: the API, for programs and for people"""

import asyncio

import orjson
from sanic import Blueprint, HTTPResponse, Request

from openai_api import docs_page, openapi
from openai_api.gate import OPEN_PATHS, counted
from openai_api.operations import operation
from openai_api.schema.answers import Document

blueprint = Blueprint("docs")


@blueprint.get("/openapi.json", stream=True)
@operation("This API as an OpenAPI document", answer=Document)
@counted
async def document(request: Request) -> HTTPResponse:
    data, _ = await _made(request.app)
    return HTTPResponse(data, content_type="application/json")


@blueprint.get("/docs", stream=True)
@blueprint.get("/redoc", name="redoc", stream=True)
@operation("This API as a page to read", answer="text/html")
@counted
async def docs(request: Request) -> HTTPResponse:
    _, text = await _made(request.app)
    headers = {"Content-Security-Policy": docs_page.POLICY, "X-Content-Type-Options": "nosniff"}
    return HTTPResponse(text, headers=headers, content_type="text/html; charset=utf-8")


async def _made(app) -> tuple[bytes, str]:
    """The document and the page; made when first asked for, as most servers never are."""
    if not hasattr(app.ctx, "docs"):
        app.ctx.docs = await asyncio.to_thread(_make, app)
    return app.ctx.docs


def _make(app):
    config = app.ctx.config
    described = openapi.document(
        app, root_path=config.root_path, needs_key=bool(config.api_keys), open_paths=OPEN_PATHS
    )
    return orjson.dumps(described), docs_page.page(described)
