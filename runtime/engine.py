"""The engine: add, abort, step. `step` is the main loop of the whole system.

Steps overlap: step n + 1 is planned from counts and dispatched while step n still runs; the tokens
of step n feed step n + 1 on the device, and only then are they read here. A sequence that turns out
to have ended at n wastes one row of n + 1.

Dimension key
    S  rows of a step     X  slots     T  tokens of a step     Q  knobs a row     J  likeliest tokens reported
"""

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np

from runtime import buckets
from runtime.admission import Admission
from runtime.batch import FROM_DEVICE, StepBuffer, StepLayout
from runtime.choice import Choice, Gain, Gains
from runtime.config import EngineConfig
from runtime.errors import RequestRefused, StepFailed
from runtime.executables import CompileCounter
from runtime.grammar import Compiler, Vocabulary, fill_masks
from runtime.isolation import Isolation
from runtime.leader import Leader
from runtime.loading import Loaded, load
from runtime.metrics import EngineMetrics
from runtime.pages import PagePool
from runtime.params import SamplingParams
from runtime.request import Prompt, TokenLogprobs
from runtime.sampling import KNOB_FIELDS
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence
from runtime.step_plan import StepPlan
from runtime.step_state import COUNT, FAULTY, LOGPROB, RANK, TOKENS, StepOutput

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Flight:
    """A step that was dispatched and not read yet."""

    plan: StepPlan
    bucket: buckets.Bucket
    buffer: StepBuffer
    out: StepOutput
    single: list[int]  # rows to be looked at one by one: they want logprobs, or are under a grammar
    wants_prompt_logprobs: bool
    stuck: dict[int, str]  # row -> why its grammar can go no further
    dispatched_at: float


