"""The API's document as one HTML page. It needs no network and runs no script, so it can be shown anywhere."""

import html
import json
from collections.abc import Mapping
from typing import Any

from openai_api.openapi import EVENTS, JSON, event_data, resolve

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21 }
summary { cursor: pointer; padding: .5rem 0 } details { border-bottom: 1px solid #ddd } h3 { margin: 1rem 0 .3rem }
code, pre { font: 13px/1.5 ui-monospace, monospace; background: #f3f4f6; border-radius: 4px; padding: .1rem .3rem }
pre { padding: .7rem; overflow-x: auto } table { border-collapse: collapse; width: 100% } .verb { font-weight: 700 }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid #eee }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e4e6e8 } code, pre { background: #25282c }
  details, th, td { border-color: #33373c }
}
"""
EXAMPLES = {
    "/v1/completions": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "/tokenize": {"prompt": "Hello world"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/invocations": {"messages": [{"role": "user", "content": "Hello"}]},
}


def page(document: Mapping[str, Any]) -> str:
    """The document as HTML: each operation with its fields, its answers and an example; then every schema."""
    info = document["info"]
    parts = [f"<h1>{_text(info['title'])} <small>{_text(info['version'])}</small></h1>"]
    parts.append(f'<p>{_text(info["description"])} <a href="openapi.json">openapi.json</a></p>')
    for path, methods in document["paths"].items():
        parts += [_operation(document, path, method, operation) for method, operation in methods.items()]
    parts.append("<h2>Schemas</h2>")
    parts += [_schema(document, name, schema) for name, schema in document["components"]["schemas"].items()]
    title = _text(info["title"])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>'
    )


def _operation(document, path, method, operation):
    parts = [f'<summary><span class="verb">{method.upper()}</span> <code>{_text(path)}</code> ']
    parts.append(f"{_text(operation['summary'])}</summary>")
    if example := EXAMPLES.get(path):
        body = _text(json.dumps(example))
        head = "-H 'Content-Type: application/json'"
        key = " -H 'Authorization: Bearer KEY'" if operation.get("security") else ""
        parts.append(f"<pre>curl http://HOST:PORT{_text(path)} {head}{key} -d '{body}'</pre>")
    for parameter in operation.get("parameters", ()):
        kind = _kind(parameter["schema"])
        parts.append(f"<p><code>{_text(parameter['name'])}</code> in the {parameter['in']}: {kind}</p>")
    if body := operation.get("requestBody"):
        schema = body["content"][JSON]["schema"]
        for form in schema.get("anyOf", [schema]):
            parts.append(f"<h3>Body: {_kind(form)}</h3>{_fields(resolve(document, form))}")
    parts.append("<h3>Answers</h3><table>")
    for status, answer in operation["responses"].items():
        kinds = [_carried(media, content["schema"]) for media, content in answer.get("content", {}).items()]
        parts.append(f"<tr><td>{status}<td>{'; '.join(kinds)}<td>{_text(answer['description'])}")
    return f"<details>{''.join(parts)}</table></details>"


def _carried(media, schema):
    """What an answer holds: a kind of object, alone or in events, or a text of some media type."""
    if media == EVENTS:
        return f"{_kind(event_data(schema))} in events"
    return _kind(schema) if media == JSON else f"{_kind(schema)} ({_text(media)})"


def _schema(document, name, schema):
    about = f"<p>{_text(schema['description'])}</p>" if "description" in schema else ""
    return (
        f'<details id="{_text(name)}"><summary><code>{_text(name)}</code></summary>{about}{_fields(schema)}</details>'
    )


def _fields(schema):
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _text(json.dumps(field.get("default")))
        about = _text(field.get("description", ""))
        rows.append(f"<tr><td><code>{_text(name)}</code><td>{_kind(field)}<td>{default}<td>{about}")
    return f"<table><tr><th>field<th>type<th>default<th>{''.join(rows)}</table>"


def _kind(schema):
    """A schema in a word or a few."""
    if ref := schema.get("$ref"):
        name = _text(ref.rsplit("/", 1)[1])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(map(_kind, schema[several]))
    if "enum" in schema or "const" in schema:
        return " or ".join(_text(json.dumps(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    bounds = [f"{word} {schema[name]:g}" for name, word in limits.items() if name in schema]
    return _text(" ".join([str(schema.get("type", "anything")), ", ".join(bounds)]).strip())


def _text(text):
    return html.escape(str(text))
