"""Given these sequences and this many pages: this plan."""

import numpy as np
import pytest

from runtime.errors import ConfigError, RequestRefused
from runtime.pages import PagePool
from runtime.scheduler import MAX_PREEMPTIONS, Scheduler
from runtime.sequence import Sequence, Status

PAGE = 4


def a_scheduler(*, pages=100, slots=4, budget=16, length=64, caches=False, **more) -> Scheduler:
    pool = PagePool(pages, PAGE, caches_prefixes=caches)
    return Scheduler(pool, max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=length, **more)


def add(scheduler, name, prompt, max_tokens=8, **more) -> Sequence:
    """Queues a sequence; prompt is its tokens, or how many (then no two prompts are alike)."""
    if isinstance(prompt, int):
        prompt = [1000 * scheduler._arrivals + i for i in range(prompt)]
    sequence = Sequence(name, prompt, max_tokens, **more)
    scheduler.add(sequence)
    return sequence


def rows(plan) -> list[tuple[str, int, int]]:
    return [
        (sequence.request_id, start, num_new)
        for sequence, start, num_new in zip(
            plan.sequences, plan.starts_S.tolist(), plan.num_new_S.tolist(), strict=True
        )
    ]


def read(scheduler, plan, token=7, counts=None) -> list[str]:
    """Reads a plan in which every token is the same one; finishes whoever is at its limit."""
    ids = np.full((len(plan.sequences), max(1, *plan.advance_S.tolist())), token, np.int32)
    live = scheduler.accept(plan, ids, None if counts is None else np.array(counts, np.int32))
    for row in live:
        if plan.sequences[row].is_at_limit:
            scheduler.finish(plan.sequences[row])
    scheduler.audit()
    return [plan.sequences[row].request_id for row in live]


def step(scheduler, **more):
    """One step, read at once."""
    plan = scheduler.plan()
    read(scheduler, plan, **more)
    return plan


def steps(scheduler, most=200) -> list:
    """All steps until nothing is left."""
    plans = []
    while scheduler.has_work:
        assert len(plans) < most, "it goes on for ever"
        plans.append(step(scheduler))
    return plans


# ---- what a step holds ----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_one_samples():
    scheduler = a_scheduler()
    add(scheduler, "a", 40, 3)
    plans = steps(scheduler)
    assert [rows(plan) for plan in plans] == [
        [("a", 0, 16)],
        [("a", 16, 16)],
        [("a", 32, 8)],
        [("a", 40, 1)],
        [("a", 41, 1)],
    ]
    assert [plan.samples_S.tolist() for plan in plans] == [[False], [False], [True], [True], [True]]
    assert [plan.advance_S.tolist() for plan in plans] == [[0], [0], [1], [1], [1]]
    assert [plan.num_decode for plan in plans] == [0, 0, 0, 1, 1]


def test_decodes_come_first_then_begun_prompts_then_new_ones():
    scheduler = a_scheduler(budget=16)
    add(scheduler, "a", 4)
    step(scheduler)
    add(scheduler, "b", 20)
    add(scheduler, "c", 9)
    assert rows(step(scheduler)) == [("a", 4, 1), ("b", 0, 15)]
    assert rows(step(scheduler)) == [("a", 5, 1), ("b", 15, 5), ("c", 0, 9)]
    plan = step(scheduler)
    assert rows(plan) == [("a", 6, 1), ("b", 20, 1), ("c", 9, 1)] and plan.num_decode == 3


def test_no_more_rows_than_slots():
    scheduler = a_scheduler(slots=2)
    for name in "abc":
        add(scheduler, name, 2)
    assert [row[0] for row in rows(step(scheduler))] == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_prompts_beside_decodes_keep_to_max_decode_chunk():
    scheduler = a_scheduler(budget=16, max_decode_chunk=5)
    add(scheduler, "a", 4)
    step(scheduler)
    add(scheduler, "b", 14)
    assert [rows(step(scheduler))[1] for _ in range(3)] == [("b", 0, 5), ("b", 5, 5), ("b", 10, 4)]


