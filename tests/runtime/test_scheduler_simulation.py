"""Random schedules against a virtual device: whatever arrives, stops, is aborted or preempted, nothing goes wrong.

The device runs the plans late and in order, as a real one does. Its memory holds, for each cell of each page, a hash of
the whole prefix up to that token, so that reading a page that was freed, overwritten or never computed is noticed at
once. The next token is a hash of the prefix, so each sequence has one true stream whatever happens to it on the way.
"""

import collections
import random

import numpy as np
import pytest

import runtime.scheduler
from runtime.pages import PagePool, strong_hash
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence, Status

END = 0  # the token that ends a sequence
VOCABULARY = 12
MAX_TURNS = 600


def fold(state: int, token: int) -> int:
    return (state * 1_000_003 + token * 7_919 + 12_345) & 0xFFFFFFFFFFFF


def fold_all(scope: int, tokens: list[int]) -> list[int]:
    """The prefix hash at each position."""
    hashes, state = [], scope
    for token in tokens:
        state = fold(state, token)
        hashes.append(state)
    return hashes


def next_token(state: int, seed: int) -> int:
    return (fold(state, seed) >> 13) % VOCABULARY


def weak_hash(data: bytes) -> bytes:
    """Collides all the time: hits must be true all the same."""
    return bytes([strong_hash(data)[0] % 8])


class Case:
    """What the host and the device know of one sequence besides the scheduler."""

    def __init__(self, seed: int, scope: int, stops_after: int):
        self.seed = seed
        self.scope = scope
        self.stops_after = stops_after  # a stop string is found after so many tokens; the device does not know it

    def true_stream(self, sequence: Sequence) -> list[int]:
        tokens = sequence.prompt_ids.tolist()
        state, outputs = fold_all(self.scope, tokens)[-1], []
        while len(tokens) + len(outputs) < sequence.limit and len(outputs) < self.stops_after:
            outputs.append(next_token(state, self.seed))
            state = fold(state, outputs[-1])
            if outputs[-1] == END:
                break
        return outputs


