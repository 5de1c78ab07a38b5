"""SamplingParams: what is refused, in which words, and how a meaning with two spellings gets one."""

import math

import pytest

from runtime import params
from runtime.errors import RequestRefused
from runtime.params import SamplingParams

REFUSED = [
    ({"n": 0}, "n must be at least 1, got 0."),
    ({"n": 2, "temperature": 0.0}, "n must be 1 when using greedy sampling, got 2."),
    ({"presence_penalty": 2.5}, "presence_penalty must be in [-2, 2], got 2.5."),
    ({"frequency_penalty": -2.5}, "frequency_penalty must be in [-2, 2], got -2.5."),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero, got 0.0."),
    ({"temperature": -1.0}, "temperature must be non-negative, got -1.0. Use 0 for greedy."),
    ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
    ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01."),
    ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
    ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
    ({"seed": 2**63}, "seed must be a 64-bit integer, got 9223372036854775808."),
    ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
    ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
    ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
    ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty!"),
    ({"bad_words": [""]}, "bad_words cannot contain an empty string."),
    ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 must be a finite number, got nan."),
    ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2."),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be an integer >= 1 or -1, got 0"),
    ({"cache_salt": ""}, "Parameter 'cache_salt' must be a non-empty string if provided."),
    *[({name: math.inf}, f"{name} must be a finite number, got inf.") for name in ("temperature", "top_p", "min_p")],
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_name_the_field_and_the_value(fields, message):
    with pytest.raises(RequestRefused) as refusal:
        SamplingParams(**fields)
    assert str(refusal.value) == message and refusal.value.param in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.0, "frequency_penalty": -2.0}, {"top_p": 1.0}, {"top_k": 0}, {"min_p": 0.0},
        {"min_p": 1.0}, {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"min_tokens": 16},
        {"max_tokens": None, "min_tokens": 99},        {"logprobs": -1}, {"truncate_prompt_tokens": -1},
    ],
    ids=str,
)  # fmt: skip
def test_bounds_are_inclusive(fields):
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields


def test_greedy_switches_the_filters_off():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=7, min_p=0.2)
    assert params.is_greedy and (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


def test_a_tiny_temperature_is_raised_and_said_once(caplog):
    params._say_raised.cache_clear()
    for _ in range(3):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert caplog.text.count("raised to 0.01") == 1


@pytest.mark.parametrize(
    "given, settled",
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {"seed": None}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({}, {"stop": [], "stop_token_ids": [], "bad_words": []}),
        ({"logit_bias": {1: 300, 2: -300.0, 3: 5}}, {"logit_bias": {1: 100.0, 2: -100.0, 3: 5.0}}),
    ],
    ids=str,
)
def test_each_meaning_has_one_spelling(given, settled):
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in settled} == settled


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"logit_bias": {50: 1.0, -1: 1.0}}, r"token_id\(s\) \[50, -1\] in logit_bias .* Vocabulary size: 50"),
        ({"allowed_token_ids": [40]}, "out-of-vocab token id!"),
        ({"stop_token_ids": [50]}, "out of vocabulary"),
        ({"logprobs": 6}, "Requested sample logprobs of 6, which is greater than max allowed: 5"),
        ({"prompt_logprobs": -1}, "Requested prompt logprobs of 50, which is greater than max allowed: 5"),
    ],
)
def test_what_one_model_cannot_do(fields, says):
    with pytest.raises(RequestRefused, match=says):
        SamplingParams(**fields).check_model(vocab_size=50, num_tokens=40, max_logprobs=5)


def test_what_one_model_can_do():
    params = SamplingParams(logit_bias={49: 1.0}, allowed_token_ids=[39], stop_token_ids=[49], logprobs=5)
    params.check_model(vocab_size=50, num_tokens=40, max_logprobs=5)
    SamplingParams(logprobs=-1).check_model(vocab_size=50, max_logprobs=-1)