def test_a_whole_prompt_waits_for_a_step_that_holds_it():
    scheduler = a_scheduler(budget=16)
    add(scheduler, "a", 10, 0)
    add(scheduler, "b", 10, 0, whole_prompt=True)
    assert [rows(plan) for plan in steps(scheduler)] == [[("a", 0, 10)], [("b", 0, 10)]]


def test_a_sequence_with_nothing_to_generate_ends_with_its_prompt():
    scheduler = a_scheduler()
    sequence = add(scheduler, "a", 5, 0)
    plan = scheduler.plan()
    assert plan.samples_S.tolist() == [True] and plan.advance_S.tolist() == [0]
    assert scheduler.plan().is_empty
    assert read(scheduler, plan) == ["a"]
    assert sequence.is_finished and sequence.output_ids == []


def test_new_pages_are_listed_where_the_page_table_has_them():
    scheduler = a_scheduler()
    sequence = add(scheduler, "a", 7, 6)
    seen = {}
    for _ in range(3):
        plan = step(scheduler)
        entries = zip(plan.new_page_columns.tolist(), plan.new_page_ids.tolist(), strict=True)
        assert set(plan.new_page_slots.tolist()) <= {sequence.slot}
        seen |= dict(entries)
        assert scheduler.pages_of(sequence).tolist() == [seen[column] for column in range(len(seen))]
    assert len(seen) == 3


def test_an_idle_scheduler_plans_nothing_and_starts_by_itself():
    scheduler = a_scheduler()
    assert scheduler.plan().is_empty and not scheduler.has_work
    add(scheduler, "a", 3)
    assert scheduler.has_work and rows(scheduler.plan()) == [("a", 0, 3)]


# ---- ahead of the tokens --------------------------------------------------------------------------------------------


def test_steps_are_planned_ahead_of_their_tokens():
    scheduler = a_scheduler()
    sequence = add(scheduler, "a", 3, 3)
    plans = [scheduler.plan() for _ in range(4)]
    assert [rows(plan) for plan in plans] == [[("a", 0, 3)], [("a", 3, 1)], [("a", 4, 1)], []]
    for token, plan in enumerate(plans[:3]):
        read(scheduler, plan, token=token)
    assert sequence.output_ids == [0, 1, 2] and sequence.is_finished


def test_the_wasted_row_of_a_finished_sequence_changes_nothing():
    scheduler = a_scheduler(slots=1)
    first, second = add(scheduler, "a", 3), add(scheduler, "b", 3)
    ended, wasted = scheduler.plan(), scheduler.plan()
    read(scheduler, ended)
    scheduler.finish(first)
    other = scheduler.plan()  # takes the slot before the wasted row is read
    assert rows(other) == [("b", 0, 3)] and other.slots_S.tolist() == wasted.slots_S.tolist()
    assert read(scheduler, wasted) == []
    assert (first.output_ids, second.output_ids) == ([7], [])
    assert read(scheduler, other) == ["b"]
    assert rows(scheduler.plan()) == [("b", 3, 1)]


def test_a_sequence_that_needs_its_token_sits_out_until_it_is_read():
    scheduler = a_scheduler()
    add(scheduler, "a", 3, needs_token_first=True)
    add(scheduler, "b", 3)
    first = scheduler.plan()
    second = scheduler.plan()
    assert rows(second) == [("b", 3, 1)]
    read(scheduler, first)
    assert rows(scheduler.plan()) == [("a", 3, 1), ("b", 4, 1)]
    assert rows(scheduler.plan()) == [("b", 5, 1)]
    read(scheduler, second)
    assert rows(scheduler.plan()) == [("b", 6, 1)], "its own token is still unread"


# ---- windows and drafts ---------------------------------------------------------------------------------------------


def test_many_steps_in_one_dispatch_when_all_decode_and_nobody_waits():
    scheduler = a_scheduler(max_steps=8, slots=2)
    add(scheduler, "a", 3, 20)
    add(scheduler, "b", 3, 5)
    assert step(scheduler).num_steps == 1
    plan = step(scheduler)
    assert (plan.num_steps, plan.advance_S.tolist()) == (8, [8, 4]), "b stops at its max_tokens"
    add(scheduler, "c", 3, 3)
    add(scheduler, "d", 3, 9)
    assert [step(scheduler).num_steps for _ in range(4)] == [1, 1, 1, 1], "c is admitted, d waits until c has ended"
    assert step(scheduler).num_steps == 8


