"""Requests without a seed: what they are drawn from, and that neighbours do not matter."""

import random

from runtime import seeds
from runtime.seeds import Seeds


def drawn(seed, prompts):
    source = Seeds(seed)
    return sorted((prompt, source.next(prompt)) for prompt in prompts)


PROMPTS = [(1, 2, 3), (1, 2), (1, 2, 3), (9,), (1, 2, 3)]


def test_the_same_seed_gives_the_same_in_any_order():
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    assert drawn(7, PROMPTS) == drawn(7, shuffled)


def test_every_request_and_every_server_draws_its_own():
    assert len({seed for number in range(3) for _, seed in drawn(number - 1, PROMPTS)}) == 15


def test_choices_fit_a_seed_of_64_bits():
    assert all(0 <= seed < 2**62 for _, seed in drawn(-(2**63), PROMPTS))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(seeds, "MAX_REMEMBERED", 4)
    source = Seeds(0)
    first = source.next([0])
    for i in range(1, 5):
        source.next([i])
    assert len(source._times) == 4 and source.next([0]) == first
