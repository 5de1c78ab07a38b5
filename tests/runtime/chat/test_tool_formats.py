"""Recorded outputs of each format give the content and calls beside them, however the text is cut."""

import json
import pathlib
import re

import pytest

from runtime.chat import tools
from runtime.chat.tools.events import Arguments, CallBroken, CallStarted, merged

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "tools"
RECORDED = [
    pytest.param(path.stem, case, data["tools"], id=f"{path.stem}: {case['name']}")
    for path in sorted(GOLDEN.glob("*.json"))
    for data in [json.loads(path.read_text())]
    for case in data["cases"]
]


def ids_that_count(name, index):
    return f"id-{index}"


def events(name, offered, pieces):
    parser = tools.create(name, offered, None if name == "kimi_k2" else ids_that_count)
    return merged([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


def test_every_format_has_recorded_outputs():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(tools.PARSERS)


@pytest.mark.parametrize("name, case, offered", RECORDED)
def test_recorded_outputs_give_their_content_and_calls(name, case, offered):
    reply = tools.parse_whole(tools.create(name, offered), case["text"])
    assert reply.content == case["content"]
    got = [(call.name, json.loads(call.arguments)) for call in reply.calls]
    assert got == [(call["name"], call["arguments"]) for call in case["calls"]]
    assert reply.is_broken == case.get("broken", False)
    for call, wanted in zip(reply.calls, case["calls"], strict=True):
        assert re.fullmatch(wanted.get("id") or case.get("id") or "chatcmpl-tool-[0-9a-f]{32}|[A-Za-z0-9]{9}", call.id)


@pytest.mark.parametrize("name, case, offered", RECORDED)
def test_where_the_text_is_cut_does_not_matter(name, case, offered):
    text = case["text"]
    at_once = events(name, offered, [text])
    assert events(name, offered, list(text)) == at_once
    for cut in range(1, len(text)):
        assert events(name, offered, [text[:cut], "", text[cut:]]) == at_once, (text[:cut], text[cut:])


@pytest.mark.parametrize("name, case, offered", RECORDED)
def test_a_stream_is_well_formed(name, case, offered):
    started, broken = [], set()
    for event in events(name, offered, list(case["text"])):
        match event:
            case CallStarted(index):
                assert index == len(started)
                started.append(index)
            case Arguments(index, text):
                assert index == started[-1] and index not in broken and text
            case CallBroken(index, text):
                assert index == started[-1]
                broken.add(index)


@pytest.mark.parametrize(
    "name, before, pieces",
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": ', ['{"a"', ": 1", "}"]),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>", ['{"a', '": 1', "}"]),
        ("qwen3_coder", "<tool_call><function=say><parameter=text>", ["ab", "cd"]),
        ("pythonic", "[f(a=", ["'ab", "cd", "'"]),
        ("mistral", "[TOOL_CALLS]f", ['{"a', '": 1', "}"]),
    ],
)
def test_arguments_are_shown_as_they_come(name, before, pieces):
    offered = [{"function": {"name": "say", "parameters": {"properties": {"text": {"type": "string"}}}}}]
    parser = tools.create(name, offered)
    parser.feed(before)
    for piece in pieces:
        assert any(isinstance(event, Arguments) for event in parser.feed(piece)), piece


def test_content_is_shown_up_to_what_may_be_a_marker():
    parser = tools.create("hermes")
    assert [event.text for event in parser.feed("Hello <tool")] == ["Hello "]
    assert [event.text for event in parser.feed("s>")] == ["<tools>"]


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="hermes, hunyuan_a13b"):
        tools.create("nonsense")


def forced(choice, offered, pieces):
    parser = tools.choice_parser(choice, offered, "hermes", ids_that_count)
    return merged([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


OFFERED = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}]
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "choice, text, calls, content",
    [
        (NAMED, '{"a": 1}', [("f", '{"a": 1}')], None),
        (NAMED, '{"a": ', [("f", '{"a": ')], None),
        (NAMED, "", [], None),
        ("required", '[{"name": "f", "parameters": {"a": "é"}}, {"name":"g","parameters":{}}]',
         [("f", '{"a": "é"}'), ("g", "{}")], None),
        ("required", '\n[ {"name": "f", "parameters": {}} ]\n', [("f", "{}")], None),
        ("required", '[{"name": "f", "parameters": {}}, {"name": "g", "param', [("f", "{}")], None),
        ("required", '[{"name": "f", "parameters": {"a": "é', [], '[{"name": "f", "parameters": {"a": "é'),
        ("required", "no", [], None),
    ],
)  # fmt: skip
def test_forced_calls(choice, text, calls, content):
    at_once = forced(choice, OFFERED, [text])
    assert forced(choice, OFFERED, list(text)) == at_once
    reply = tools.collect(at_once)
    assert ([(call.name, call.arguments) for call in reply.calls], reply.content) == (calls, content)


def test_who_parses_follows_from_the_choice():
    assert tools.choice_parser("none", OFFERED, "hermes") is None
    assert tools.choice_parser("auto", [], "hermes") is None
    assert tools.choice_parser("auto", OFFERED, None) is None
    assert isinstance(tools.choice_parser(None, OFFERED, "hermes"), tools.PARSERS["hermes"])


def test_ids_of_kimi_count_over_the_conversation():
    parser = tools.choice_parser("required", OFFERED, "kimi_k2", tools.kimi_id(2))
    reply = tools.parse_whole(parser, '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]')
    assert [call.id for call in reply.calls] == ["functions.f:2", "functions.g:3"]