def test_windows_may_go_by_how_long_a_step_takes():
    scheduler = a_scheduler(max_steps=8, paces_steps=True)
    add(scheduler, "a", 3, 30)
    step(scheduler)
    assert step(scheduler).num_steps == 1, "not timed yet"
    for seconds, steps in [(0.015, 2), (0.0001, 8), (0.04, 1)]:
        for _ in range(5):
            scheduler.pace.on_step(1, seconds)
        assert step(scheduler).num_steps == steps


def test_no_window_past_the_longest_row():
    scheduler = a_scheduler(max_steps=8)
    add(scheduler, "a", 3, 4)
    step(scheduler)
    assert step(scheduler).num_steps == 3


@pytest.mark.parametrize("wish", ["needs_token_first", "steps_singly"])
def test_no_window_beside_a_sequence_that_cannot_take_part(wish):
    scheduler = a_scheduler(max_steps=8, num_drafts=2)
    add(scheduler, "a", 3, 20)
    other = add(scheduler, "b", 3, 20, **{wish: True})
    step(scheduler)
    plan = step(scheduler)
    assert (plan.num_steps, plan.num_drafts) == (1, 0)
    scheduler.finish(other)
    plan = step(scheduler)
    assert (plan.num_steps, plan.num_drafts) == (8, 2)


def test_a_window_takes_the_pages_it_may_write():
    scheduler = a_scheduler(max_steps=8)
    sequence = add(scheduler, "a", 3, 20)
    step(scheduler)
    step(scheduler)  # tokens 3 to 10 are computed, 11 is sampled
    assert len(scheduler.pages_of(sequence)) == 3


def test_a_window_is_given_up_before_anyone_is_preempted():
    scheduler = a_scheduler(pages=4, max_steps=8, length=17)
    add(scheduler, "a", 4, 12)
    add(scheduler, "b", 4, 12)
    step(scheduler)
    plan = step(scheduler)
    assert (plan.num_steps, plan.preempted) == (1, [])


def test_a_window_that_stopped_early_counts_only_real_tokens():
    scheduler = a_scheduler(max_steps=8)
    add(scheduler, "a", 3, 20)
    sequence = add(scheduler, "b", 3, 20)
    step(scheduler)
    step(scheduler, counts=[8, 3])
    assert len(sequence.output_ids) == 4
    assert rows(scheduler.plan()) == [("a", 11, 1), ("b", 6, 1)]


def test_drafts_take_pages_and_budget_and_count_as_they_turn_out():
    with pytest.raises(ConfigError, match="raise it to 16 or lower max_num_seqs"):
        a_scheduler(num_drafts=3, slots=4, budget=15)
    scheduler = a_scheduler(num_drafts=3, slots=4, budget=16)
    sequence = add(scheduler, "a", 4, 9)
    first = scheduler.plan()
    plan = scheduler.plan()
    assert (plan.num_drafts, plan.advance_S.tolist()) == (3, [4])
    assert len(scheduler.pages_of(sequence)) == 2
    read(scheduler, first)
    read(scheduler, plan, counts=[2])
    assert len(sequence.output_ids) == 3
    plan = scheduler.plan()
    assert rows(plan) == [("a", 6, 1)] and plan.advance_S.tolist() == [4]
    assert scheduler.plan().advance_S.tolist() == [2], "never past max_tokens, even if all drafts are right"


# ---- pages run out --------------------------------------------------------------------------------------------------


def test_the_newest_is_preempted_and_computed_again_with_what_it_had():
    scheduler = a_scheduler(pages=4, length=16)
    old, new = add(scheduler, "old", 6, 6), add(scheduler, "new", 6, 6)
    for _ in range(3):
        step(scheduler)
    plan = step(scheduler)  # both need a third page
    assert plan.preempted == [new] and rows(plan) == [("old", 8, 1)]
    assert (new.status, new.slot, new.num_preemptions, len(new.output_ids)) == (Status.WAITING, -1, 1, 3)
    plans = steps(scheduler)
    back = next(plan for plan in plans if new in plan.admitted)
    assert rows(back) == [("new", 0, 9)] and back.samples_S.tolist() == [True]
    assert len(new.output_ids) == len(old.output_ids) == 6
    assert scheduler.num_preemptions == 1


