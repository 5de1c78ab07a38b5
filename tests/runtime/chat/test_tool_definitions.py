"""Tools are checked at the door, and a forced choice constrains the reply to them."""

import json

import jsonschema
import pytest
from grammar_vocabulary import compiler, matches, walk

from runtime.chat import tools
from runtime.errors import RequestRefused
from runtime.grammar import Constraint


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"City": {"enum": ["Paris", "Oslo"]}}}  # fmt: skip
TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
TOOLS = [tool("where", CITY), tool("tree", TREE), tool("now")]
NAMED = {"type": "function", "function": {"name": "where"}}


@pytest.mark.parametrize(
    "offered, says",
    [
        ([tool(f"t{i}") for i in range(129)], "129 tools were given; the limit is 128"),
        ([tool("a"), tool("a")], "two tools are named 'a'"),
        ([tool("")], "must be 1 to 64 letters"),
        ([tool("x" * 10_000)], "must be 1 to 64 letters"),
        ([tool("a b")], "must be 1 to 64 letters"),
        ([tool('a"b')], "must be 1 to 64 letters"),
        ([tool("{{ x }}")], "must be 1 to 64 letters"),
        ([tool("a\n")], "must be 1 to 64 letters"),
        ([tool(7)], "must be 1 to 64 letters"),
        ([{"type": "function"}], "needs a function object"),
        ([tool("a", [1])], "parameters of tool 'a' must be an object"),
        ([tool("a", {"title": "x" * 2**18})], "the limit is 262,144"),
    ],
)
def test_bad_tools_are_refused(offered, says):
    with pytest.raises(RequestRefused) as refused:
        tools.check_tools(offered)
    assert says in str(refused.value) and refused.value.param == "tools" and len(str(refused.value)) < 300


def test_a_schema_nested_too_deeply_is_refused():
    schema = {}
    for _ in range(200):
        schema = {"items": schema}
    with pytest.raises(RequestRefused, match="nested more than 64 levels"):
        tools.check_tools([tool("a", schema)])


def test_good_tools_pass():
    tools.check_tools([*TOOLS, tool("a-B_9" + "x" * 59)])


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_other_choices_constrain_nothing(choice):
    assert tools.reply_schema(TOOLS, choice) is None


def compiled(choice):
    return compiler().compile_now(Constraint.from_request(tool_schema=tools.reply_schema(TOOLS, choice)))


def test_a_named_choice_asks_for_the_arguments():
    found = compiled(NAMED)
    assert matches(found, '{"city": "Oslo"}')
    assert not matches(found, '{"city": "Rome"}') and not matches(found, "{}")


def test_a_required_choice_asks_for_a_list_of_calls():
    found = compiled("required")
    good = ['[{"name": "where", "parameters": {"city": "Oslo"}}]', '[{"name":"now","parameters":{}}, '
            '{"name":"tree","parameters":{"next":{"next":{}}}}]']  # fmt: skip
    assert [text for text in good if not matches(found, text)] == []
    bad = ["[]", '[{"name": "where", "parameters": {}}]', '[{"name": "else", "parameters": {}}]', '[{"name": "now"}]',
           '[{"name":"tree","parameters":{"next":{"next":1}}}]']  # fmt: skip
    assert [text for text in bad if matches(found, text)] == []


def test_a_required_choice_may_be_held_to_one_call():
    schema = tools.reply_schema(TOOLS, "required", at_most_one=True)
    found = compiler().compile_now(Constraint.from_request(tool_schema=schema))
    call = '{"name":"now","parameters":{}}'
    assert matches(found, f"[{call}]") and not matches(found, f"[{call},{call}]")
    assert matches(compiled("required"), f"[{call},{call}]")


@pytest.mark.parametrize(
    "parameters, fits",
    [
        (None, False),
        ({"properties": {"a": {"type": "null"}}}, False),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}, True),
        ({"type": "object"}, True),
    ],
)
def test_arguments_that_are_not_listed_are_not_made_up(parameters, fits):
    schema = tools.reply_schema([tool("where", parameters)], NAMED)
    found = compiler().compile_now(Constraint.from_request(tool_schema=schema))
    assert matches(found, "{}") and matches(found, '{"made_up": 1}') == fits


def test_whatever_is_drawn_under_a_required_choice_parses():
    schema = tools.reply_schema(TOOLS, "required")
    for seed in range(12):
        text = walk(compiled("required"), seed)
        if text is None:
            continue
        jsonschema.validate(json.loads(text), schema)
        reply = tools.parse_whole(tools.choice_parser("required", TOOLS), text)
        assert reply.content is None and not reply.is_broken
        assert [(c.name, json.loads(c.arguments)) for c in reply.calls] == [
            (c["name"], c["parameters"]) for c in json.loads(text)
        ]


def test_a_definition_with_two_meanings_is_refused():
    other = json.loads(json.dumps(CITY).replace("Oslo", "Rome"))
    with pytest.raises(RequestRefused, match="Tool definition 'City' has multiple schemas, which is not supported."):
        tools.reply_schema([tool("a", CITY), tool("b", other)], "required")
    assert tools.reply_schema([tool("a", CITY), tool("b", CITY)], "required")


def test_a_choice_of_no_tool_is_refused():
    with pytest.raises(RequestRefused, match="does not match any of the specified"):
        tools.reply_schema(TOOLS, {"type": "function", "function": {"name": "else"}})