class Engine:
    """Batches requests into compiled steps. Not thread-safe: one thread calls it.

    Attributes:
        last_progress: time.monotonic() of the last finished step.
    """

    def __init__(self, loaded: Loaded, metrics: EngineMetrics, compiles: CompileCounter):
        plan = self.plan = loaded.plan
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.metrics = metrics
        self.admission = Admission(loaded)
        self.scheduler = Scheduler(
            PagePool(
                plan.num_pages,
                plan.page_size,
                caches_prefixes=plan.enable_prefix_caching,
                num_spread=plan.num_spread_pages,
            ),
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            policy=plan.scheduling_policy,
            max_steps=plan.max_decode_steps,
            paces_steps=plan.paces_windows,
            num_drafts=plan.speculation.num_drafts,
            max_drafting_rows=plan.speculation.max_rows,
            max_decode_chunk=plan.max_decode_chunk,
        )
        self.last_progress = time.monotonic()
        self._compiles = compiles
        self._compiles_at_start = compiles.count
        self._state = loaded.state
        self._buckets = list(loaded.steps)
        self._layouts = {bucket: StepLayout.of(bucket, plan) for bucket in self._buckets}
        self._knobs_QX = np.zeros((len(KNOB_FIELDS), plan.num_slots), np.int32)
        self._choices: dict[str, list[Choice]] = {}
        self._flight: Flight | None = None
        self._read_at = 0.0  # when the newest step to be read was there
        self._slots_with_tables: set[int] = set()
        self._isolation = Isolation(self.scheduler)
        self._may_stop_V = np.zeros(plan.vocab_size, bool)  # tokens that some request, perhaps gone, stops on

    @classmethod
    def load(cls, config: EngineConfig, progress: Callable[[str, int, int], None] | None = None) -> "Engine":
        """Loads the model and compiles every step. Blocks for seconds to minutes.

        Raises:
            ConfigError, ConversionError: with the cause and the remedy.
        """
        engine, *others = cls.load_replicas(config, progress)
        assert not others, "one engine is one replica"
        return engine

    @classmethod
    def load_replicas(
        cls,
        config: EngineConfig,
        progress: Callable[[str, int, int], None] | None = None,
        leader: Leader | None = None,
    ) -> list["Engine"]:
        """As load, for every replica: config.data_parallel_size engines that share nothing on their devices.

        Args:
            leader: of the other hosts, where the model is on several.
        """
        compiles = CompileCounter()
        found = load(config, progress, leader)
        if leader is not None:
            found = [leader.led(loaded) for loaded in found]
        return [cls(loaded, EngineMetrics(loaded.plan, config, replica=i), compiles) for i, loaded in enumerate(found)]

    # ---- what is going on -------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self._flight is not None or self.scheduler.has_work

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def num_recompiles(self) -> int:
        """Compilations since the engine was ready; stays 0."""
        return self._compiles.count - self._compiles_at_start

    @property
    def num_compiles(self) -> int:
        """Compilations before the engine was ready; few where executables were kept on disk."""
        return self._compiles_at_start

    def grammar_compiler(self) -> Compiler | None:
        """A compiler of structured-output constraints for this model; None when it has no tokenizer."""
        if self.tokenizer is None:
            return None
        return Compiler(Vocabulary(self.tokenizer.backend, sorted(self.loaded.eos_ids), self.plan.vocab_size))

    # ---- arrivals and ends ------------------------------------------------------------------------------------------

    def prepare(self, key: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[Choice]:
        """Checks a request and makes its choices. Safe on any thread; nothing is queued yet.

        Raises:
            RequestRefused: the request can never run here.
        """
        choices = self.admission.choices(key, prompt, params, priority)
        for choice in choices:
            self.scheduler.check(choice.sequence)
        return choices

    def add(self, choices: list[Choice]) -> None:
        """Queues what prepare() made."""
        now = time.monotonic()
        self._choices[choices[0].key] = choices
        for choice in choices:
            choice.arrived = now
            self.scheduler.add(choice.sequence)

    def abort(self, key: str, index: int | None = None) -> None:
        """Ends a request, or one choice of it, wherever it stands; its pages are free at once."""
        for choice in self._choices.get(key, ()):
            if index is None or choice.index == index:
                self._end(choice, "abort" if index is None else "stop")

    def reset_prefix_cache(self) -> None:
        """Forgets every page that nobody holds."""
        self.scheduler.pool.reset_prefix_cache()

    def _end(self, choice: Choice, reason: str, *, spoiled: bool = False) -> None:
        if not self.scheduler.finish(choice.sequence, spoiled=spoiled):
            return
        self.metrics.on_finish(choice, reason, time.monotonic())
        siblings = self._choices[choice.key]
        if all(sibling.sequence.is_finished for sibling in siblings):
            del self._choices[choice.key]

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def step(self) -> Gains:
        """Dispatches the next step, then reads the one before. Returns what that one gave each choice."""
        start = time.monotonic()
        plan = self.scheduler.plan()
        before, self._flight = self._flight, None
        rows = before.plan.sequences if before else []
        gains = Gains()
        try:
            if not plan.is_empty:
                rows = rows + plan.sequences
                self._flight = self._dispatch(plan)
            planned = time.monotonic()
            if before:
                gains = self._read(before)
        except Exception as error:  # the boundary: one request must not take the others with it
            return self._recover(rows, error)
        self.last_progress = time.monotonic()
        bucket = self._flight.bucket if self._flight else None
        self.metrics.on_step(
            self,
            plan,
            host_s=planned - start,
            wall_s=self.last_progress - start,
            num_padding=bucket.num_tokens - plan.num_tokens if bucket else 0,
            bucket=bucket,
        )
        return gains

    def _dispatch(self, plan: StepPlan) -> Flight:
        for sequence in plan.admitted:
            self._admit(sequence.owner)
        buffer, bucket = self._fill(plan)
        single = []
        if self.scheduler.num_stepping_singly:
            single = [row for row, sequence in enumerate(plan.sequences) if sequence.steps_singly]
        masks, stuck = self._masks(plan, bucket, single)
        run = self.loaded.steps[bucket]
        self._state, out = run(self.loaded.weights, self._state, buffer.packed, masks)
        return Flight(plan, bucket, buffer, out, single, bool(buffer.counts[3]), stuck, time.monotonic())

    def _recover(self, rows: list[Sequence], error: Exception) -> Gains:
        """A step failed: everybody is computed again, and whoever is at fault is found and ended."""
        log.error("a step with %d rows failed: %s", len(rows), error, exc_info=error)
        self._flight = None
        self.scheduler.recompute_all()
        self._slots_with_tables.clear()
        self._state = self.loaded.new_state()
        culprit = self._isolation.on_failure(rows)
        gains = Gains()
        if culprit is not None:
            gains.others.append(self._fail(culprit.owner, STEP_RAISED))
        return gains

    def _fill(self, plan: StepPlan) -> tuple[StepBuffer, buckets.Bucket]:
        """The plan as a packed vector, padded to its bucket."""
        num_rows, num_tokens = len(plan.sequences), plan.num_tokens
        bucket = buckets.pick(self._buckets, num_tokens, num_rows, plan.num_decode == num_rows)
        b = StepBuffer(self._layouts[bucket], self.plan.max_num_seqs)
        slots = plan.slots_S
        b.counts[:3] = plan.num_decode, num_rows, num_tokens
        np.cumsum(plan.num_new_S, out=b.cu_q_lens[1 : num_rows + 1])
        b.cu_q_lens[num_rows + 1 :] = num_tokens
        b.kv_lens[:num_rows] = plan.starts_S + plan.num_new_S
        b.slots[:num_rows] = slots
        b.advance[:num_rows] = plan.advance_S
        b.counts[4:] = plan.num_steps, plan.num_drafts
        self._knobs_QX.take(slots, axis=1, out=b.knobs[:, :num_rows])
        num_columns = int(self.scheduler.num_pages_X[slots].max())  # those past a row's last page are not read
        b.page_table[:num_rows, :num_columns] = self.scheduler.page_table_XM[slots, :num_columns]
        b.token_ids[: plan.num_decode] = FROM_DEVICE
        for row in range(plan.num_decode, num_rows):
            sequence, start, length = plan.sequences[row], int(plan.starts_S[row]), int(plan.num_new_S[row])
            first, tokens = int(b.cu_q_lens[row]), sequence.token_ids()
            b.token_ids[first : first + length] = tokens[start : start + length]
            if sequence.owner.params.prompt_logprobs is not None:
                b.counts[3] = num_tokens
                b.next_tokens[row] = tokens[start + length] if start + length < len(tokens) else 0
        return b, bucket

    def _admit(self, choice: Choice) -> None:
        """Sets up the slot that a choice was given."""
        slot, settings = choice.sequence.slot, choice.settings
        choice.scheduled_at = choice.scheduled_at or time.monotonic()
        self._knobs_QX[:, slot] = settings.knobs_Q
        self._may_stop_V[[token for token in choice.stop_ids if token < len(self._may_stop_V)]] = True
        if settings.tables is not None or slot in self._slots_with_tables:
            tables = settings.tables or self.loaded.usual_tables
            self._state = self.loaded.load_tables(self._state, np.int32(slot), tables)
            self._slots_with_tables.discard(slot)
            if settings.tables is not None:
                self._slots_with_tables.add(slot)
        if settings.needs_history or self.plan.speculation.num_drafts:
            # Tokens found in the prefix cache never pass a step.
            tokens = np.zeros(self.plan.max_model_len, np.int32)
            known = choice.sequence.token_ids()
            tokens[: len(known)] = known
            self._state = self.loaded.load_history(self._state, np.int32(slot), tokens)

    def _masks(self, plan: StepPlan, bucket: buckets.Bucket, single: list[int]):
        """(allowed tokens of rows under a grammar, or the neutral device array; the rows that are stuck)."""
        rows = [(row, plan.sequences[row].owner.matcher) for row in single if plan.sequences[row].needs_token_first]
        neutral = self.loaded.no_mask[bucket.num_rows]
        if not rows:
            return neutral, {}
        masks_SW = np.zeros(neutral.shape, np.uint32)
        return masks_SW, fill_masks(rows, masks_SW)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _read(self, flight: Flight) -> Gains:
        """Waits for a step and hands its tokens out."""
        plan, sequences = flight.plan, flight.plan.sequences
        rows_OS = np.asarray(flight.out.rows_OS)[:, : len(sequences)]
        self._time(flight, rows_OS)
        if flight.wants_prompt_logprobs:
            self._take_prompt_logprobs(flight)
        tokens = (rows_OS[TOKENS],) if plan.gains_one else (rows_OS[TOKENS:].T, rows_OS[COUNT])
        rows = self.scheduler.accept(plan, *tokens)
        special = self._special_rows(flight, rows_OS)
        usual = [row for row in rows if row not in special] if special else rows
        ids = rows_OS[TOKENS].tolist()
        gains = Gains([sequences[row].owner for row in usual], [ids[row] for row in usual])
        if special:
            self._read_one_by_one(flight, rows_OS, [row for row in rows if row in special], gains.others)
        if self._isolation.is_active:
            self._isolation.on_success(sequences)
        if flight.out.drafted_E is not None:
            times, tokens, *right = np.asarray(flight.out.drafted_E).tolist()
            self.metrics.on_drafts(times, tokens, right)
        self.metrics.on_tokens(gains, time.monotonic())
        return gains

    def _time(self, flight: Flight, rows_OS: np.ndarray) -> None:
        """The step has just ended: how long it took, from when the device could begin it."""
        now = time.monotonic()
        seconds = now - max(flight.dispatched_at, self._read_at)
        if flight.plan.gains_one:
            self.scheduler.pace.on_step(flight.plan.num_tokens, seconds)
        elif not flight.plan.num_drafts:
            self.scheduler.pace.on_step(flight.plan.num_tokens, seconds / max(1, int(rows_OS[COUNT].max())))
        self._read_at = now

    def _special_rows(self, flight: Flight, rows_OS: np.ndarray) -> set[int]:
        """Rows that may have done anything but gain one token and go on."""
        is_special_S = flight.plan.may_end_S | (rows_OS[COUNT] != 1) | (rows_OS[FAULTY] != 0)
        is_special_S |= self._may_stop_V.take(rows_OS[TOKENS], mode="clip")
        return {*is_special_S.nonzero()[0].tolist(), *flight.single, *flight.stuck}

    def _read_one_by_one(self, flight: Flight, rows_OS: np.ndarray, rows: list[int], gains: list[Gain]) -> None:
        """Appends what each of these rows gained, and ends those that ended or failed."""
        counts, ids = rows_OS[COUNT].tolist(), rows_OS[TOKENS:].T.tolist()
        faults = dict.fromkeys(rows_OS[FAULTY].nonzero()[0].tolist(), NOT_FINITE) | flight.stuck
        logprobs = None
        for row in rows:
            choice: Choice = flight.plan.sequences[row].owner
            gain = Gain(choice, ids[row][: counts[row] - (row in faults)])  # a faulty row's last token means nothing
            if choice.params.logprobs is not None:
                logprobs = logprobs or self._logprobs(flight, rows_OS)
                gain.logprobs = [logprobs(row, choice.params.logprobs) for _ in gain.token_ids]
            if choice.matcher is not None and not all(map(choice.matcher.accept, gain.token_ids)):
                gain.token_ids, faults[row] = [], "the output left its structured-output constraint"
            if row not in faults:
                self._finish(gain)
            if gain.token_ids or gain.finish_reason:
                gains.append(gain)
            else:
                faults.setdefault(row, ENDED_ON_DEVICE)
            if row in faults:
                gains.append(self._fail(choice, faults[row]))

    def _finish(self, gain: Gain) -> None:
        """Ends the choice where its newest token is its last."""
        choice, token = gain.choice, gain.token_ids[-1] if gain.token_ids else None
        if choice.sequence.is_at_limit:
            gain.finish_reason = "length"
        elif token in choice.stop_ids:
            gain.finish_reason = "stop"
            gain.stop_reason = None if token == choice.eos_id else token
        elif choice.matcher is not None and choice.matcher.is_finished and not choice.may_stop:
            gain.finish_reason = "stop"  # only the end could follow, and it is ignored, or held back by min_tokens
        if gain.finish_reason:
            self._end(choice, gain.finish_reason)

    def _fail(self, choice: Choice, message: str) -> Gain:
        self._end(choice, "abort", spoiled=True)
        if message is NOT_FINITE and choice.params.bans_tokens:
            num_good = max(0, len(choice.sequence.output_ids) - 1)
            return Gain(choice, [], error=RequestRefused(NOTHING_LEFT.format(num_good)))
        return Gain(choice, [], error=StepFailed(message))

    def _logprobs(self, flight: Flight, rows_OS: np.ndarray) -> Callable[[int, int], TokenLogprobs]:
        """Reads the step's top logprobs; gives a function from (row, how many) to a token's entry."""
        logprob_S = rows_OS[LOGPROB].view(np.float32)
        ids_SJ, values_SJ = np.asarray(flight.out.top_ids_SJ), np.asarray(flight.out.top_logprobs_SJ)

        def of(row: int, count: int) -> TokenLogprobs:
            token, rank = int(rows_OS[TOKENS, row]), int(rows_OS[RANK, row])
            return TokenLogprobs(token, float(logprob_S[row]), rank, top_list(ids_SJ[row], values_SJ[row], count))

        return of

    def _take_prompt_logprobs(self, flight: Flight) -> None:
        """Adds a chunk's scores to the choices that asked for them."""
        logprob_T, rank_T, ids_TJ, values_TJ = map(np.asarray, flight.out.prompt)
        token_ids, cu = flight.buffer.token_ids, flight.buffer.cu_q_lens
        for row in range(flight.plan.num_decode, len(flight.plan.sequences)):
            sequence = flight.plan.sequences[row]
            choice = sequence.owner
            count = choice.params.prompt_logprobs
            if count is None:
                continue
            found: list[TokenLogprobs | None] = choice.prompt_logprobs or [None]
            choice.prompt_logprobs = found
            first = int(flight.plan.starts_S[row]) + 1  # the position that this chunk's first entry scores
            for t in range(int(cu[row]), int(cu[row + 1])):
                position = first + t - int(cu[row])
                if position != len(found) or position == len(sequence.prompt_ids):
                    continue  # scored before a preemption, or past the prompt
                is_last = t + 1 == cu[row + 1]
                token = int(flight.buffer.next_tokens[row] if is_last else token_ids[t + 1])
                entry = TokenLogprobs(
                    token, float(logprob_T[t]), int(rank_T[t]), top_list(ids_TJ[t], values_TJ[t], count)
                )
                found.append(entry)


NOT_FINITE = "the model produced a number that is not finite for this request; other requests are not affected"
NOTHING_LEFT = (
    "after {} tokens there is none left that this request allows: the constraint on its output, allowed_token_ids, "
    "bad_words and min_tokens contradict each other there (or the model produced a number that is not finite)"
)
ENDED_ON_DEVICE = "the device ended this request before its end; other requests are not affected"
STEP_RAISED = "this request made a step fail; other requests are not affected, and the server log has the cause"


def top_list(ids: np.ndarray, values: np.ndarray, count: int) -> list[tuple[int, float, int]]:
    """(id, logprob, rank) of the `count` likeliest; -1 is all."""
    count = len(ids) if count == -1 else count
    return [
        (i, v, rank + 1) for rank, (i, v) in enumerate(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    ]
