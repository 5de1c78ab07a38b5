"""Constraints are tried in a process that may die, and only then compiled; everything is bounded."""

import asyncio
import json
import os
import random
import re
import signal
import time

import pytest
from grammar_vocabulary import compiler, matches, vocabulary

from runtime.errors import Busy, RequestRefused
from runtime.grammar import Compiler, Constraint, limits
from runtime.grammar import compiler as compiler_module


def compiled(**structured_outputs):
    return compiler().compile_now(Constraint.from_request(structured_outputs))


@pytest.mark.parametrize(
    "fields, good, bad",
    [
        ({"regex": "[ab]c+"}, ["ac", "bccc"], ["a", "cc", "acd"]),
        ({"regex": r"(?:\d{2}|x*)é?"}, ["12", "xxé", ""], ["1", "12x"]),
        ({"regex": r"\w[\w-][^\w]\\w"}, ["a_\u0301\\w", "é-.\\w"], ["a\u0301.\\w", "ab_\\w"]),
        ({"regex": r"\w\d"}, ["a٣", "日0"], ["\U00010d41\U00010d41", "0\U00010d41"]),  # a digit since Unicode 16
        ({"regex": r"\s\S[^\s]?"}, ["\x1cab", " é"], [" \x1c", " a\x1f"]),
        ({"choice": ["yes", "no", 'a"b\n', "", "é"]}, ["yes", "no", 'a"b\n', "", "é"], ["y", "yesno"]),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}', '{ "é":"\\n"}'], ["[]", "{", '{"a":}']),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 12}}, ["3", "12", "9"], ["2", "13", "3.5"]),
        ({"json": {"type": "string", "format": "password"}}, ['"a"', '""'], ["a"]),
        ({"json": {}}, ["1", "[]", "null"], ["nul"]),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json_object": True, "whitespace_pattern": "[ ]?"}, ['{"a": 1}'], ['{"a":  1}', '{"a":\n1}']),
        ({"grammar": 'start: "a" b?\nb: /[0-9]+/'}, ["a", "a12"], ["12", "ab"]),
        ({"grammar": 'root ::= w " " w # two words\nw ::= [a-z ]+'}, ["ab cd", "a b c"], ["ab"]),
        ({"grammar": 'root ::= ab "bc"\nab ::= "a" | "ab"'}, ["abc", "abbc"], ["ab", "abb"]),
        ({"grammar": 'root ::= "(" root ")" | [^()\\n]{1,2}'}, ["((a))", "ab"], ["(a", "abc", "(\n)"]),
        ({"grammar": 'root ::= x{2,} y?\nx ::= "\\x41" | "\\u00e9"\ny ::= .'}, ["AA", "Aéé\n"], ["A", "B"]),
    ],
)
def test_exactly_the_asked_for_texts_match(fields, good, bad):
    found = compiled(**fields)
    assert [text for text in good if not matches(found, text)] == []
    assert [text for text in bad if matches(found, text)] == []


JSON_GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def test_a_grammar_of_json_reads_json():
    found = compiled(grammar=JSON_GBNF)
    good = ["{}", '{"a": 1}', '{"a":[1,2.5e3,{"b":null}],"c":"x\\n\\u00e9"} ', '{ "é":[ ]}']
    assert [text for text in good if not matches(found, text)] == []
    assert [text for text in ["[1]", '{"a"}', '{"a":01}', "{,}"] if matches(found, text)] == []


