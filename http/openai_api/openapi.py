"""The API as an OpenAPI 3.1 document, made from the routes that are there and from the models they read and answer."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
from pydantic.json_schema import models_json_schema
from sanic import Sanic

import runtime
from openai_api.operations import REFUSALS, Operation
from openai_api.schema.answers import Error
from openai_api.schema.fields import BOUNDS, MEANING

JSON, EVENTS = "application/json", "text/event-stream"
PLACE = "#/components/schemas/{model}"
EVERY_PATH = re.compile(r"<\w+:path>")
ABOUT = (
    "OpenAI's API over models on JAX, with the fields of `vllm serve`. Unknown fields are ignored. What is refused is "
    "answered with an error object that names the field and the limit."
)


def document(app: Sanic, *, root_path: str = "", needs_key: bool = False, open_paths: Iterable[str] = ()) -> dict:
    """The document of an app whose handlers carry an Operation each.

    Args:
        root_path: the prefix that a proxy adds; its routes are not listed twice.
        needs_key: whether a key must be sent to all paths but open_paths.
    """
    found = operations_of(app, root_path)
    schemas = _schemas(found.values())
    paths: dict[str, dict] = {}
    for (path, method), operation in sorted(found.items(), key=lambda item: item[0]):
        paths.setdefault(path, {})[method] = _described(path, method, operation, needs_key and path not in open_paths)
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jax-serving-runtime", "version": runtime.__version__, "description": ABOUT},
        "servers": [{"url": root_path.rstrip("/") or "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if needs_key:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return result


def operations_of(app: Sanic, root_path: str = "") -> dict[tuple[str, str], Operation]:
    """{(path, method in lower case): operation} of every route, less those below root_path.

    Raises:
        AttributeError: a handler carries none.
    """
    root = root_path.rstrip("/")
    found = {}
    for route in app.router.routes:
        path = f"/{route.path}"
        if EVERY_PATH.search(path) or (root and path.startswith(root + "/")):
            continue
        for method in route.methods:
            found[re.sub(r"<(\w+)(:\w+)?>", r"{\1}", path), method.lower()] = route.handler.operation
    return found


def _described(path, method, operation: Operation, needs_key) -> dict:
    refused = {
        str(status): {"description": REFUSALS[status], "content": {JSON: {"schema": _named(Error)}}}
        for status in operation.refusals
        if status != 401 or needs_key
    }
    result: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").strip("_"),
        "summary": operation.summary,
        "responses": refused if operation.is_refused else {"200": _answer(operation), **refused},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters:
        result["parameters"] = parameters
    if operation.bodies:
        result["requestBody"] = {"required": True, "content": {JSON: {"schema": _one_of(operation.bodies)}}}
    if needs_key:
        result["security"] = [{"key": []}]
    return result


def _answer(operation: Operation) -> dict:
    content = {}
    if isinstance(operation.answers, str):
        content[operation.answers] = {"schema": {"type": "string"}}
    elif operation.answers:
        content[JSON] = {"schema": _one_of(operation.answers)}
    if operation.events:
        content[EVENTS] = {"schema": _event(_one_of((*operation.events, Error)))}
    result: dict[str, Any] = {"description": operation.summary}
    return result | ({"content": content} if content else {})


def _event(data: dict) -> dict:
    """One server-sent event, as the specification's next version and the tools that know it describe a stream."""
    about = "Each event's data is JSON of this schema; the last event's data is [DONE]."
    field = {"type": "string", "description": about, "contentMediaType": JSON, "contentSchema": data}
    return {"type": "object", "properties": {"data": field}, "required": ["data"]}


def event_data(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a stream's events carry, from the schema of text/event-stream."""
    return schema["properties"]["data"]["contentSchema"]


def _named(model) -> dict:
    return {"$ref": PLACE.format(model=model.__name__)}


def _one_of(models) -> dict:
    return _named(models[0]) if len(models) == 1 else {"anyOf": [_named(model) for model in models]}


def _schemas(operations: Iterable[Operation]) -> dict[str, dict]:
    requests: set[type[pydantic.BaseModel]] = set()
    answers: set[type[pydantic.BaseModel]] = {Error}
    for operation in operations:
        requests.update(operation.bodies)
        answers.update(operation.events)
        answers.update(() if isinstance(operation.answers, str) else operation.answers)
    asked = _json_schemas(requests)
    for schema in asked.values():
        for name, property in schema.get("properties", {}).items():
            _tell(name, property)
    return dict(sorted((asked | _json_schemas(answers)).items()))


def _json_schemas(models) -> dict[str, dict]:
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=PLACE)
    return schemas.get("$defs", {})


def _tell(name: str, property: dict) -> None:
    """Adds a field's meaning and bounds to its schema."""
    property.setdefault("description", MEANING[name])
    for form in property.get("anyOf", [property]):
        if form.get("type") in ("integer", "number"):
            form.update({bound: value for bound, value in BOUNDS.get(name, {}).items() if bound not in form})


def resolve(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a $ref stands for; any other is itself."""
    ref = schema.get("$ref")
    return document["components"]["schemas"][ref.rsplit("/", 1)[1]] if ref else schema
