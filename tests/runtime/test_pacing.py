"""Prompts join steps only as far as the others' gaps stay short, whatever the machine."""

import pytest

from runtime.pacing import GAP_S, MIN_CHUNK, MIN_TOKENS, STRETCH, Pace


def learned(cost, sizes=(1, 8, 32, 100, 256, 1000)):
    pace = Pace()
    for size in sizes:
        for _ in range(3):
            pace.on_step(size, cost(size))
    return pace


SLOW = lambda tokens: 0.016 + 0.003 * tokens  # a CPU that pays for every token
FAST = lambda tokens: 0.010 + 0.00003 * tokens  # an accelerator


@pytest.mark.parametrize("num_decode", [1, 8, 32, 64, 128])
@pytest.mark.parametrize("cost", [SLOW, FAST])
def test_a_step_keeps_to_the_gap_and_uses_it(cost, num_decode):
    chunk = learned(cost).chunk(num_decode, 2048)
    limit = max(GAP_S, STRETCH * cost(num_decode))
    assert cost(num_decode + chunk) <= 1.1 * limit or num_decode + chunk == MIN_TOKENS
    assert chunk == 2048 or cost(num_decode + chunk) >= 0.85 * limit


def test_what_was_not_measured_is_taken_in_proportion():
    pace = learned(SLOW, sizes=(32, 96))
    assert pace.seconds(8) == pytest.approx(SLOW(32) / 4)
    assert pace.seconds(64) == pytest.approx(SLOW(64))
    assert pace.seconds(960) == pytest.approx(10 * SLOW(96))


def test_before_the_first_step_a_chunk_is_small():
    assert Pace().seconds(8) == 0.0
    assert [Pace().chunk(n, 1024) for n in (1, 40, 47, 200)] == [MIN_TOKENS - 1, MIN_CHUNK, MIN_CHUNK, MIN_CHUNK]
    assert Pace().chunk(1, 3) == 3


def test_one_slow_step_changes_nothing():
    pace = learned(SLOW)
    before = pace.chunk(16, 1024)
    pace.on_step(32, 30.0)
    assert pace.chunk(16, 1024) == before


def test_a_prompt_always_gets_on_and_never_past_the_room():
    pace = learned(lambda tokens: 5.0 * tokens)
    assert [pace.chunk(n, 1024) for n in (1, 100)] == [MIN_TOKENS - 1, 50]
    assert [pace.chunk(1, room) for room in (0, 1, 7)] == [0, 1, 7]


def test_a_machine_that_becomes_slower_is_noticed():
    pace = learned(FAST)
    assert pace.chunk(16, 512) == 512
    for size in (16, 32, 100, 256, 512):
        for _ in range(5):
            pace.on_step(size, SLOW(size))
    assert pace.chunk(16, 512) < 64


@pytest.mark.parametrize("step_s, steps", [(0.1, 1), (0.025, 1), (0.0102, 3), (0.006, 5), (0.0001, 8)])
def test_a_window_lasts_no_longer_than_a_reader_notices(step_s, steps):
    assert Pace().window(4, 8) == 1
    assert learned(lambda tokens: step_s).window(4, 8) == steps