class Device:
    """Slots, pages and a queue of dispatched steps."""

    def __init__(self, rng: random.Random, num_slots: int, num_pages: int, page_size: int):
        self.rng = rng
        self.page_size = page_size
        self.cells = [-1] * (num_pages * page_size)
        self.tokens, self.hashes, self.tables = ([[] for _ in range(num_slots)] for _ in range(3))
        self.seeds = [0] * num_slots
        self.queue: collections.deque = collections.deque()

    def dispatch(self, plan) -> None:
        admitted = [(s.slot, s.token_ids().tolist(), s.owner) for s in plan.admitted]
        self.queue.append((plan, admitted))

    def lose_memory(self) -> None:
        self.queue.clear()
        self.cells = [-1] * len(self.cells)

    def run_next(self):
        """Runs the oldest dispatched step. Returns its plan, token ids [S, most] and counts [S]."""
        plan, admitted = self.queue.popleft()
        for slot, tokens, case in admitted:
            self.tokens[slot], self.hashes[slot] = tokens, fold_all(case.scope, tokens)
            self.tables[slot], self.seeds[slot] = [], case.seed
        entries = np.stack((plan.new_page_slots, plan.new_page_columns, plan.new_page_ids), 1).tolist()
        for slot, column, page in entries:
            assert column == len(self.tables[slot]), "a page table has a gap, or an entry is written twice"
            self.tables[slot].append(page)
        writes: dict[int, int] = {}
        outputs = []
        rows = zip(
            plan.slots_S.tolist(), plan.starts_S.tolist(), plan.num_new_S.tolist(), plan.advance_S.tolist(), strict=True
        )
        for row, (slot, start, length, advance) in enumerate(rows):
            decodes = row < plan.num_decode
            if decodes:
                known = len(self.tokens[slot]) - 1
                # The host knows an upper bound after drafts, and in the wasted rows of a sequence that has ended.
                is_bound = self.has_drafts or self.tokens[slot][-1] == END
                assert start == known or (start > known and is_bound)
                start = known
            self._check_context(slot, start)
            if decodes:
                outputs.append(self._decode(plan, slot, advance, writes))
                continue
            assert plan.samples_S[row] == (start + length == len(self.tokens[slot]))
            for position in range(start, start + length):
                self._write(slot, position, writes)
            outputs.append([self._sample(slot)] if advance else [])
        for cell, value in writes.items():
            self.cells[cell] = value
        counts = np.array([len(tokens) for tokens in outputs], np.int32)
        ids = np.zeros((len(outputs), max(1, *counts.tolist(), 0)), np.int32)
        for row, tokens in enumerate(outputs):
            ids[row, : len(tokens)] = tokens
        return plan, ids, counts

    has_drafts = False

    def _cell(self, slot: int, position: int) -> int:
        return self.tables[slot][position // self.page_size] * self.page_size + position % self.page_size

    def _check_context(self, slot: int, length: int) -> None:
        cells = [self.cells[self._cell(slot, position)] for position in range(length)]
        assert cells == self.hashes[slot][:length], (
            f"slot {slot} reads pages {self.tables[slot]} that hold other tokens"
        )

    def _write(self, slot: int, position: int, writes: dict[int, int]) -> None:
        cell = self._cell(slot, position)
        assert cell not in writes, "two rows write one cell"
        writes[cell] = self.hashes[slot][position]

    def _sample(self, slot: int) -> int:
        state = self.hashes[slot][-1]
        token = next_token(state, self.seeds[slot])
        self.tokens[slot].append(token)
        self.hashes[slot].append(fold(state, token))
        return token

    def _decode(self, plan, slot: int, advance: int, writes: dict[int, int]) -> list[int]:
        gained: list[int] = []
        for _ in range(plan.num_steps):
            for _ in range(1 + self.rng.randint(0, plan.num_drafts)):  # how many drafts turn out right
                if len(gained) == advance or self.tokens[slot][-1] == END:
                    return gained
                self._write(slot, len(self.tokens[slot]) - 1, writes)
                gained.append(self._sample(slot))
        return gained


class World:
    """A scheduler, a device and the loop between them, all drawn from one seed."""

    def __init__(self, seed: int):
        rng = self.rng = random.Random(seed)
        self.page_size = rng.choice((1, 2, 4))
        num_pages, num_slots = rng.randint(6, 16), rng.randint(1, 4)
        self.is_tight = rng.random() < 0.4  # short prompts, long answers and many rows: pages run out
        if self.is_tight:
            num_slots += 3
        num_drafts, max_steps = rng.choice((0, 0, 2)), rng.choice((1, 1, 4))
        self.max_model_len = rng.randint(4, num_pages * self.page_size + 1)
        if self.is_tight:
            self.max_model_len = min(40, num_pages * self.page_size + 1)
        hash_bytes = rng.choice((strong_hash, strong_hash, strong_hash, weak_hash))
        self.pool = PagePool(
            num_pages,
            self.page_size,
            caches_prefixes=rng.random() < 0.8,
            num_spread=rng.choice((None, num_pages // 2)),
            hash_bytes=hash_bytes,
        )
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=num_slots,
            max_num_batched_tokens=num_slots * (1 + num_drafts) + rng.randint(0, 12),
            max_model_len=self.max_model_len,
            policy=rng.choice(("fcfs", "priority")),
            max_steps=max_steps,
            num_drafts=num_drafts,
            max_decode_chunk=rng.choice((None, None, 3)),
        )
        self.device = Device(rng, num_slots, num_pages, self.page_size)
        self.device.has_drafts = num_drafts > 0
        self.depth = rng.choice((0, 1, 1, 1, 2))  # steps dispatched before the oldest is read
        self.sequences: list[Sequence] = []
        self.prefixes = [[rng.randrange(1, 4) for _ in range(self.max_model_len)] for _ in range(2)]

    def arrive(self) -> None:
        rng = self.rng
        most = min(self.max_model_len - 1, 4 if self.is_tight else 20)
        kind = rng.random()
        length = rng.randint(1, most)
        if kind > 0.95:
            length = min(length, self.scheduler.max_num_batched_tokens)
        shared = rng.randint(0, length)
        prompt = rng.choice(self.prefixes)[:shared] + [rng.randrange(1, VOCABULARY) for _ in range(length - shared)]
        scope = rng.choice((1, 1, 1, 2))
        if self.sequences and rng.random() < 0.3:  # the next turn of a conversation
            before = rng.choice(self.sequences)
            prompt = before.token_ids().tolist() + prompt[: rng.randint(0, 2)]
            prompt = prompt[: min(self.max_model_len - 1, self.scheduler.max_num_batched_tokens)]
            scope = before.owner.scope
        for _ in range(rng.choice((2, 4, 8) if self.is_tight else (1, 1, 1, 2, 3))):
            sequence = Sequence(
                f"r{len(self.sequences)}",
                prompt,
                None if self.is_tight else rng.choice((0, None, 1, rng.randint(1, 12), rng.randint(1, 12))),
                priority=rng.randint(-1, 1),
                cache_salt=None if scope == 1 else "salt",
                needs_token_first=rng.random() < 0.1,
                whole_prompt=kind > 0.95,
                reuses_prefix=rng.random() < 0.9,
                owner=Case(rng.randrange(1000), scope, rng.choice((99, 99, rng.randint(1, 6)))),
            )
            self.scheduler.add(sequence)
            self.sequences.append(sequence)

    def turn(self) -> None:
        """Plans and dispatches one step, then reads the oldest when enough are in flight."""
        findable = {hit.page for hit in self.pool._cached_as if hit is not None}
        oldest = self.scheduler._running[:1]
        plan = self.scheduler.plan()
        self.scheduler.audit()
        if plan.is_empty:
            assert self.device.queue or not self.scheduler.has_work, "work waits, nothing runs, nothing is in flight"
        else:
            self._check(plan, findable, oldest)
            self.device.dispatch(plan)
        if self.device.queue and (plan.is_empty or len(self.device.queue) > self.depth):
            self.read()

    def _check(self, plan, findable: set[int], oldest: list[Sequence]) -> None:
        scheduler = self.scheduler
        assert len(plan.sequences) <= scheduler.max_num_seqs
        num_tokens = plan.num_tokens + plan.num_decode * plan.num_drafts
        assert num_tokens <= scheduler.max_num_batched_tokens
        slots = plan.slots_S.tolist()
        assert slots == [sequence.slot for sequence in plan.sequences] and len(set(slots)) == len(slots)
        assert plan.num_steps == 1 or (plan.num_decode == len(slots) and scheduler.num_waiting == 0)
        assert not set(plan.preempted) & set(oldest), "the oldest was preempted"
        assert not (plan.preempted and plan.admitted), "pages were taken from one to admit another"
        unread = {
            other.sequences[row] for other, _ in self.device.queue for row in other.advance_S.nonzero()[0].tolist()
        }
        readable = findable - set(plan.new_page_ids.tolist())
        for sequence, start, new, advance in zip(
            plan.sequences, plan.starts_S.tolist(), plan.num_new_S.tolist(), plan.advance_S.tolist(), strict=True
        ):
            assert sequence.status is Status.RUNNING
            assert start + advance + new <= sequence.limit + (sequence.max_tokens == 0 or advance == 0)
            pages = scheduler.pages_of(sequence).tolist()
            assert len(set(pages)) == len(pages)
            for page in pages[start // self.page_size : (start + new - 1) // self.page_size + 1]:
                assert self.pool._holders[page] == 1 and page not in readable, "a shared page is written"
            assert not (sequence.needs_token_first and sequence in unread), "planned ahead of a token it needs"

    def read(self) -> None:
        plan, ids, counts = self.device.run_next()
        plain = plan.num_steps == 1 and plan.num_drafts == 0
        if plain and self.rng.random() < 0.5:
            rows = self.scheduler.accept(plan, ids[:, 0] if self.rng.random() < 0.5 else ids)
        else:
            rows = self.scheduler.accept(plan, ids, counts)
        for row in rows:
            sequence = plan.sequences[row]
            assert sequence.status is not Status.FINISHED
            del sequence.output_ids[max(sequence.owner.stops_after, 0) :]
            if sequence.is_at_limit or END in sequence.output_ids or self._is_stopped(sequence):
                expected = sequence.owner.true_stream(sequence)
                assert sequence.output_ids == expected, f"{sequence}: {sequence.output_ids}, alone {expected}"
                assert self.scheduler.finish(sequence)

    def _is_stopped(self, sequence: Sequence) -> bool:
        return len(sequence.output_ids) >= sequence.owner.stops_after

    def meddle(self) -> None:
        """Something from outside, once in a while."""
        dice = self.rng.random()
        if dice < 0.25 and self.sequences:
            victim = self.rng.choice(self.sequences)
            ended = victim.is_finished
            expected = victim.owner.true_stream(victim)[: len(victim.output_ids)]
            assert victim.output_ids == expected
            assert self.scheduler.finish(victim, spoiled=self.rng.random() < 0.2) is not ended
            assert not self.scheduler.finish(victim)
        elif dice < 0.28:
            self.pool.reset_prefix_cache()
        elif dice < 0.30:
            void = [plan for plan, _ in self.device.queue]
            self.scheduler.recompute_all()
            self.device.lose_memory()
            for plan in void:
                assert self.scheduler.accept(plan, np.ones(len(plan.sequences), np.int32)) == []
        self.scheduler.audit()

    def run(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self.arrive()
        more = self.rng.randint(0, 4)
        for _ in range(MAX_TURNS):
            if more and self.rng.random() < 0.2:
                self.arrive()
                more -= 1
            if self.rng.random() < 0.1:
                self.meddle()
            self.turn()
            if not more and not self.scheduler.has_work and not self.device.queue:
                break
        else:
            raise AssertionError(f"not done after {MAX_TURNS} turns: {self.sequences}")
        assert all(sequence.is_finished for sequence in self.sequences)
        assert self.pool.num_used == 0 and self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(sequence.num_preemptions <= runtime.scheduler.MAX_PREEMPTIONS for sequence in self.sequences)


def simulate(seeds) -> collections.Counter:
    seen: collections.Counter = collections.Counter()
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"schedule with seed {seed}: {error!r}") from error
        seen["preempted"] += world.scheduler.num_preemptions
        seen["hits"] += world.pool.hit_tokens
        seen["steps"] += world.scheduler._num_plans
        seen["most preemptions"] = max(
            seen["most preemptions"], *(sequence.num_preemptions for sequence in world.sequences)
        )
    return seen


@pytest.mark.parametrize("block", range(4))
def test_random_schedules(block):
    seen = simulate(range(block * 100, block * 100 + 100))
    assert seen["preempted"] > 10 and seen["hits"] > 10, "the schedules do not reach what they are meant to test"


def test_random_schedules_under_a_preemption_storm(monkeypatch):
    """With a low bound many sequences reach it: they are then admitted with all their pages and left alone."""
    monkeypatch.setattr(runtime.scheduler, "MAX_PREEMPTIONS", 1)
    assert simulate(range(10_000, 10_060))["most preemptions"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("block", range(100))
def test_many_random_schedules(block):
    simulate(range(1_000_000 + block * 1000, 1_000_000 + block * 1000 + 1000))
