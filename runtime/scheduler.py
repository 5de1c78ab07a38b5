"""The scheduler: who runs in the next step, how many tokens each, and on which pages.

    plan()    -> StepPlan     counts move on at once, as if every token sampled by the step were real
    accept()                  the tokens of a plan were read: counts are made true again
    finish()                  a sequence ends, for whatever reason: pages and slot are free again

Steps are planned ahead of their tokens: plan N+1 is made before step N is read, from counts alone. A sequence that
turns out to have ended at N has a wasted row in N+1; accept() leaves that row out. Its pages and slot are free from
finish() on. That is safe because the device runs steps in order: whoever takes them writes in a later step than the
wasted row. It cannot spoil a findable page either: it writes at or past the last known token, and pages are published
up to the token before it.

A step has one token budget. Decodes come first, then prompts already begun, then waiting sequences in order. All pages
of a prompt are taken when it is admitted, so only decodes can run short; then the newest sequence is preempted, and
computed again later from its prompt and the tokens it had. The oldest is never preempted, and after MAX_PREEMPTIONS a
sequence is admitted only with all the pages it may ever need and is then left alone, so everything ends.

A waiting sequence whose next prefix page is being computed by another one waits for that page instead of computing it
twice: the n choices of one request, or many requests with one system prompt.

No jax. Per-sequence counters live in NumPy arrays indexed by slot, so that a step in which all rows decode costs the
same few array operations for one row as for hundreds.

Dimension key
    X  slots, max_num_seqs     S  rows of a step     M  page-table columns     B  tokens in a page
"""

import bisect
import heapq
import math

import numpy as np

from runtime.errors import ConfigError, RequestRefused
from runtime.pacing import Pace
from runtime.pages import PagePool
from runtime.sequence import Sequence, Status
from runtime.step_plan import StepDraft, StepPlan

MAX_PREEMPTIONS = 4


