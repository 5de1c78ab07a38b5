"""Tool calls and reasoning over HTTP: a streamed answer adds up to the whole one."""

import json
import types

import pytest

from openai_api.app import create_app
from openai_api.config import ServerConfig
from runtime.errors import ConfigError

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
HERMES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


class FakeCompiler:
    """Notes what it is asked to compile."""

    def __init__(self):
        self.seen = []

    async def compile(self, constraint):
        self.seen.append(constraint)
        return types.SimpleNamespace(matcher=lambda: None)


def whole(server, **fields):
    response = server.post(PATH, {"messages": USER, **fields})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


def streamed(server, **fields):
    """The message a client builds from the stream, its finish reason, and all deltas."""
    message, finish, deltas = {"content": None, "reasoning_content": None, "tool_calls": []}, None, []
    for chunk in server.events(PATH, {"messages": USER, **fields})[1:-1]:
        (choice,) = chunk["choices"]
        delta, finish = choice["delta"], choice["finish_reason"]
        deltas.append(delta)
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message[name] or "") + delta[name]
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"id": part["id"], "type": part["type"], "function": {**part["function"]}})
            else:
                message["tool_calls"][part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return message, finish, deltas


def same(choice, message, finish):
    """Asserts that two answers say the same; ids of calls are drawn afresh."""
    for calls in (choice["message"]["tool_calls"], message["tool_calls"]):
        for call in calls:
            assert call.pop("id").startswith("chatcmpl-tool-")
    got = {name: choice["message"][name] or None for name in message}
    assert got == {name: value or None for name, value in message.items()} | {
        "tool_calls": message["tool_calls"] or None
    }
    assert choice["finish_reason"] == finish


def test_calls_are_taken_out_of_the_text(serve):
    server = serve("Let me look. " + CALL, config=HERMES)
    choice = whole(server, tools=[WEATHER])
    message, finish, deltas = streamed(server, tools=[WEATHER])
    same(choice, message, finish)
    (call,) = choice["message"]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    assert choice["message"]["content"].strip() == "Let me look." and finish == "tool_calls"
    first = next(delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta)
    assert first["function"] == {"name": "weather", "arguments": ""} and first["index"] == 0
    assert server.engine.seen[-1][1].skip_special_tokens is False


def test_content_is_null_when_there_are_only_calls(serve):
    choice = whole(serve(CALL + "\n" + CALL, config=HERMES), tools=[WEATHER])
    assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 2


def test_text_without_calls_stays_text(serve):
    server = serve("No need.", config=HERMES)
    choice = whole(server, tools=[WEATHER])
    same(choice, *streamed(server, tools=[WEATHER])[:2])
    assert choice["message"]["content"] == "No need." and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("cut", [3, 20, 30, 40])
def test_a_call_that_is_cut_ends_with_length(serve, cut):
    server = serve(CALL, config=HERMES)
    choice = whole(server, tools=[WEATHER], max_tokens=cut)
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"] == []
    assert streamed(server, tools=[WEATHER], max_tokens=cut)[1] == "length"


def test_calls_that_are_whole_are_calls_though_the_text_after_them_is_cut(serve):
    server = serve(CALL + " That is what I would ask.", config=HERMES)
    num_whole = len(server.engine.tokenizer.encode(CALL, False))
    choice = whole(server, tools=[WEATHER], max_tokens=num_whole + 3)
    same(choice, *streamed(server, tools=[WEATHER], max_tokens=num_whole + 3)[:2])
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1


def forced_server(serve, script):
    server = serve(script)
    server.engine.compiler = FakeCompiler()
    return server, len(server.engine.tokenizer.encode(script, False))


def test_required_calls_that_are_cut_are_refused_and_a_stream_ends_with_length(serve):
    server, num_whole = forced_server(serve, '[{"name": "weather", "parameters": {"city": "Köln"}}]')
    asked = {"messages": USER, "tools": [WEATHER], "tool_choice": "required"}
    for cut in range(1, num_whole):
        response = server.post(PATH, asked | {"max_tokens": cut})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "BadRequestError", "max_tokens")
        assert f"after {cut} tokens; raise max_tokens" in error["message"]
        message, finish, deltas = streamed(server, **asked, max_tokens=cut)
        assert finish == "length" and not any("content" in delta for delta in deltas)
    choice = whole(server, **asked, max_tokens=num_whole)
    same(choice, *streamed(server, **asked, max_tokens=num_whole)[:2])
    assert choice["finish_reason"] == "tool_calls"


def test_required_calls_that_a_stop_string_cuts_are_refused(serve):
    server, _ = forced_server(serve, '[{"name": "weather", "parameters": {"city": "Köln"}}]')
    asked = {"messages": USER, "tools": [WEATHER], "tool_choice": "required", "stop": "K"}
    response = server.post(PATH, asked)
    assert response.status_code == 400 and response.json()["error"]["param"] == "stop"
    assert streamed(server, **asked)[1] == "stop"


def test_a_named_call_that_is_cut_has_its_text_and_ends_with_length(serve):
    script = '{"city": "Köln"}'
    server, num_whole = forced_server(serve, script)
    asked = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    for cut in range(1, num_whole + 1):
        choice = whole(server, **asked, max_tokens=cut)
        same(choice, *streamed(server, **asked, max_tokens=cut)[:2])
        (call,) = choice["message"]["tool_calls"]
        assert script.startswith(call["function"]["arguments"].rstrip("\ufffd")) and choice["message"]["content"] == ""
        assert choice["finish_reason"] == ("length" if cut < num_whole else "tool_calls")