def test_a_preempted_sequence_keeps_the_token_that_was_on_its_way():
    scheduler = a_scheduler(pages=4, length=16)
    add(scheduler, "old", 6, 6)
    new = add(scheduler, "new", 6, 6)
    plans = [scheduler.plan()]
    while not plans[-1].preempted:
        plans.append(scheduler.plan())
        read(scheduler, plans[-2])
    assert new.num_unread == 0 and len(new.output_ids) == 3
    assert len(plans) == 4
    read(scheduler, plans[-1])
    assert len(new.output_ids) == 3


def test_a_preempted_sequence_waits_until_its_token_is_read():
    scheduler = a_scheduler(pages=4, length=16)
    old, new = add(scheduler, "old", 6, 6), add(scheduler, "new", 6, 6)
    plans = [scheduler.plan() for _ in range(4)]
    assert plans[3].preempted == [new] and new.num_unread == 3
    scheduler.finish(old)
    assert scheduler.plan().is_empty, "its last token is not known yet"
    for plan in plans[:3]:
        read(scheduler, plan)
    assert (new.num_unread, new.output_ids) == (0, [7, 7, 7])
    assert rows(scheduler.plan()) == [("new", 0, 9)]


def test_nobody_is_admitted_on_pages_just_taken_from_another():
    scheduler = a_scheduler(pages=4, length=16, policy="priority")
    add(scheduler, "old", 6, 6)
    add(scheduler, "new", 6, 6)
    for _ in range(3):
        step(scheduler)
    add(scheduler, "urgent", 1, 1, priority=-1)
    plan = step(scheduler)
    assert len(plan.preempted) == 1 and plan.admitted == []


def test_after_enough_preemptions_a_sequence_gets_all_its_pages_and_is_left_alone():
    scheduler = a_scheduler(pages=8, length=33)
    add(scheduler, "old", 4, 13)
    unlucky = add(scheduler, "unlucky", 4, 17)
    unlucky.num_preemptions = MAX_PREEMPTIONS
    step(scheduler)
    assert len(scheduler.pages_of(unlucky)) == 5
    plans = steps(scheduler)
    assert not any(plan.preempted for plan in plans)
    assert any(len(plan.sequences) == 1 and plan.sequences[0] is unlucky for plan in plans), "the old one sat out"


def test_a_sequence_with_only_its_last_token_to_read_is_not_preempted():
    scheduler = a_scheduler(pages=4, length=16, slots=3)
    add(scheduler, "old", 8, 4)
    done = add(scheduler, "done", 8, 1)
    plan = scheduler.plan()
    held_up = scheduler.plan()
    assert held_up.is_empty and not done.num_preemptions
    read(scheduler, plan)
    assert rows(scheduler.plan()) == [("old", 8, 1)]


def test_a_prompt_waits_for_all_its_pages_and_keeps_its_turn():
    scheduler = a_scheduler(pages=6, length=24)
    old = add(scheduler, "old", 12, 2)
    add(scheduler, "long", 14, 2)
    add(scheduler, "short", 1, 2)
    assert rows(step(scheduler)) == [("old", 0, 12)]
    assert rows(step(scheduler)) == [("old", 12, 1)]
    assert old.is_finished
    assert rows(step(scheduler)) == [("long", 0, 14), ("short", 0, 1)]


# ---- the queue ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, expected", [("fcfs", "abcd"), ("priority", "cadb")])
def test_the_policy_decides_who_is_first(policy, expected):
    scheduler = a_scheduler(slots=1, policy=policy)
    for name, priority in zip("abcd", (1, 2, 0, 1), strict=True):
        add(scheduler, name, 2, 1, priority=priority)
    assert "".join(plan.sequences[0].request_id for plan in steps(scheduler)) == expected