class Scheduler:
    """Holds the waiting and the running sequences and makes one StepPlan after another.

    Args:
        pool: where pages come from.
        max_num_seqs: rows of a step, and slots.
        max_num_batched_tokens: tokens of a step.
        max_model_len: tokens a sequence may reach.
        policy: "fcfs", or "priority" for lower priority numbers first.
        max_steps: steps that one dispatch may run when every row decodes and nobody waits.
        paces_steps: whether it runs fewer where a step takes long.
        num_drafts: draft tokens a decode may verify in a step; pages are taken for them.
        max_drafting_rows: with more rows decoding nothing is drafted; None for no such limit.
        max_decode_chunk: prompt tokens that may join a step in which others decode; None to go by the pace.

    Attributes:
        pace: told by the caller how long steps take; by it prompts are cut where others decode.
        page_table_XM: int32; row `slot` holds a running sequence's pages in its first num_pages_X[slot] columns.
        num_preemptions: counter.

    Raises:
        ConfigError: the budget cannot hold one token (and its drafts) of every row.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: str = "fcfs",
        max_steps: int = 1,
        paces_steps: bool = False,
        num_drafts: int = 0,
        max_drafting_rows: int | None = None,
        max_decode_chunk: int | None = None,
    ):
        max_drafting_rows = min(max_drafting_rows or max_num_seqs, max_num_seqs)
        if max_num_batched_tokens < (needed := max(max_num_seqs, max_drafting_rows * (1 + num_drafts))):
            raise ConfigError(
                f"max_num_batched_tokens {max_num_batched_tokens} cannot hold {max_num_seqs} rows, or "
                f"{max_drafting_rows} of {1 + num_drafts} tokens; raise it to {needed} or lower max_num_seqs"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_steps, self.paces_steps = max_steps, paces_steps
        self.num_drafts = num_drafts
        self.max_drafting_rows = max_drafting_rows
        self.max_decode_chunk = max_decode_chunk
        self.pace = Pace()
        self.num_preemptions = 0
        self._by_priority = policy == "priority"
        # One counter a slot. A sequence's tokens here include those sampled but not read yet.
        self.page_table_XM = np.zeros((max_num_seqs, math.ceil(max_model_len / pool.page_size)), np.int32)
        self.num_pages_X = np.zeros(max_num_seqs, np.int32)
        self._capacity_X = np.zeros(max_num_seqs, np.int32)  # tokens its pages hold
        self._tokens_X = np.zeros(max_num_seqs, np.int32)
        self._limit_X = np.zeros(max_num_seqs, np.int32)
        self._computed_X = np.zeros(max_num_seqs, np.int32)  # of the prompt; a decode has computed all tokens but one
        self._decodes_X = np.zeros(max_num_seqs, bool)
        self._needs_token_X = np.zeros(max_num_seqs, bool)
        self._unread_X = np.zeros(max_num_seqs, np.int32)  # kept only where _needs_token_X is true
        self._residence_X = np.zeros(max_num_seqs, np.int32)  # a slot's tenants are told apart by it
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._running: list[Sequence] = []  # oldest first
        self._prompting: list[Sequence] = []  # running, prompt not computed yet; oldest first
        self._num_needing_token = 0  # running with needs_token_first
        self._num_stepping_singly = 0  # running with steps_singly
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap; may hold finished ones
        self._num_waiting = 0
        self._computing: dict[bytes, list[Sequence]] = {}  # page hash being computed -> who waits for it
        self._only: set[Sequence] | None = None
        self._arrivals = 0
        self._num_plans = 0
        self._num_departures = 0
        self._generation = 0
        self._decoding: tuple[list[Sequence], np.ndarray] | None = None  # running and past their prompt, and slots

    # ---- what is going on -------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_stepping_singly(self) -> int:
        """Running sequences that need a look of their own at each step."""
        return self._num_stepping_singly

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self._num_waiting or self._running)

    def pages_of(self, sequence: Sequence) -> np.ndarray:
        """A running sequence's page ids, int32: a view into the page table."""
        return self.page_table_XM[sequence.slot, : self.num_pages_X[sequence.slot]]

    # ---- arrivals and ends ------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            RequestRefused: it can never run here.
        """
        self.check(sequence)
        sequence.order = (sequence.priority if self._by_priority else 0, self._arrivals)
        self._arrivals += 1
        self._num_waiting += 1
        self._queue(sequence)

    def check(self, sequence: Sequence) -> None:
        """Sets the sequence's limit and refuses what can never run here. Safe on any thread.

        Raises:
            RequestRefused: the prompt is empty or too long, or needs more pages than there are.
        """
        prompt = len(sequence.prompt_ids)
        if prompt == 0:
            raise RequestRefused("the prompt has no tokens; send at least one", param="prompt")
        generates = sequence.max_tokens != 0
        if prompt + generates > self.max_model_len:
            raise RequestRefused(
                f"the prompt has {prompt:,} tokens; this server holds {self.max_model_len:,} tokens of prompt and "
                "output together. Shorten the prompt",
                param="prompt",
            )
        if sequence.whole_prompt and prompt > self.max_num_batched_tokens:
            raise RequestRefused(
                f"the prompt has {prompt:,} tokens and must be computed in one step, which holds "
                f"{self.max_num_batched_tokens:,}. Shorten the prompt or raise max_num_batched_tokens",
                param="prompt",
            )
        wanted = self.max_model_len if sequence.max_tokens is None else prompt + sequence.max_tokens
        sequence.limit = min(wanted, self.max_model_len)
        if (pages := self._pages_for(self._most_computed(sequence))) > self.pool.num_pages:
            raise RequestRefused(
                f"{prompt:,} prompt tokens and max_tokens {sequence.limit - prompt:,} need {pages:,} pages of "
                f"{self.pool.page_size} tokens; this server has {self.pool.num_pages:,}. Ask for fewer tokens",
                param="max_tokens",
            )

    def finish(self, sequence: Sequence, *, spoiled: bool = False) -> bool:
        """Ends a sequence, wherever it stands; its pages, slot or place in the queue are free at once.

        Args:
            spoiled: its pages may hold bad values (NaN, a failed step): none of them stays findable.

        Returns:
            False when it had ended before; then nothing happens.
        """
        if sequence.status is Status.FINISHED:
            return False
        if sequence.status is Status.RUNNING:
            if spoiled:
                self.pool.unpublish(self.pages_of(sequence).tolist())
            self._leave(sequence, publishes=not spoiled)
        else:
            self._num_waiting -= 1
            if len(self._waiting) > 2 * self._num_waiting + 64:  # mostly finished ones: nobody popped them
                self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
                heapq.heapify(self._waiting)
        sequence.status = Status.FINISHED
        return True

    def recompute_all(self) -> None:
        """Sends every running sequence back to the queue with the tokens it has, for when the device's memory is lost.

        Plans in flight are void: their tokens will be sampled again, the same. Nothing stays in the prefix cache.
        """
        self._generation += 1
        self.pool.reset_prefix_cache()
        for sequence in self._running.copy():
            self._leave(sequence, publishes=False)
            self._wait(sequence)
        for _, sequence in self._waiting:
            sequence.num_unread = 0

    def admit_only(self, sequences: set[Sequence] | None) -> None:
        """Lets only these leave the queue, so that a faulty one can be found by halves; None lets all."""
        self._only = sequences

    def accept(self, plan: StepPlan, token_ids: np.ndarray, counts: np.ndarray | None = None) -> list[int]:
        """Takes in the tokens of a plan; plans are read in the order they were made.

        Args:
            token_ids: `[S]` or `[S, num]`, a row's tokens from its first column.
            counts: `[S]` how many of each row's tokens are real, at most advance_S; None when it is advance_S
                everywhere and advance_S holds nothing over 1.

        Returns:
            The rows whose sequence is still wanted and gained tokens (appended to output_ids), or ended its prompt
            with nothing to generate. Rows of sequences that have ended meanwhile are left out.
        """
        if plan.generation != self._generation:
            return []
        sequences, slots, advance = plan.sequences, plan.slots_S, plan.advance_S
        stays = None  # all of them
        if plan.num_departures != self._num_departures:
            stays = self._residence_X[slots] == plan.residences_S
        if counts is None and stays is None and plan.num_decode == len(sequences) and token_ids.ndim == 1:
            # Nearly every step: each row decodes and gained one token.
            for sequence, token in zip(sequences, token_ids.tolist(), strict=True):
                sequence.output_ids.append(token)
            if self._num_needing_token:
                self._unread_X[slots] -= advance
            return list(range(len(sequences)))
        gained = advance if counts is None else counts
        kept = slice(None) if stays is None else stays.nonzero()[0]
        self._tokens_X[slots[kept]] += gained[kept] - advance[kept]
        self._unread_X[slots[kept]] -= advance[kept]
        live = plan.samples_S.nonzero()[0].tolist()
        if stays is not None:
            live = [row for row in live if stays[row] or self._is_wanted(sequences[row], int(advance[row]))]
        ids, gains = token_ids.reshape(len(sequences), -1).tolist(), gained.tolist()
        for row in live:
            sequences[row].output_ids.extend(ids[row][: gains[row]])
        return live

    def _is_wanted(self, sequence: Sequence, advance: int) -> bool:
        """Whether the tokens of a sequence that left its slot are anyone's; settles its account if it was preempted."""
        if sequence.status is Status.FINISHED:
            return False
        if sequence.status is Status.RUNNING or sequence.num_unread <= 0:
            raise AssertionError(f"{sequence} was admitted again before the tokens of its life before were read")
        sequence.num_unread -= advance
        return True

    # ---- a step -----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Decides the next step. Takes pages and slots, may preempt, and moves all counts on at once."""
        draft = StepDraft()
        self._select_decodes(draft)
        self._grow(draft)
        draft.room = self.max_num_batched_tokens - len(draft.slots) * (1 + draft.num_drafts)
        draft.chunk_room = draft.room
        if len(draft.slots) and (self._prompting or self._num_waiting):
            most = self.max_decode_chunk
            draft.chunk_room = min(draft.room, most) if most else self.pace.chunk(len(draft.slots), draft.room)
        for sequence in self._prompting.copy():
            self._compute_chunk(draft, sequence)
        if self._num_waiting and not draft.preempted:
            self._admit(draft)
        return self._settle(draft)

    def _select_decodes(self, draft: StepDraft) -> None:
        """Puts every sequence that can decode now into the draft, with the steps and drafts this dispatch may hold."""
        if self._decoding is None:
            sequences = [s for s in self._running if self._decodes_X[s.slot]]
            self._decoding = sequences, np.array([s.slot for s in sequences], np.intp)
        draft.sequences, draft.slots = self._decoding
        draft.tokens = self._tokens_X[draft.slots]
        draft.remaining = self._limit_X[draft.slots] - draft.tokens
        if self._num_needing_token:
            is_held = self._needs_token_X[draft.slots] & (self._unread_X[draft.slots] > 0)
            draft.keep((draft.remaining > 0) & ~is_held)
        elif len(draft.slots) and draft.remaining.min() <= 0:
            draft.keep(draft.remaining > 0)
        alone = not self._prompting and not self._num_stepping_singly and len(draft.slots) > 0
        drafts = alone and len(draft.slots) <= self.max_drafting_rows
        if drafts and (not self._num_waiting or not self._free_slots):
            draft.num_drafts = self.num_drafts
        if alone and not self._num_waiting and self.max_steps > 1:
            most = self.pace.window(len(draft.slots), self.max_steps) if self.paces_steps else self.max_steps
            draft.num_steps = min(most, int(draft.remaining.max()))

    def _grow(self, draft: StepDraft) -> None:
        """Takes the pages that the draft's decodes write to, preempting the newest sequences if it must."""
        page_size = self.pool.page_size
        while len(draft.slots):
            slots = draft.slots
            computed = draft.move_on()
            short = (computed > self._capacity_X[slots]).nonzero()[0]
            if not len(short):
                return
            missing = -(-(computed[short] - self._capacity_X[slots[short]]) // page_size)
            if missing.sum() <= self.pool.num_available:
                return self._extend_tables(draft, slots[short], missing)
            if draft.num_steps * (1 + draft.num_drafts) > 1:
                draft.num_steps, draft.num_drafts = 1, 0
            elif (victim := self._victim()) is not None:
                draft.keep(slots != victim.slot)
                draft.preempted.append(victim)
                self._preempt(victim)
            else:  # whoever holds the pages is not to be preempted and will end: the newest of the others sit out
                kept = np.ones(len(slots), bool)
                kept[short[missing.cumsum() > self.pool.num_available]] = False
                draft.keep(kept)

    def _extend_tables(self, draft: StepDraft, slots: np.ndarray, missing: np.ndarray) -> None:
        pages = np.array(self.pool.take(int(missing.sum())), np.int32)
        first = self.num_pages_X[slots]
        if missing.max() > 1:
            offsets = np.arange(len(pages)) - np.repeat(missing.cumsum() - missing, missing)
            columns, rows = np.repeat(first, missing) + offsets, np.repeat(slots, missing)
        else:
            columns, rows = first, slots
        self.page_table_XM[rows, columns] = pages
        self.num_pages_X[slots] = first + missing
        self._capacity_X[slots] += missing * self.pool.page_size
        draft.new_pages.append((rows, columns, pages))

    def _victim(self) -> Sequence | None:
        """The newest running sequence that may be preempted. Not one that has only its last tokens to be read."""
        for sequence in reversed(self._running[1:]):
            slot = sequence.slot
            is_done = self._decodes_X[slot] and self._tokens_X[slot] >= self._limit_X[slot]
            if sequence.num_preemptions < MAX_PREEMPTIONS and not is_done:
                return sequence
        return None

    def _preempt(self, sequence: Sequence) -> None:
        sequence.num_unread = int(self._tokens_X[sequence.slot]) - sequence.num_tokens
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._leave(sequence, publishes=True)
        self._wait(sequence)

    def _compute_chunk(self, draft: StepDraft, sequence: Sequence) -> None:
        """Adds as much of a running sequence's prompt to the draft as there is room for."""
        slot = sequence.slot
        start, total = int(self._computed_X[slot]), int(self._tokens_X[slot])
        is_whole = sequence.whole_prompt and start == 0
        length = min(total - start, draft.room if is_whole else draft.chunk_room)
        if length <= 0:
            return
        draft.room -= length
        draft.chunk_room -= length
        self._computed_X[slot] += length
        ends_prompt = start + length == total
        advance = min(1, int(self._limit_X[slot]) - total) if ends_prompt else 0
        if ends_prompt:
            self._prompting.remove(sequence)
            self._decodes_X[slot] = True
            self._decoding = None
            self._tokens_X[slot] += advance
            self._unread_X[slot] += advance
        may_end = ends_prompt and total + advance >= int(self._limit_X[slot])
        draft.chunks.append((sequence, slot, start, length, ends_prompt, advance, may_end))

    def _admit(self, draft: StepDraft) -> None:
        """Admits waiting sequences in order while there are slots, pages and room for tokens."""
        passed = []
        while self._waiting and self._free_slots and draft.chunk_room > 0:
            sequence = self._waiting[0][1]
            if sequence.status is not Status.WAITING:
                heapq.heappop(self._waiting)
            elif self._only is not None and sequence not in self._only:
                passed.append(heapq.heappop(self._waiting))
            elif sequence.num_unread or (sequence.whole_prompt and len(sequence.prompt_ids) > draft.room):
                break
            elif not self._place(draft, sequence):
                break
        for entry in passed:
            heapq.heappush(self._waiting, entry)

    def _place(self, draft: StepDraft, sequence: Sequence) -> bool:
        """Gives the first waiting sequence a slot and its pages, or lets it wait for a page being computed.

        Returns:
            False when pages are short: it stays first in the queue.
        """
        pool, tokens = self.pool, sequence.num_tokens
        hits, digests = [], sequence.keys.digests
        caches = pool.caches_prefixes and not sequence.whole_prompt
        if caches:
            if len(digests) < tokens // pool.page_size:
                pool.extend_keys(sequence.keys, sequence.token_ids())
            if sequence.reuses_prefix:
                most = (tokens - 1) // pool.page_size  # at least one token is computed, or there is nothing to sample
                hits = pool.find(sequence.keys, most)
                if len(hits) < most and digests[len(hits)] in self._computing:
                    heapq.heappop(self._waiting)
                    self._computing[digests[len(hits)]].append(sequence)
                    return True
        is_protected = sequence.num_preemptions >= MAX_PREEMPTIONS
        num_pages = self._pages_for(self._most_computed(sequence) if is_protected else tokens)
        spare = pool.num_pages // 100 if self._running else 0  # or the first decode to need a page would preempt it
        if num_pages - len(hits) + pool.num_idle(hits) + spare > pool.num_available:
            return False
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        pages = pool.hold(hits) + pool.take(num_pages - len(hits))
        self._occupy(sequence, pages, len(hits) * pool.page_size)
        sequence.num_published, sequence.last_published = len(hits), hits[-1] if hits else None
        for digest in digests[len(hits) : tokens // pool.page_size] if caches else ():
            self._computing.setdefault(digest, [])
        if sequence.num_preemptions == 0 and caches and sequence.reuses_prefix:
            sequence.num_cached_tokens = len(hits) * pool.page_size
            pool.query_tokens += tokens
            pool.hit_tokens += sequence.num_cached_tokens
        draft.admitted.append(sequence)
        draft.new_pages.append((np.full(len(pages), sequence.slot), np.arange(len(pages)), np.array(pages, np.int32)))
        self._compute_chunk(draft, sequence)
        return True

    def _occupy(self, sequence: Sequence, pages: list[int], num_computed: int) -> None:
        """Sets up a free slot for a sequence, every counter anew."""
        slot = sequence.slot = self._free_slots.pop()
        sequence.status = Status.RUNNING
        self.page_table_XM[slot, : len(pages)] = pages
        self.num_pages_X[slot] = len(pages)
        self._capacity_X[slot] = len(pages) * self.pool.page_size
        self._tokens_X[slot] = sequence.num_tokens
        self._unread_X[slot] = 0
        self._limit_X[slot] = sequence.limit
        self._computed_X[slot] = num_computed
        self._decodes_X[slot] = False
        self._needs_token_X[slot] = sequence.needs_token_first
        self._num_needing_token += sequence.needs_token_first
        self._num_stepping_singly += sequence.steps_singly
        bisect.insort(self._running, sequence, key=_order)
        bisect.insort(self._prompting, sequence, key=_order)

    def _leave(self, sequence: Sequence, publishes: bool) -> None:
        """Takes slot and pages from a running sequence; the caller says what becomes of it."""
        slot, pool = sequence.slot, self.pool
        pages = self.pages_of(sequence).tolist()
        decodes = self._decodes_X[slot]
        if pool.caches_prefixes and not sequence.whole_prompt:
            if publishes:
                if decodes:
                    pool.extend_keys(sequence.keys, sequence.token_ids())
                # The last known token may not have been computed yet, and rows in flight write from it on.
                computed = sequence.num_tokens - 1 if decodes else int(self._computed_X[slot])
                self._publish(sequence, computed // pool.page_size)
            if not decodes:
                for digest in sequence.keys.digests[sequence.num_published :]:
                    self._wake(digest)
        pool.release(pages)
        self._running.remove(sequence)
        if not decodes:
            self._prompting.remove(sequence)
        self._num_needing_token -= sequence.needs_token_first
        self._num_stepping_singly -= sequence.steps_singly
        self._residence_X[slot] += 1
        self._num_departures += 1
        self.num_pages_X[slot] = 0
        self._free_slots.append(slot)
        self._decoding = None
        sequence.slot = -1

    def _publish(self, sequence: Sequence, num_pages: int) -> None:
        """Makes a sequence's first num_pages pages findable, as far as they are not yet."""
        keys, first = sequence.keys, sequence.num_published
        last = min(num_pages, len(keys.digests))
        pages = self.page_table_XM[sequence.slot, first:last].tolist()
        publish, computing, before = self.pool.publish, self._computing, sequence.last_published
        for page, digest, content in zip(pages, keys.digests[first:last], keys.contents[first:last], strict=True):
            before = publish(page, digest, content, before)
            if digest in computing:
                self._wake(digest)
        sequence.last_published = before
        sequence.num_published = max(first, last)

    def _wake(self, digest: bytes) -> None:
        """Queues again whoever waited for this page: it is there now, or its computer is gone."""
        for sequence in self._computing.pop(digest, ()):
            self._queue(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._num_waiting += 1
        self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        if sequence.status is Status.WAITING:
            heapq.heappush(self._waiting, (sequence.order, sequence))

    def _settle(self, draft: StepDraft) -> StepPlan:
        """Moves the counts of the decodes on and writes everything down as arrays."""
        self._tokens_X[draft.slots] = draft.tokens + draft.advance
        if self._num_needing_token:
            self._unread_X[draft.slots] += draft.advance
        # Only now, so that no sequence was admitted to this step on pages that this step computes.
        for sequence, _, start, length, *_ in draft.chunks:
            self._publish(sequence, (start + length) // self.pool.page_size)
        self._num_plans += 1
        return draft.settle(self._num_plans - 1, self._generation, self._num_departures, self._residence_X)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)

    def _most_computed(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are ever stored: the last one generated is never read again."""
        return max(len(sequence.prompt_ids), sequence.limit - 1)

    def audit(self) -> None:
        """Checks the books: every page in one place, every slot with one tenant.

        Raises:
            AssertionError: they do not balance.
        """
        self.pool.audit(self.pages_of(sequence).tolist() for sequence in self._running)
        slots = sorted([*self._free_slots, *(sequence.slot for sequence in self._running)])
        if slots != list(range(self.max_num_seqs)):
            raise AssertionError(f"slots held and free are {slots}, not each of {self.max_num_seqs} once")
        if self._running != sorted(self._running, key=_order) or not set(self._prompting) <= set(self._running):
            raise AssertionError("the running sequences are out of order")
        if not self._running and (self._computing or self._num_needing_token or self._num_stepping_singly):
            raise AssertionError("somebody waits for a sequence that is gone")


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
