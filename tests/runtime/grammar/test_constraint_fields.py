"""What a request's fields become: a Constraint, nothing, or a refusal that names the field."""

import json

import pytest

from runtime.errors import RequestRefused
from runtime.grammar import Constraint

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TAG = {"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f"]}
from_request = Constraint.from_request


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "unknown": 3}},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"whitespace_pattern": " "}},
        {"guided": {"guided_json": None}},
    ],
)
def test_nothing_asked_is_no_constraint(fields):
    assert from_request(**fields) is None


@pytest.mark.parametrize(
    "fields, kind, source",
    [
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}),
        ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, "json", SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json", {"type": "object"}),
        ({"response_format": {"type": "structural_tag", **TAG}}, "structural_tag", TAG),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "structural_tag", TAG),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        ({"guided": {"guided_choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        ({"guided": {"guided_json": SCHEMA}}, "json", SCHEMA),
        ({"guided": {"structural_tag": json.dumps(TAG)}}, "structural_tag", TAG),
    ],
)
def test_fields_become_the_constraint(fields, kind, source):
    made = from_request(**fields)
    assert (made.kind, json.loads(made.source)) == (kind, source)


def test_the_order_of_properties_is_kept():
    assert list(json.loads(from_request({"json": SCHEMA}).source)["properties"]) == ["b", "a"]


def test_response_format_replaces_the_same_field():
    made = from_request({"json": {}}, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    assert json.loads(made.source) == SCHEMA


def test_a_tool_choice_replaces_response_format():
    made = from_request(None, {"type": "json_object"}, tool_schema=SCHEMA)
    assert json.loads(made.source) == SCHEMA


def test_a_guided_field_is_read_only_without_structured_outputs():
    assert from_request({}, guided={"guided_regex": "a"}) is None
    assert from_request({"regex": "b"}, guided={"guided_regex": "a"}).source == "b"


def test_equal_requests_share_a_key_whatever_they_start_after():
    one, two = from_request({"regex": "a"}, starts_after="</think>"), from_request({"regex": "a"})
    assert one != two and one.parts() == two and hash(one.parts()) == hash(two)


TOO_MANY = "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice')."
SEVERAL = "You can only use one kind of structured outputs constraint but multiple are specified"


@pytest.mark.parametrize(
    "fields, says, param",
    [
        ({"structured_outputs": {"json": {}, "regex": "a"}}, TOO_MANY, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, TOO_MANY, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "a"}}, SEVERAL + ": regex, grammar", "structured_outputs"),
        ({"structured_outputs": {"json": {}, "json_object": True}}, SEVERAL, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "Choice '[]' cannot be an empty list", "choice"),
        ({"structured_outputs": {"choice": [1]}}, "list of strings", "choice"),
        ({"structured_outputs": {"regex": 7}}, "must be a string, got a number", "regex"),
        ({"structured_outputs": {"json": 7}}, "got a number", "json"),
        ({"structured_outputs": {"json": "{"}}, "not valid JSON", "json"),
        ({"structured_outputs": {"json": '{"maximum": NaN}'}}, "not valid JSON", "json"),
        ({"structured_outputs": {"json": "[1]"}}, "must be an object", "json"),
        ({"structured_outputs": {"json_object": 1}}, "must be a boolean", "json_object"),
        ({"structured_outputs": {"grammar": "  "}}, "empty", "grammar"),
        ({"structured_outputs": [1]}, "must be an object", "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 16385}}, "the limit is 16,384", "regex"),
        ({"structured_outputs": {"regex": "\ud800"}}, "lone surrogate", "regex"),
        ({"structured_outputs": {"grammar": "#" * 65537}}, "the limit is 65,536", "grammar"),
        ({"structured_outputs": {"json": {"title": "x" * 2**18}}}, "the limit is 262,144", "json"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "Invalid structural tag specification", "structural_tag"),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG | {"triggers": ["x"]})}}, "none of the", None),
        ({"response_format": {"type": "yaml"}}, "'yaml'", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema object", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "name", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
            "must be an object, got a list",
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format asks for json_object and structured_outputs for regex",
            "response_format",
        ),
        ({"structured_outputs": {"regex": "a"}, "tool_schema": {}}, "not both", "tool_choice"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1:9/x.json"}}}, "nothing is fetched", "json"),
        ({"structured_outputs": {"json": {"items": {"$ref": "file:///etc/passwd"}}}}, "nothing is fetched", "json"),
        ({"structured_outputs": {"json": {"anyOf": [{"$ref": "other.json#/a"}]}}}, "nothing is fetched", "json"),
    ],
)
def test_refusals_name_the_field(fields, says, param):
    with pytest.raises(RequestRefused) as refused:
        from_request(**fields)
    assert says in str(refused.value)
    assert param is None or refused.value.param == param


