"""Beam search finds the likeliest continuations, as trying them all does."""

import asyncio
import itertools

import numpy as np
import pytest
import tiny_tokenizers

from runtime.beam import BeamParams, beam_search
from runtime.errors import RequestRefused
from runtime.request import Prompt, RequestOutput, TokenLogprobs

NUM_TOKENS, EOS = 4, 2  # the tokenizer's EOS is token 2


class MarkovEngine:
    """The next token depends on the last one alone."""

    def __init__(self, seed):
        self.tokenizer = tiny_tokenizers.byte_level()
        logits = np.random.default_rng(seed).normal(size=(NUM_TOKENS, NUM_TOKENS)) * 2
        self.logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.num_open = 0

    async def generate(self, prompt, params, request_id, *, priority=0):
        if params.logprobs > 20:
            raise RequestRefused("Requested sample logprobs")
        self.num_open += 1
        try:
            await asyncio.sleep(0)
            row = self.logprobs[prompt.token_ids[-1]]
            ids = sorted(range(NUM_TOKENS), key=lambda i: -row[i])[: params.logprobs]
            top = [(i, float(row[i]), rank + 1) for rank, i in enumerate(ids)]
            yield RequestOutput(0, "", [ids[0]], [TokenLogprobs(*top[0], top)], "length")
        finally:
            self.num_open -= 1


def search(engine, **params):
    async def run():
        return [output async for output in beam_search(engine, Prompt([0]), BeamParams(**params), "r")]

    return asyncio.run(run())


def every_continuation(engine, max_tokens, length_penalty=1.0):
    """All token sequences that end in EOS or are as long as allowed, the best first."""
    found = {}
    for ids in itertools.product(range(NUM_TOKENS), repeat=max_tokens):
        ids = ids[: ids.index(EOS) + 1] if EOS in ids else ids
        total = sum(engine.logprobs[a, b] for a, b in itertools.pairwise((0, *ids)))
        shown = ids[:-1] if ids[-1] == EOS else ids
        found[ids] = (total / (1 + len(shown)) ** length_penalty, list(shown), ids[-1] == EOS)
    return sorted(found.values(), key=lambda item: -item[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keeps_end", [False, True])
def test_wide_beams_find_what_trying_all_finds(seed, length_penalty, keeps_end):
    engine = MarkovEngine(seed)
    options = {"length_penalty": length_penalty, "include_stop_str_in_output": keeps_end}
    outputs = search(engine, n=10, max_tokens=2, **options)
    best = every_continuation(engine, 2, length_penalty)[:10]
    expected = [(ids + [EOS] * (is_end and keeps_end), is_end) for _, ids, is_end in best]
    assert [(output.token_ids, output.finish_reason == "stop") for output in outputs] == expected
    assert engine.num_open == 0


@pytest.mark.parametrize("length_penalty, longest_first", [(1e308, True), (-1e308, False)])
def test_no_length_penalty_is_too_large(length_penalty, longest_first):
    lengths = [
        len(output.token_ids) for output in search(MarkovEngine(0), n=10, max_tokens=2, length_penalty=length_penalty)
    ]
    assert len(set(lengths)) > 1 and lengths == sorted(lengths, reverse=longest_first)


def test_choices_are_numbered_and_say_how_they_ended():
    outputs = search(MarkovEngine(0), n=3, max_tokens=3)
    assert [output.index for output in outputs] == [0, 1, 2] and outputs[0].prompt_token_ids == [0]
    for output in outputs:
        assert output.stop_reason == (EOS if output.finish_reason == "stop" else None)
        assert [entry.token_id for entry in output.logprobs] == output.token_ids


def test_the_end_is_kept_when_asked_for_and_ignored_when_told():
    ended = [o for o in search(MarkovEngine(0), n=4, max_tokens=3, include_stop_str_in_output=True) if o.stop_reason]
    assert ended and all(output.token_ids[-1] == EOS for output in ended)
    assert {o.finish_reason for o in search(MarkovEngine(0), n=4, max_tokens=3, ignore_eos=True)} == {"length"}


@pytest.mark.parametrize(
    "params, says", [({"n": 0, "max_tokens": 1}, "n must"), ({"n": 11, "max_tokens": 1}, "logprobs")]
)
def test_refusals(params, says):
    with pytest.raises(RequestRefused, match=says):
        search(MarkovEngine(0), **params)