TOO_COSTLY = "too complex|took more than"  # either, as busy as the machine is


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "[z-a]"}, "character class range"),
        ({"regex": "a{1000000}"}, TOO_COSTLY),
        ({"regex": r"[^\s\S]"}, "no output can match"),
        ({"grammar": 'root ::= "a" | b'}, "'b', which is not defined"),
        ({"grammar": 'root ::= "a"\nroot ::= "b"'}, "defined twice"),
        ({"grammar": 'top ::= "a"'}, "no rule named root"),
        ({"grammar": 'root ::= ("a"'}, "ends too soon"),
        ({"grammar": 'root ::= "a" root'}, TOO_COSTLY),
        ({"grammar": "root ::= root"}, "no output can match"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"grammar": "start: " + "(" * 30_000}, "nested 30,000 deep"),
        ({"grammar": "root ::= " + "[" * 70 + '"a"'}, "nested"),
        ({"json": {"type": 7}}, "type must be"),
        ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json": {"$ref": "#"}}, "no output can match"),
        (
            {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
            "no output",
        ),
        ({"json": {"$ref": "#/$defs/nowhere"}}, "does not exist"),
        ({"json": {"$schema": "http://127.0.0.1:9/meta", "type": "integer"}}, "not present"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "greater than maximum"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}}, TOO_COSTLY),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(fields, says):
    with pytest.raises(RequestRefused) as refused:
        compiled(**fields)
    assert str(refused.value).startswith("Grammar error: ") and re.search(says, str(refused.value))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*",
        "(.{0,1000}){0,1000}",
        ".*.*.*=.*",
        "(x+x+)+y",
        "(.*a.*){20}",
        "(a|b)*a(a|b){30}",
        "|".join(f"x{i}" for i in range(2500)),
    ],
)
def test_patterns_that_choke_a_backtracker_are_served(pattern):
    start = time.process_time()
    compiled(regex=pattern)
    assert time.process_time() - start < 0.5


KEYWORDS = (
    "type enum const properties required additionalProperties patternProperties items prefixItems minItems maxItems "
    "minimum maximum exclusiveMinimum multipleOf minLength maxLength pattern format anyOf allOf oneOf not if $ref "
    "$defs definitions $schema $id x-guidance"
).split()
WRONG = [7, -1, 1.5, True, None, "x", "(", "#/", [], [7], [[]], {}, {"a": 7}, {"type": 7}, 2**70, "\x00"]


def test_any_wrong_keyword_is_served_or_refused_and_never_more():
    compiled(json={})  # a worker is there
    outcomes, killed = {True: 0, False: 0}, compiler().num_killed
    for keyword in KEYWORDS:
        for value in WRONG:
            try:
                compiled(json={"properties": {"a": {keyword: value}}, "type": "object", "required": ["a"]})
                outcomes[True] += 1
            except RequestRefused:
                outcomes[False] += 1
    assert min(outcomes.values()) > 50 and compiler().num_killed == killed


def random_pattern(rng, depth=4):
    if depth == 0:
        return rng.choice(["a", ".", "[a-z]", r"\d", "é", "x" * 50, r"\p{L}"])
    one, two = random_pattern(rng, depth - 1), random_pattern(rng, depth - 1)
    repeats = ["*", "+", "?", "{1,50}", "{3}", "{0,2000}", "+?"]
    return rng.choice([f"(?:{one}){rng.choice(repeats)}", f"(?:{one}|{two})", one + two])


@pytest.mark.slow
def test_patterns_drawn_at_random_are_served_or_refused_in_time():
    rng = random.Random(0)
    for _ in range(100):
        pattern, start = random_pattern(rng), time.monotonic()
        try:
            compiled(regex=pattern)
        except RequestRefused:
            pass
        assert time.monotonic() - start < 2 * limits.COMPILE_S + 2, pattern  # the worker's time, ours, and a new worker


def test_recursive_schemas_are_served():
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    assert matches(compiled(json=tree), '{"next":{"next":{}}}')
    a = {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "additionalProperties": False}
    b = {"type": "array", "items": {"$ref": "#/$defs/a"}}
    found = compiled(json={"$defs": {"a": a, "b": b}, "$ref": "#/$defs/a"})
    assert matches(found, '{"b":[{},{"b":[]}]}') and not matches(found, '{"b":{}}')


