"""Documented fields that other files do not look at, one claim each."""

import math

import pytest
import tiny_tokenizers
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import ServerConfig
from openai_api.readers import Readers
from openai_api.schema import sampling
from openai_api.schema.chat import ChatRequest
from openai_api.schema.completions import CompletionRequest
from openai_api.schema.logprobs import LOWEST, TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from runtime.request import TokenLogprobs

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
TEXT = "Hello world, this is a test."


@pytest.fixture(scope="module")
def server():
    server = LiveServer(FakeEngine(), ServerConfig())
    yield server
    server.close()


def test_fields_that_nothing_reads_are_said_once(server, caplog):
    sampling._say_unused.cache_clear()
    for _ in range(3):
        body = {"prompt": "a", "max_tokens": 1, "kv_transfer_params": {"a": 1}, "vllm_xargs": {"x": 1, "y": "z"}}
        assert server.post(COMPLETIONS, body).status_code == 200
    for name in ("kv_transfer_params", "vllm_xargs"):
        assert caplog.text.count(f"{name} is ignored") == 1


def test_which_of_two_formats_counts_depends_on_the_route():
    format = {"type": "json_object"}
    both = {"response_format": format, "structured_outputs": {"regex": "a"}}
    assert CompletionRequest(prompt="a", **both).reply_format is None
    assert ChatRequest(messages=USER, **both).reply_format == format
    for nothing in ({}, {"disable_any_whitespace": True}, None):
        body = CompletionRequest(prompt="a", response_format=format, structured_outputs=nothing)
        assert body.reply_format == format


@pytest.mark.parametrize(
    "fields, most", [({}, None), ({"parallel_tool_calls": False}, 1), ({"parallel_tool_calls": True}, None)]
)
def test_parallel_tool_calls_false_holds_a_required_choice_to_one_call(fields, most):
    tool = {"type": "function", "function": {"name": "f"}}
    body = ChatRequest(messages=USER, tools=[tool], tool_choice="required", **fields)
    assert Readers(body, ServerConfig(), "").tool_schema().get("maxItems") == most


def test_completions_begin_with_what_the_tokenizer_adds_unless_told(serve):
    server = serve("a", tokenizer=tiny_tokenizers.sentencepiece())
    bos = 1
    for fields, is_added in (({}, True), ({"add_special_tokens": False}, False)):
        assert server.post(COMPLETIONS, {"prompt": "the", "max_tokens": 1} | fields).status_code == 200
        assert (server.engine.seen[-1][0].token_ids[0] == bos) == is_added


def test_chats_begin_with_what_the_template_says_unless_told(serve):
    server = serve("a", tokenizer=tiny_tokenizers.sentencepiece(), chat_template="the")
    for fields, is_added in (({}, False), ({"add_special_tokens": True}, True)):
        assert server.post(CHAT, {"messages": USER, "max_tokens": 1} | fields).status_code == 200
        assert (server.engine.seen[-1][0].token_ids[0] == 1) == is_added


def test_tokens_of_a_chat_can_be_spelled_as_ids(serve):
    asked = {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    for server, fields in (
        (serve(), {"return_tokens_as_token_ids": True}),
        (serve(config={"return_tokens_as_token_ids": True}), {}),
    ):
        first = server.engine.tokenizer.encode(TEXT, False)[0]
        (entry,) = server.post(CHAT, asked | fields).json()["choices"][0]["logprobs"]["content"]
        assert entry["token"] == f"token_id:{first}" and bytes(entry["bytes"]).decode() == entry["token"]
        assert [other["token"] for other in entry["top_logprobs"]] == [f"token_id:{first}", f"token_id:{first + 1}"]


def test_what_json_cannot_say_of_a_logprob_is_a_low_number():
    tokenizer = tiny_tokenizers.byte_level()
    names = TokenNames(tokenizer, False)
    entry = TokenLogprobs(70, -math.inf, 9, [(71, -0.5, 1), (72, -math.inf, 2)])
    older = completion_logprobs([entry], [70], 2, names, 0)
    assert older["token_logprobs"] == [LOWEST] and sorted(older["top_logprobs"][0].values()) == [LOWEST, LOWEST, -0.5]
    (newer,) = chat_logprobs([entry], 3, names)["content"]
    assert [newer["logprob"], *(t["logprob"] for t in newer["top_logprobs"])] == [LOWEST, LOWEST, -0.5, LOWEST]
    (_, shown) = prompt_logprobs([None, entry], tokenizer)
    assert LOWEST == -9999.0 and [v["logprob"] for v in shown.values()] == [LOWEST, -0.5, LOWEST]


def test_of_tokens_that_read_alike_the_likeliest_is_shown():
    """Two bytes that are no characters: who compares the token with the best must see that it was not the best."""
    tokenizer = tiny_tokenizers.byte_level()
    one, other = (i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b"\xf0", b"\xf1"))
    entry = TokenLogprobs(one, -5.0, 2, [(other, -0.25, 1), (one, -5.0, 2)])
    found = completion_logprobs([entry], [one], 1, TokenNames(tokenizer, False), 0)
    assert found["token_logprobs"] == [-5.0] and found["top_logprobs"] == [{"\ufffd": -0.25}]


