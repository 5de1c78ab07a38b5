"""Requests go where the least is left to do, and where their beginning is known."""

import random

import pytest

from runtime.request import Prompt
from runtime.router import MAX_REMEMBERED, TOKENS_A_ROW, Router

PAGE = 16


def prompt(*parts, salt=None):
    """A prompt of one run of tokens after another: (first token, how many)."""
    return Prompt([first + i for first, count in parts for i in range(count)], cache_salt=salt)


def test_one_replica_gets_all():
    router = Router(1, PAGE)
    assert [router.pick(prompt((i, 40)), 2) for i in range(3)] == [0, 0, 0]
    assert router.rows == [6]


def test_unrelated_requests_are_spread_evenly():
    router = Router(4, PAGE)
    assert sorted(router.pick(prompt((1000 * i, 40)), 1) for i in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert router.rows == [2, 2, 2, 2]


def test_replicas_that_are_free_take_turns():
    router = Router(3, PAGE)
    picks = []
    for i in range(6):
        picks.append(router.pick(prompt((1000 * i, 40)), 1))
        router.done(picks[-1], 1)
    assert picks == [0, 1, 2, 0, 1, 2] and router.rows == [0, 0, 0]


def test_choices_count_as_rows():
    router = Router(2, PAGE)
    first = router.pick(prompt((0, 4)), 5)
    assert [router.pick(prompt((0, 4)), 1) for _ in range(5)] == [1 - first] * 5
    router.done(first, 5)
    assert router.pick(prompt((0, 4)), 1) == first


def test_a_conversation_stays_where_its_beginning_is():
    router = Router(4, PAGE)
    ask = lambda chat, turn: router.pick(prompt((0, 2 * PAGE), (1000 * (chat + 1), 200 * turn)), 1)
    homes = [ask(chat, 1) for chat in range(8)]
    assert sorted(homes) == [0, 0, 1, 1, 2, 2, 3, 3]  # a system prompt of two pages is worth no queue
    for home in homes:
        router.done(home, 1)
    for turn in range(2, 6):
        for chat, home in enumerate(homes):
            assert ask(chat, turn) == home, (chat, turn)
            router.done(home, 1)


@pytest.mark.parametrize("known", [4 * PAGE, 32 * PAGE])
def test_a_known_beginning_is_worth_as_many_rows_as_it_saves_tokens(known):
    router = Router(2, PAGE)
    home = router.pick(prompt((0, known)), 1)
    worth = known // TOKENS_A_ROW
    picks = [router.pick(prompt((0, known), (9000 + 100 * i, 20)), 1) for i in range(2 * worth + 1)]
    # Once another had to compute it, it is known there too, and the rows become even.
    assert abs(picks.index(1 - home) - worth) <= 1
    assert abs(router.rows[0] - router.rows[1]) <= 1


def test_other_salts_know_nothing_of_each_other():
    router = Router(2, PAGE)
    home = router.pick(prompt((0, 512), salt="a"), 1)
    assert router.pick(prompt((0, 512), salt="b"), 1) == 1 - home
    assert router.pick(prompt((0, 512), salt="a"), 1) == home


def test_a_reset_forgets():
    router = Router(2, PAGE)
    home = router.pick(prompt((0, 512)), 1)
    router.forget()
    assert router.pick(prompt((0, 512)), 1) == 1 - home


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("runtime.router.MAX_REMEMBERED", 100)
    router = Router(2, PAGE)
    for i in range(200):
        router.done(router.pick(prompt((1000 * i, 64)), 1), 1)
    assert len(router._seen) == 100 < MAX_REMEMBERED


def test_random_traffic_is_balanced_and_accounts_settle():
    rng, router, open_requests = random.Random(0), Router(3, PAGE), []
    for _ in range(2000):
        if open_requests and rng.random() < 0.5:
            router.done(*open_requests.pop(rng.randrange(len(open_requests))))
        else:
            rows = rng.randrange(1, 5)
            asked = prompt((rng.randrange(50) * 1000, rng.randrange(1, 300)))
            open_requests.append((router.pick(asked, rows), rows))
        assert sum(router.rows) == sum(rows for _, rows in open_requests) and min(router.rows) >= 0
        assert max(router.rows) - min(router.rows) <= 300 // TOKENS_A_ROW + 8
    for request in open_requests:
        router.done(*request)
    assert router.rows == [0, 0, 0]