def test_a_large_enum_is_served_within_the_time():
    values = [f"v{i}" for i in range(20_000)]
    assert matches(compiled(json={"enum": values}), '"v19999"')


def test_a_worker_that_hangs_is_killed_and_replaced(monkeypatch):
    made = Compiler(vocabulary(), num_workers=1)
    try:
        made.compile_now(Constraint("regex", "warm"))
        pid = made._idle[0]._process.pid
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(limits, "COMPILE_S", 0.2)
        with pytest.raises(RequestRefused, match="took more than"):
            made.compile_now(Constraint("regex", "slow"))
        monkeypatch.setattr(limits, "COMPILE_S", 2.0)
        assert made.compile_now(Constraint("regex", "next")).matcher().error is None
        assert made.num_killed == 1 and made._idle[0]._process.pid != pid
        with pytest.raises(RequestRefused, match="took more than"):  # remembered: no second worker is spent
            made.compile_now(Constraint("regex", "slow"))
        assert made.num_killed == 1
    finally:
        made.close()


def test_a_worker_that_needs_too_much_memory_ends_and_is_replaced(monkeypatch):
    monkeypatch.setattr(limits, "COMPILE_BYTES", 1 << 20)
    made = Compiler(vocabulary(), num_workers=1)
    try:
        with pytest.raises(RequestRefused, match="memory|MB to compile"):
            made.compile_now(Constraint("json", json.dumps({"enum": [f"v{i}" for i in range(20_000)]})))
        monkeypatch.setattr(limits, "COMPILE_BYTES", 512 << 20)
        while made._idle:
            made._idle.pop().stop()
        assert made.compile_now(Constraint("regex", "a")).matcher().error is None
    finally:
        made.close()


def test_the_cache_forgets_what_was_used_longest_ago(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CACHED", 3)
    made = Compiler(vocabulary(), num_workers=1)
    try:
        first = made.compile_now(Constraint("regex", "0"))
        made.compile_now(Constraint("regex", "1"))
        assert made.compile_now(Constraint("regex", "0", starts_after="x")).parser is first.parser
        for i in range(2, 4):
            made.compile_now(Constraint("regex", str(i)))
        assert made.num_cached == 3
        assert made.compile_now(Constraint("regex", "0")).parser is first.parser
        monkeypatch.setattr(limits, "MAX_CACHED_BYTES", 1)
        made.compile_now(Constraint("regex", "9"))
        assert made.num_cached == 1
    finally:
        made.close()


def test_many_waiters_share_one_compilation_and_the_queue_is_bounded(monkeypatch):
    made = Compiler(vocabulary(), num_workers=1, max_waiting=2)
    asked = []
    ask = compiler_module._Worker.ask
    monkeypatch.setattr(compiler_module._Worker, "ask", lambda *a: asked.append(a[1]) or ask(*a))

    async def run():
        same = [made.compile(Constraint("regex", "ab")) for _ in range(5)]
        found = await asyncio.gather(*same, return_exceptions=True)
        assert len({id(each.parser) for each in found}) == 1
        many = [made.compile(Constraint("regex", f"x{i}")) for i in range(6)]
        return await asyncio.gather(*many, return_exceptions=True)

    try:
        found = asyncio.run(run())
        assert sum(isinstance(f, Busy) for f in found) == 4
        assert len(asked) == 1 + 1 + 2  # the start, the shared one, and the two that had room
    finally:
        made.close()


def test_a_caller_who_goes_away_leaves_the_compilation_to_others():
    made = Compiler(vocabulary(), num_workers=1)

    async def run():
        before = asyncio.ensure_future(made.compile(Constraint("regex", "before")))  # keeps the one worker busy
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(made.compile(Constraint("regex", "abc")))
        stays = asyncio.ensure_future(made.compile(Constraint("regex", "abc")))
        await asyncio.sleep(0)
        gone.cancel()
        await before
        return (await stays).constraint.source

    try:
        assert asyncio.run(run()) == "abc"
    finally:
        made.close()