def test_under_priority_the_least_urgent_is_preempted():
    scheduler = a_scheduler(pages=4, length=16, policy="priority")
    low = add(scheduler, "low", 6, 6, priority=5)
    add(scheduler, "high", 6, 6, priority=0)
    assert [plan.preempted for plan in steps(scheduler) if plan.preempted] == [[low]]


@pytest.mark.parametrize("num_steps", range(4))
def test_a_sequence_can_be_finished_at_any_time_and_once(num_steps):
    scheduler = a_scheduler(slots=1, caches=True)
    sequences = [add(scheduler, name, 20, 8) for name in "ab"]
    for _ in range(num_steps):
        step(scheduler)
    assert all(scheduler.finish(sequence) for sequence in sequences)
    assert not any(scheduler.finish(sequence) for sequence in sequences)
    scheduler.audit()
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.pool.num_used) == (0, 0, 0)
    assert scheduler.plan().is_empty


def test_a_finished_sequence_in_the_queue_is_never_planned_and_the_rest_keep_their_order():
    scheduler = a_scheduler(slots=1)
    running = add(scheduler, "running", 2, 1)
    waiting = [add(scheduler, str(number), 2, 1) for number in range(200)]
    for sequence in waiting[:150]:
        scheduler.finish(sequence)
    assert scheduler.num_waiting == 51 and len(scheduler._waiting) < 200
    order = [plan.sequences[0] for plan in steps(scheduler)]
    assert order == [running, *waiting[150:]]


