"""The tools of a request: what may be offered, and what a forced choice makes the reply be."""

import json
import re
from collections.abc import Sequence

from runtime.errors import RequestRefused, shown
from runtime.grammar.limits import MAX_SCHEMA_BYTES
from runtime.grammar.schema_check import check_depth, prepare_schema, rebase_refs

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_ARGUMENTS = {"type": "object", "properties": {}}
# Keywords under which a property that is not listed may be meant.
OTHER_PROPERTIES = {
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
}


def check_number(num_tools: int) -> None:
    """Refuses more tools than may be given, before anything looks at them."""
    if num_tools > MAX_TOOLS:
        raise RequestRefused(f"{num_tools:,} tools were given; the limit is {MAX_TOOLS}.", "tools")


def check_tools(tools: Sequence[dict]) -> None:
    """Refuses too many tools, too large ones, and names that are not plain or not unique.

    Raises:
        RequestRefused: with param "tools".
    """
    check_number(len(tools))
    seen = set()
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict):
            raise RequestRefused("each tool needs a function object.", "tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RequestRefused(
                f"tool name {shown(str(name))!r} must be 1 to 64 letters, digits, underscores or dashes.", "tools"
            )
        if name in seen:
            raise RequestRefused(f"two tools are named {name!r}.", "tools")
        seen.add(name)
        if parameters is not None and not isinstance(parameters, dict):
            raise RequestRefused(f"parameters of tool {name!r} must be an object.", "tools")
        check_depth(parameters or {}, f"parameters of tool {name!r}")
    if (size := len(json.dumps(list(tools), ensure_ascii=False).encode(errors="replace"))) > MAX_SCHEMA_BYTES:
        raise RequestRefused(f"the tools take {size:,} bytes; the limit is {MAX_SCHEMA_BYTES:,}.", "tools")


def reply_schema(tools: Sequence[dict], tool_choice, at_most_one: bool = False) -> dict | None:
    """The JSON schema that a named or required choice makes the reply satisfy; None for any other choice.

    Args:
        at_most_one: a required choice makes one call and no more.

    Raises:
        RequestRefused: the choice is not among the tools, or two tools define one `$defs` name differently.
    """
    if isinstance(tool_choice, dict):
        name = (tool_choice.get("function") or {}).get("name")
        for tool in tools:
            if tool["function"]["name"] == name:
                return prepare_schema(_parameters(tool), "tools")
        raise RequestRefused(
            "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
        )
    return _calls_schema(tools, at_most_one) if tool_choice == "required" and tools else None


def _parameters(tool) -> dict:
    """Its schema; an argument that is not among the properties would be one that the function does not take."""
    schema = tool["function"].get("parameters") or NO_ARGUMENTS
    is_open = "properties" in schema and not schema.keys() & OTHER_PROPERTIES
    return schema | {"additionalProperties": False} if is_open else schema


def _calls_schema(tools, at_most_one) -> dict:
    """A list of calls. Each tool's schema goes under $defs, and its own references follow it there."""
    _check_defs(tools)
    defs, options = {}, []
    for tool in tools:
        name = tool["function"]["name"]
        pointer = f"#/$defs/{name}"
        defs[name] = rebase_refs(prepare_schema(_parameters(tool), "tools"), pointer)
        properties = {"name": {"type": "string", "enum": [name]}, "parameters": {"$ref": pointer}}
        options.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    calls = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": options}, "$defs": defs}
    return calls | {"maxItems": 1} if at_most_one else calls


def _check_defs(tools):
    """A definition's name means one thing in a request, as clients that share definitions between tools expect."""
    seen: dict[str, object] = {}
    for tool in tools:
        defs = _parameters(tool).get("$defs")
        for name, schema in (defs if isinstance(defs, dict) else {}).items():
            if seen.setdefault(name, schema) != schema:
                message = f"Tool definition '{shown(name)}' has multiple schemas, which is not supported."
                raise RequestRefused(message, "tools")