@pytest.mark.parametrize("levels, refused", [(60, False), (65, True), (200, True), (100_000, True)])
def test_depth_is_bounded_before_anything_recurses(levels, refused):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    if refused:
        with pytest.raises(RequestRefused, match="nested more than 64 levels"):
            from_request({"json": schema})
    else:
        assert from_request({"json": schema}).kind == "json"
    while schema:  # taken apart by hand: dropping it whole would recurse
        schema = schema.get("items")


def test_a_deep_schema_given_as_text_is_refused_too():
    with pytest.raises(RequestRefused, match="nested more than 64 levels"):
        from_request({"json": '{"items":' * 20_000 + "{}" + "}" * 20_000})


def test_keywords_are_told_from_data_and_from_names():
    schema = {
        "properties": {"$ref": {"type": "string"}, "format": {"type": "string", "format": "password"}},
        "const": {"$ref": "http://x/"},
    }
    kept = json.loads(from_request({"json": schema}).source)
    assert kept["properties"] == {"$ref": {"type": "string"}, "format": {"type": "string"}}
    assert kept["const"] == {"$ref": "http://x/"}


def test_a_property_may_have_the_name_of_a_keyword():
    kept = from_request({"json": {"properties": {"default": {"type": "string", "format": "password"}}}})
    assert json.loads(kept.source) == {"properties": {"default": {"type": "string"}}}
    with pytest.raises(RequestRefused, match="nothing is fetched"):
        from_request({"json": {"properties": {"const": {"$ref": "http://127.0.0.1:9/x"}}}})


def test_extra_properties_are_forbidden_on_request():
    schema = {"properties": {"properties": {"type": "object"}}, "$defs": {"x": {"additionalProperties": True}}}
    kept = json.loads(from_request({"json": schema, "disable_additional_properties": True}).source)
    assert kept["additionalProperties"] is False
    assert kept["properties"]["properties"] == {"type": "object", "additionalProperties": False}
    assert kept["$defs"] == {"x": {"additionalProperties": True}}


@pytest.mark.parametrize(
    "pattern, construct",
    [
        ("(?=a)b", "look-ahead"),
        ("(?!a)b", "look-ahead"),
        ("x(?<=a)b", "look-behind"),
        ("x(?<!a)b", "look-behind"),
        (r"(a)\1", "back-reference"),
        (r"(?P<n>a)(?P=n)", "back-reference"),
        (r"(?<n>a)\k<n>", "back-reference"),
        ("(?i)abc", "inline flags"),
        ("(?-i:abc)", "inline flags"),
        (r"\bfoo\b", "word boundary"),
        ("(?>a)b", "atomic group"),
        ("(a)(?(1)b|c)", "conditional"),
        ("(?#note)a", "comment"),
    ],
)
def test_what_no_automaton_can_do_is_named(pattern, construct):
    with pytest.raises(RequestRefused, match=construct):
        from_request({"regex": pattern})


@pytest.mark.parametrize("pattern", [r"[(?=]\(?=", r"(?:a|b)", r"(?P<n>a)", r"[]\b]", r"[^]\1]", r"\\1", r"(?<n>a)"])
def test_lookalikes_pass(pattern):
    assert from_request({"regex": pattern}).source == pattern