REFUSALS = {
    "no tokens": (0, 4, {}, "no tokens"),
    "prompt fills the model": (64, None, {}, "64 tokens.*holds 64"),
    "more pages than there are": (30, 20, {}, "30 prompt tokens and max_tokens 20 need 13 pages of 4.*has 10"),
    "whole prompt over the budget": (17, 0, {"whole_prompt": True}, "17 tokens.*one step, which holds 16"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_can_never_run_is_refused_with_numbers(case):
    prompt, max_tokens, more, says = REFUSALS[case]
    scheduler = a_scheduler(pages=10)
    with pytest.raises(RequestRefused, match=says):
        add(scheduler, "a", prompt, max_tokens, **more)
    assert not scheduler.has_work


@pytest.mark.parametrize("prompt, max_tokens", [(63, None), (64, 0), (60, 99), (1, None)])
def test_what_just_fits_runs_alone_to_its_end(prompt, max_tokens):
    scheduler = a_scheduler(pages=16)
    sequence = add(scheduler, "a", prompt, max_tokens)
    steps(scheduler)
    assert sequence.num_tokens == 64


def test_only_chosen_sequences_leave_the_queue_while_a_faulty_one_is_sought():
    scheduler = a_scheduler()
    sequences = [add(scheduler, name, 2) for name in "abcd"]
    scheduler.plan()
    scheduler.recompute_all()
    scheduler.admit_only(set(sequences[1:3]))
    assert [row[0] for row in rows(step(scheduler))] == ["b", "c"]
    scheduler.admit_only(None)
    assert [row[0] for row in rows(step(scheduler))] == ["b", "c", "a", "d"]


def test_after_the_device_lost_its_memory_everything_is_computed_again():
    scheduler = a_scheduler(caches=True)
    sequence = add(scheduler, "a", 9)
    step(scheduler)
    in_flight = scheduler.plan()
    scheduler.recompute_all()
    scheduler.audit()
    assert read(scheduler, in_flight) == []
    plan = step(scheduler)
    assert rows(plan) == [("a", 0, 10)] and plan.admitted == [sequence]
    assert sequence.output_ids == [7, 7] and sequence.num_preemptions == 0


# ---- the prefix cache -----------------------------------------------------------------------------------------------


PROMPT = list(range(1, 13))  # three full pages


def test_a_known_prompt_leaves_one_token_to_compute():
    scheduler = a_scheduler(caches=True)
    add(scheduler, "a", PROMPT, 1)
    steps(scheduler)
    again = add(scheduler, "again", PROMPT, 1)
    assert rows(step(scheduler)) == [("again", 8, 4)], "the last page would leave nothing to sample from"
    assert again.num_cached_tokens == 8
    assert (scheduler.pool.query_tokens, scheduler.pool.hit_tokens) == (24, 8)


def test_generated_tokens_are_found_in_the_next_turn():
    scheduler = a_scheduler(caches=True)
    first = add(scheduler, "a", PROMPT, 6)
    steps(scheduler)
    add(scheduler, "next turn", [*PROMPT, *first.output_ids, 99], 1)
    assert rows(step(scheduler)) == [("next turn", 16, 3)]


def test_the_page_of_an_uncomputed_last_token_is_not_published():
    scheduler = a_scheduler(caches=True)
    first = add(scheduler, "a", PROMPT, 4)  # 16 tokens, the last one sampled but never computed
    steps(scheduler)
    add(scheduler, "next turn", [*PROMPT, *first.output_ids, 99], 1)
    assert rows(step(scheduler)) == [("next turn", 12, 5)]


def test_choices_of_one_request_wait_for_the_pages_the_first_computes():
    scheduler = a_scheduler(caches=True, budget=8)
    choices = [add(scheduler, f"choice {i}", PROMPT, 4) for i in range(3)]
    assert rows(step(scheduler)) == [("choice 0", 0, 8)]
    assert rows(step(scheduler)) == [("choice 0", 8, 4), ("choice 1", 8, 4)], "two of three pages are known"
    assert rows(step(scheduler)) == [("choice 0", 12, 1), ("choice 1", 12, 1), ("choice 2", 8, 4)]
    tables = [scheduler.pages_of(choice).tolist() for choice in choices]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3


def test_who_waits_for_a_page_is_free_when_its_computer_goes():
    scheduler = a_scheduler(caches=True, budget=4)
    first, second = add(scheduler, "first", PROMPT), add(scheduler, "second", PROMPT)
    assert rows(scheduler.plan()) == [("first", 0, 4)]
    assert rows(scheduler.plan()) == [("first", 4, 4)]
    scheduler.finish(first)
    assert scheduler.num_waiting == 1
    assert rows(scheduler.plan()) == [("second", 8, 4)] and second.num_cached_tokens == 8


def test_pages_are_not_read_in_the_step_that_computes_them():
    scheduler = a_scheduler(caches=True, budget=32)
    add(scheduler, "a", [*PROMPT, 50], 4)
    add(scheduler, "b", [*PROMPT, 51], 4)
    assert rows(step(scheduler)) == [("a", 0, 13)]
    assert rows(step(scheduler)) == [("a", 13, 1), ("b", 12, 1)]


@pytest.mark.parametrize("more", [{"cache_salt": "mine"}, {"adapter": "lora@2"}, {"media": ((0, b"digest"),)}], ids=str)
def test_other_salts_adapters_and_pictures_find_nothing(more):
    scheduler = a_scheduler(caches=True)
    add(scheduler, "a", PROMPT, 1)
    steps(scheduler)
    add(scheduler, "b", PROMPT, 1, **more)
    assert rows(step(scheduler)) == [("b", 0, 12)]


def test_prompt_logprobs_compute_every_token():
    scheduler = a_scheduler(caches=True)
    add(scheduler, "a", PROMPT, 1)
    steps(scheduler)
    add(scheduler, "b", PROMPT, 1, reuses_prefix=False)
    assert rows(step(scheduler)) == [("b", 0, 12)]
    assert scheduler.pool.query_tokens == 12


def test_spoiled_pages_are_never_found():
    scheduler = a_scheduler(caches=True)
    bad = add(scheduler, "bad", PROMPT)
    step(scheduler)
    scheduler.finish(bad, spoiled=True)
    scheduler.audit()
    add(scheduler, "good", PROMPT)
    assert rows(step(scheduler)) == [("good", 0, 12)]


def test_a_preempted_sequence_finds_its_own_pages_again():
    scheduler = a_scheduler(pages=5, length=20, caches=True)
    old = add(scheduler, "old", 6, 10)
    new = add(scheduler, "new", 10, 4)
    plans = steps(scheduler)
    assert [plan.preempted for plan in plans if plan.preempted] == [[new]]
    back = [rows(plan) for plan in plans if new in plan.admitted][1]
    assert back[-1][1] > 0 and old.is_finished
