"""What the text of a reply must match: a small frozen value made from a request.

Source of the fields: the OpenAI API's `response_format`, and vLLM's `structured_outputs` and older `guided_*` fields.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from runtime.errors import RequestRefused
from runtime.grammar import limits
from runtime.grammar.regex_check import check_regex
from runtime.grammar.schema_check import forbid_extra_properties, prepare_schema

KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")  # the first one set is used
EXCLUSIVE = KINDS[:-1]
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "guided_whitespace_pattern": "whitespace_pattern",
}
ANY_OBJECT = {"type": "object"}


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A constraint whose fields have been checked, but which has not been compiled.

    kind: "json", "regex", "choice", "grammar" or "structural_tag".
    source: the schema, list or tag as JSON text; the regex or the grammar as written.
    whitespace_pattern: for JSON, a regex of what may stand between tokens; None is any whitespace.
    compact: for JSON, no whitespace at all.
    starts_after: text after which the constraint holds, such as "</think>"; until then anything may be written.
    """

    kind: str
    source: str
    whitespace_pattern: str | None = None
    compact: bool = False
    starts_after: str | None = None

    @classmethod
    def from_request(
        cls,
        structured_outputs: Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        guided: Mapping[str, Any] | None = None,
        *,
        tool_schema: Mapping[str, Any] | None = None,
        starts_after: str | None = None,
    ) -> "Constraint | None":
        """Reads a request's fields, each given as parsed JSON.

        Args:
            structured_outputs, response_format: the fields of those names.
            guided: the deprecated fields guided_json, guided_regex, guided_choice, guided_grammar, structural_tag
                and guided_whitespace_pattern, by their names; used when structured_outputs is None.
            tool_schema: what a named or required tool choice makes the reply be (runtime.chat.tools.reply_schema); it
                takes the place of response_format.
            starts_after: a reasoning parser's end marker, unless the prompt already ends the reasoning.

        Returns:
            None when the request asks for nothing in particular.

        Raises:
            RequestRefused: a wrong type, two constraints at once, a source over its limit, or one that can be seen
                to be invalid without compiling it. `param` names the field.
        """
        fields = dict(_object(structured_outputs, "structured_outputs") or {})
        if structured_outputs is None:
            given = {name: value for name, value in (guided or {}).items() if value is not None}
            fields = {GUIDED[name]: value for name, value in given.items() if name in GUIDED}
        fields = {name: value for name, value in fields.items() if value is not None and value is not False}
        _check_types(fields)
        _check_exclusive(fields)
        if tool_schema is not None:
            if any(kind in fields for kind in KINDS):
                raise RequestRefused(
                    "You can only either use constraints for structured outputs or tools, not both.", "tool_choice"
                )
            fields["json"] = tool_schema
        else:
            _add_response_format(fields, _object(response_format, "response_format"))
        kind = next((kind for kind in KINDS if kind in fields), None)
        return None if kind is None else _build(kind, fields, starts_after)

    def parts(self) -> "Constraint":
        """The same without starts_after: what is compiled, and what the cache goes by."""
        return dataclasses.replace(self, starts_after=None)


def check_fields(
    structured_outputs: Mapping[str, Any] | None = None, response_format: Mapping[str, Any] | None = None
) -> None:
    """What can be said of these fields without reading any schema: their types, and that there is one constraint.

    Raises:
        RequestRefused: as `Constraint.from_request`.
    """
    given = _object(structured_outputs, "structured_outputs") or {}
    fields = {name: value for name, value in given.items() if value is not None and value is not False}
    _check_types(fields)
    _check_exclusive(fields)
    _add_response_format({}, _object(response_format, "response_format"))


def _object(value, name):
    if value is not None and not isinstance(value, Mapping):
        raise RequestRefused(f"{name} must be an object, got {_type_name(value)}.", name)
    return value


def _type_name(value) -> str:
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _check_types(fields):
    wanted = {
        "json": ((str, Mapping), "a JSON schema, as an object or as text"),
        "regex": (str, "a string"),
        "choice": (list, "a list of strings"),
        "grammar": (str, "a string"),
        "json_object": (bool, "a boolean"),
        "structural_tag": ((str, Mapping), "a JSON string"),
        "whitespace_pattern": (str, "a string"),
        "disable_any_whitespace": (bool, "a boolean"),
        "disable_additional_properties": (bool, "a boolean"),
    }
    for name, (types, words) in wanted.items():
        if name in fields and not isinstance(fields[name], types):
            raise RequestRefused(f"structured_outputs.{name} must be {words}, got {_type_name(fields[name])}.", name)
    if any(not isinstance(item, str) for item in fields.get("choice", ())):
        raise RequestRefused("structured_outputs.choice must be a list of strings.", "choice")


def _check_exclusive(fields):
    if sum(name in fields for name in ("json", "regex", "choice")) > 1:
        raise RequestRefused(
            "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice').",
            "structured_outputs",
        )
    given = [name for name in EXCLUSIVE if name in fields]
    if len(given) > 1:
        raise RequestRefused(
            "You can only use one kind of structured outputs constraint but multiple are specified: "
            + ", ".join(given)
            + ".",
            "structured_outputs",
        )