def test_tool_choice_none_leaves_the_text_alone(serve):
    server = serve(CALL, config=HERMES)
    choice = whole(server, tools=[WEATHER], tool_choice="none")
    assert choice["message"]["content"] == CALL and choice["message"]["tool_calls"] == []


def test_tools_can_be_left_out_of_the_prompt(serve):
    template = "{{ tools | length if tools else 0 }}"
    for flag, shown in ((False, "1"), (True, "0")):
        server = serve(chat_template=template, config={"exclude_tools_when_tool_choice_none": flag})
        whole(server, tools=[WEATHER], tool_choice="none")
        assert server.engine.seen[-1][0].text == shown


@pytest.mark.parametrize(
    "tool_choice, script",
    [
        ({"type": "function", "function": {"name": "weather"}}, '{"city": "Köln"}'),
        ("required", '[{"name": "weather", "parameters": {"city": "Köln"}}]'),
    ],
)
def test_a_forced_call_is_constrained_and_read(serve, tool_choice, script):
    server = serve(script)
    server.engine.compiler = compiler = FakeCompiler()
    choice = whole(server, tools=[WEATHER], tool_choice=tool_choice)
    same(choice, *streamed(server, tools=[WEATHER], tool_choice=tool_choice)[:2])
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"} and call["function"]["name"] == "weather"
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "tool_calls"
    assert compiler.seen[0].kind == "json" and "city" in compiler.seen[0].source
    assert server.engine.seen[-1][1].constraint is not None


THOUGHT = "<think>Hm, let me see.</think>Yes."


def test_reasoning_is_told_from_content(serve):
    server = serve(THOUGHT, config={"reasoning_parser": "qwen3"})
    choice = whole(server)
    same(choice, *streamed(server)[:2])
    assert choice["message"]["reasoning_content"] == "Hm, let me see." and choice["message"]["content"] == "Yes."


def test_reasoning_can_be_left_out(serve):
    server = serve(THOUGHT, config={"reasoning_parser": "qwen3"})
    choice = whole(server, include_reasoning=False)
    same(choice, *streamed(server, include_reasoning=False)[:2])
    assert choice["message"]["reasoning_content"] is None and choice["message"]["content"] == "Yes."


def test_nothing_but_reasoning_has_null_content(serve):
    server = serve("<think>Hm", config={"reasoning_parser": "qwen3"})
    assert whole(server)["message"]["content"] is None


def test_calls_are_read_from_the_content_alone(serve):
    server = serve(f"<think>Maybe {CALL}</think>{CALL}", config=HERMES | {"reasoning_parser": "qwen3"})
    choice = whole(server, tools=[WEATHER])
    same(choice, *streamed(server, tools=[WEATHER])[:2])
    assert len(choice["message"]["tool_calls"]) == 1 and CALL in choice["message"]["reasoning_content"]


def test_constraints_wait_for_the_end_of_the_reasoning(serve):
    server = serve(THOUGHT, config={"reasoning_parser": "qwen3"})
    server.engine.compiler = compiler = FakeCompiler()
    whole(server, response_format={"type": "json_object"})
    assert compiler.seen[0].starts_after == "</think>"


@pytest.mark.parametrize(
    "fields, kind, source",
    [
        ({"response_format": {"type": "json_object"}}, "json", "object"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", '"b"'),
        ({"structured_outputs": {}}, None, None),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
def test_constraints_are_compiled_before_the_engine_sees_them(serve, fields, kind, source):
    server = serve()
    server.engine.compiler = compiler = FakeCompiler()
    whole(server, **fields)
    assert [c.kind for c in compiler.seen] == ([kind] if kind else [])
    assert (server.engine.seen[-1][1].constraint is not None) == bool(kind)
    assert kind is None or source in compiler.seen[0].source


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"temperature": -1, "guided_regex": "a"}, "temperature"),
        ({"temperature": -1, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"tools": [WEATHER], "chat_template": "{{ 1 }}"}, "tool_choice"),
        ({"tools": [WEATHER], "n": 1000}, "n"),
        ({"tools": [WEATHER], "n": 1000, "model": "huge"}, "model"),
        ({"model": "huge", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ],
)
def test_the_first_of_two_faults_is_told_and_nothing_is_compiled_for_it(serve, fields, param):
    server = serve()
    server.engine.compiler = compiler = FakeCompiler()
    error = server.post(PATH, {"messages": USER} | fields).json()["error"]
    assert error["param"] == param and not compiler.seen


def test_whitespace_can_be_forbidden_for_all(serve):
    server = serve(config={"structured_outputs_config": {"disable_any_whitespace": True}})
    server.engine.compiler = compiler = FakeCompiler()
    whole(server, guided_json={"type": "object"})
    whole(server)
    assert [constraint.compact for constraint in compiler.seen] == [True]


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_stops_the_start(field):
    from fake_engine import FakeEngine

    with pytest.raises(ConfigError, match="'nope' is not known"):
        create_app(FakeEngine(), ServerConfig(**{field: "nope"}))