@pytest.mark.parametrize("model, start", [(CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": USER})])
def test_beam_search_takes_its_own_fields(model, start):
    fields = {"n": 3, "length_penalty": 0.5, "ignore_eos": True, "include_stop_str_in_output": True, "priority": 4}
    fields |= {"skip_special_tokens": False}
    params = model(**start, use_beam_search=True, **fields).params({}, 7)
    assert {name: getattr(params, name) for name in fields} == fields and params.max_tokens == 7


def test_a_chat_can_be_searched_by_beams(server):
    body = {"messages": USER, "use_beam_search": True, "n": 2, "max_tokens": 3}
    first, second = server.post(CHAT, body).json()["choices"]
    assert (first["index"], second["index"]) == (0, 1) and first["message"]["content"] != second["message"]["content"]
    chunks = server.events(CHAT, body)[2:-1]
    texts = {c["choices"][0]["index"]: c["choices"][0]["delta"].get("content") for c in chunks}
    assert texts == {i: c["message"]["content"] for i, c in enumerate((first, second))}


def test_a_chat_tells_cached_tokens_and_usage_when_flags_ask(serve):
    server = serve(config={"enable_prompt_tokens_details": True, "enable_force_include_usage": True})
    server.engine.num_cached_tokens = 4
    usage = server.post(CHAT, {"messages": USER}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    assert server.events(CHAT, {"messages": USER})[-2]["usage"] == usage


@pytest.mark.parametrize("body", [{"prompt": "Hello 🙂"}, {"messages": USER}])
def test_token_strings_are_the_vocabularys(server, body):
    answer = server.post("/tokenize", body | {"return_token_strs": True}).json()
    assert answer["token_strs"] == [server.engine.tokenizer.piece(i) for i in answer["tokens"]]


def test_tokenize_takes_what_a_chat_takes(serve):
    tool = {"type": "function", "function": {"name": "f"}}
    template = "{{ messages[-1].content }}|{{ mood }}|{{ tools | length if tools else 0 }}"
    template += "{% if add_generation_prompt %}|go{% endif %}"
    server = serve(chat_template=template, config={"trust_request_chat_template": True})

    def text(**fields):
        tokens = server.post("/tokenize", {"messages": USER, **fields}).json()["tokens"]
        return server.post("/detokenize", {"tokens": tokens}).json()["prompt"]

    assert text() == "Hi||0|go" and text(add_generation_prompt=False) == "Hi||0"
    assert text(tools=[tool], chat_template_kwargs={"mood": "glad"}) == "Hi|glad|1|go"
    assert text(chat_template="own {{ messages[0].content }}") == "own Hi"
    assert text(add_generation_prompt=False, continue_final_message=True) == "Hi"


def test_access_lines_can_be_switched_off(serve, caplog):
    caplog.set_level("INFO", logger="openai_api.access")
    server = serve(config={"disable_access_log": True})
    server.client.get("/v1/models"), server.client.get("/v1/models")
    assert not [record for record in caplog.records if record.name == "openai_api.access"]


@pytest.mark.parametrize("config, is_told", [({}, True), ({"disable_log_stats": True}, False)])
def test_statistics_are_logged_unless_switched_off(serve, caplog, config, is_told):
    caplog.set_level("INFO", logger="runtime.statistics")
    server = serve(config=config | {"log_stats_interval_s": 0.01})
    assert hasattr(server.app.ctx, "teller") == is_told

    def is_seen():
        server.engine.metrics.counters["vllm:generation_tokens"] += 5
        return "generated tokens a second" in caplog.text

    if is_told:
        server.wait_for(is_seen)


@pytest.mark.parametrize("model, start", [(CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": USER})])
def test_every_deprecated_constraint_field_is_passed_on(model, start):
    names = ("json", "regex", "choice", "grammar", "whitespace_pattern")
    given = {f"guided_{name}": ["x"] if name == "choice" else "x" for name in names} | {"structural_tag": "x"}
    assert model(**start, **given).guided == given


@pytest.mark.parametrize("path, body", [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": USER})])
def test_empty_stream_options_ask_for_nothing(server, path, body):
    assert server.post(path, body | {"stream_options": {}, "max_tokens": 1}).status_code == 200