def _add_response_format(fields, response_format):
    """Puts what response_format asks for among the fields, over the same field of structured_outputs."""
    if response_format is None:
        return
    match response_format.get("type"):
        case "text":
            return
        case "json_object":
            name, value = "json_object", True
        case "json_schema":
            name, value = "json", _schema_of(response_format)
        case "structural_tag":
            name, value = "structural_tag", dict(response_format)
        case other:
            raise RequestRefused(
                f"response_format.type must be 'text', 'json_object', 'json_schema' or 'structural_tag', "
                f"got {_shown(other)}.",
                "response_format",
            )
    if others := [kind for kind in KINDS if kind in fields and kind != name]:
        raise RequestRefused(
            f"response_format asks for {name} and structured_outputs for {others[0]}; give one of them.",
            "response_format",
        )
    fields[name] = value


def _schema_of(response_format):
    holder = response_format.get("json_schema")
    if not isinstance(holder, Mapping):
        raise RequestRefused(
            "response_format of type 'json_schema' needs a json_schema object with a name and a schema.",
            "response_format",
        )
    if not isinstance(holder.get("name"), str):
        raise RequestRefused("response_format.json_schema.name must be a string.", "response_format")
    schema = holder.get("schema")
    if schema is not None and not isinstance(schema, Mapping):
        raise RequestRefused(
            f"response_format.json_schema.schema must be an object, got {_type_name(schema)}.", "response_format"
        )
    return ANY_OBJECT if schema is None else schema


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _build(kind, fields, starts_after) -> Constraint:
    value = fields[kind]
    match kind:
        case "json" | "json_object":
            source = _json_source(ANY_OBJECT if kind == "json_object" else value, fields)
            pattern = fields.get("whitespace_pattern")
            if pattern is not None:
                _check_size(pattern, limits.MAX_REGEX_BYTES, "whitespace_pattern")
                check_regex(pattern, "whitespace_pattern")
            return Constraint("json", source, pattern, "disable_any_whitespace" in fields, starts_after)
        case "regex":
            _check_size(value, limits.MAX_REGEX_BYTES, "regex")
            check_regex(value, "regex")
            return Constraint("regex", value, starts_after=starts_after)
        case "choice":
            if not value:
                raise RequestRefused("Choice '[]' cannot be an empty list", "choice")
            source = json_text(value, "choice")
            _check_size(source, limits.MAX_SCHEMA_BYTES, "choice")
            return Constraint("choice", source, starts_after=starts_after)
        case "grammar":
            _check_size(value, limits.MAX_GRAMMAR_BYTES, "grammar")
            if not value.strip():
                raise RequestRefused("Grammar error: the grammar is empty.", "grammar")
            return Constraint("grammar", value, starts_after=starts_after)
        case _:
            return Constraint("structural_tag", _tag_source(value), starts_after=starts_after)


def _json_source(schema, fields) -> str:
    if isinstance(schema, str):
        _check_size(schema, limits.MAX_SCHEMA_BYTES, "json")
        schema = read_json(schema, "json")
        if not isinstance(schema, dict | bool):
            raise RequestRefused("Grammar error: a JSON schema must be an object.", "json")
    schema = prepare_schema(schema, "json")
    if "disable_additional_properties" in fields:
        schema = forbid_extra_properties(schema)
    source = json_text(schema, "json")
    _check_size(source, limits.MAX_SCHEMA_BYTES, "json")
    return source


def _tag_source(value) -> str:
    """Checks `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}` and gives it as JSON text."""
    if isinstance(value, str):
        _check_size(value, limits.MAX_SCHEMA_BYTES, "structural_tag")
        value = read_json(value, "structural_tag")
    bad = RequestRefused(
        "Invalid structural tag specification: it must be an object with `structures`, a list of "
        '{"begin", "schema", "end"}, and `triggers`, a list of strings that the begins start with.',
        "structural_tag",
    )
    if not isinstance(value, Mapping):
        raise bad
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list) or not structures:
        raise bad
    if not all(isinstance(t, str) and t for t in triggers):
        raise bad
    kept = []
    for item in structures:
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in ("begin", "end")):
            raise bad
        schema = item.get("schema")
        if schema is not None and not isinstance(schema, Mapping):
            raise bad
        if not any(item["begin"].startswith(t) for t in triggers):
            raise RequestRefused(
                f"Invalid structural tag specification: {_shown(item['begin'])} starts with none of the triggers.",
                "structural_tag",
            )
        kept.append({"begin": item["begin"], "schema": prepare_schema(schema or {}, "schema"), "end": item["end"]})
    source = json_text({"structures": kept, "triggers": triggers}, "structural_tag")
    _check_size(source, limits.MAX_SCHEMA_BYTES, "structural_tag")
    return source


def _check_size(text: str, most: int, param: str):
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestRefused(
            f"Grammar error: {param} has a lone surrogate at character {error.start}.", param
        ) from None
    if size > most:
        raise RequestRefused(f"{param} takes {size:,} bytes; the limit is {most:,}.", param)


def read_json(text: str, param: str):
    """Parses JSON as the standard has it: no NaN, no infinities.

    Raises:
        RequestRefused: it is not JSON, or nested too deeply.
    """

    def refuse_constant(name):
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise RequestRefused(f"{param} is nested more than {limits.MAX_DEPTH} levels deep.", param) from None
    except ValueError as error:
        raise RequestRefused(f"{param} is not valid JSON: {error}.", param) from None


def json_text(value, param: str) -> str:
    """Compact JSON text; the order of keys is kept, since it is the order the reply will have."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise RequestRefused(f"{param} is nested more than {limits.MAX_DEPTH} levels deep.", param) from None
    except (ValueError, TypeError) as error:
        raise RequestRefused(f"{param} is not valid JSON: {error}.", param) from None
