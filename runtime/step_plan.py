"""StepPlan: what the scheduler decided for one step, as arrays the host side can copy without looking at a token.

Dimension key
    S  rows of the step     X  slots
"""

import dataclasses
import functools

import numpy as np

from runtime.sequence import Sequence

_EMPTY = np.zeros(0, np.int32)


@dataclasses.dataclass(slots=True, eq=False)
class StepPlan:
    """One step. Rows [0, num_decode) decode: their input is the slot's last sampled token, on the device; the rest are
    chunks, whose tokens the host knows.

    Attributes:
        number: plans are numbered from 0.
        sequences: one a row.
        num_decode: how many rows decode.
        slots_S: each row's slot.
        starts_S: position of each row's first token. After drafts an upper bound; the device has the true length.
        num_new_S: tokens each row brings: 1 for a decode, the chunk's length for others.
        samples_S: bool; the row's last hidden state is wanted. False for a chunk that does not end its prompt.
        may_end_S: bool; the row reaches its limit if it gains all of advance_S.
        advance_S: most tokens the row may gain in this dispatch; 0 where nothing is sampled into the sequence.
        num_steps: steps to run in this dispatch, more than 1 only when every row decodes. A row stops at its advance.
        num_drafts: draft tokens each row may verify in each step; pages are there for them.
        admitted: sequences that got their slot in this step: the slot's device state must be set up. Their
            num_tokens - len(prompt_ids) is the output position of their next token.
        preempted: sequences that lost slot and pages in this plan.
        new_page_slots, new_page_columns, new_page_ids: entries of the page table that this plan set, hits included.
        residences_S, num_departures, generation: the scheduler's own marks, by which it knows when the plan is read
            whose rows still count.
    """

    number: int
    sequences: list[Sequence]
    num_decode: int
    slots_S: np.ndarray
    starts_S: np.ndarray
    num_new_S: np.ndarray
    samples_S: np.ndarray
    advance_S: np.ndarray
    may_end_S: np.ndarray
    num_steps: int
    num_drafts: int
    admitted: list[Sequence]
    preempted: list[Sequence]
    new_page_slots: np.ndarray
    new_page_columns: np.ndarray
    new_page_ids: np.ndarray
    residences_S: np.ndarray
    num_departures: int
    generation: int

    @property
    def is_empty(self) -> bool:
        """Nothing to run: no work at all, or all of it waits for tokens that have not been read."""
        return not self.sequences

    @property
    def gains_one(self) -> bool:
        """No row may gain more than one token in this dispatch."""
        return self.num_steps == 1 and self.num_drafts == 0

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows, drafts not counted."""
        return int(self.num_new_S.sum())


class StepDraft:
    """A plan being made.

    sequences, slots, remaining, tokens and advance describe the decode rows; chunks are (sequence, slot, start, length,
    samples, advance, may_end), a row each.
    """

    def __init__(self):
        self.sequences: list[Sequence] = []
        self.slots = self.remaining = self.tokens = self.advance = _EMPTY
        self.num_steps = 1
        self.num_drafts = 0
        self.room = self.chunk_room = 0  # tokens this step can still take, in all and of prompts
        self.chunks: list[tuple[Sequence, int, int, int, bool, int, bool]] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.new_pages: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # page table rows, columns, ids

    def keep(self, kept: np.ndarray) -> None:
        """Leaves out decode rows. The arrays of a draft are replaced, never written: some are the scheduler's."""
        self.sequences = [self.sequences[row] for row in kept.nonzero()[0].tolist()]
        self.slots, self.tokens, self.remaining = self.slots[kept], self.tokens[kept], self.remaining[kept]
        self.advance = _ones(len(self.slots))

    def move_on(self) -> np.ndarray:
        """Sets how far each row may get in this dispatch; returns the tokens that are then computed."""
        reach = self.num_steps * (1 + self.num_drafts)
        if reach == 1:
            self.advance = _ones(len(self.slots))
            return self.tokens
        self.advance = np.minimum(self.remaining, reach)
        return self.tokens + self.advance - 1

    def settle(self, number: int, generation: int, num_departures: int, residence_X: np.ndarray) -> StepPlan:
        """Writes everything down as arrays, decodes first."""
        num_decode = len(self.slots)
        sequences = self.sequences
        may_end = self.remaining <= self.advance
        columns = [self.slots, self.tokens - 1, _ones(num_decode), _ones(num_decode, bool), self.advance, may_end]
        if self.chunks:
            chunk_sequences, *chunk_columns = zip(*self.chunks, strict=True)
            sequences = [*sequences, *chunk_sequences]
            columns = [
                np.concatenate((decodes, np.array(chunks, decodes.dtype)))
                for decodes, chunks in zip(columns, chunk_columns, strict=True)
            ]
        slots, starts, num_new, samples, advance, may_end = columns
        pages = self.new_pages or [(_EMPTY, _EMPTY, _EMPTY)]
        new_slots, new_columns, new_ids = pages[0] if len(pages) == 1 else map(np.concatenate, zip(*pages, strict=True))
        return StepPlan(
            number=number,
            sequences=sequences,
            num_decode=num_decode,
            slots_S=slots,
            starts_S=starts,
            num_new_S=num_new,
            samples_S=samples,
            advance_S=advance,
            may_end_S=may_end,
            num_steps=self.num_steps,
            num_drafts=self.num_drafts,
            admitted=self.admitted,
            preempted=self.preempted,
            new_page_slots=new_slots,
            new_page_columns=new_columns,
            new_page_ids=new_ids,
            residences_S=residence_X[slots],
            num_departures=num_departures,
            generation=generation,
        )


@functools.lru_cache(maxsize=2048)
def _ones(count: int, dtype: type = np.int32) -> np.ndarray:
    ones = np.ones(count, dtype)
    ones.flags.writeable = False
    return ones
