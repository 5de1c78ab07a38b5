"""Compiles constraints, away from the event loop and the engine, and remembers them.

A constraint is untrusted code. A worker process (worker.py) compiles it and walks a few tokens, with bounds on memory
and on wall time, and is killed when it passes one; the next job gets a new worker. Only what a worker did within those
bounds is compiled here, in a thread and with the interpreter's lock released: the same work on the same input, so it
costs what it cost there. Sending the compiled form over instead is not possible, as the library cannot store one; and
keeping matchers in the worker would put two pipe crossings into each step.

Refusals are remembered as well, so that the same bad constraint does not cost a worker twice.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import sys
import threading
from pathlib import Path

import llguidance

from runtime.errors import Busy, ConfigError, RequestRefused
from runtime.grammar import limits
from runtime.grammar.constraint import Constraint
from runtime.grammar.matcher import Matcher, Vocabulary, new_parser
from runtime.worker_process import WorkerProcess

HOME = Path(__file__).resolve().parent.parent.parent
# -P keeps a folder named `runtime` in the current directory from being taken for ours.
PROGRAM = f"import sys; sys.path.insert(0, {str(HOME)!r}); from runtime.grammar.worker import main; main()"
START_S = 60.0  # reading a large tokenizer on a busy machine
JOBS_A_WORKER = 1000  # then a new one, in case memory frays
MAX_MESSAGE = 400  # characters of the library's message that a caller sees


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """A constraint that is known to be good; shared by every request that asks for the same."""

    constraint: Constraint
    vocabulary: Vocabulary
    grammar: str
    parser: llguidance.LLMatcher
    num_bytes: int

    def matcher(self) -> Matcher:
        """A fresh matcher for one choice; microseconds."""
        return Matcher(self.vocabulary, self.grammar, self.parser.deep_copy(), self.constraint.starts_after)


class Compiler:
    """Constraint -> Compiled, through worker processes and a cache.

    Args:
        vocabulary: of the model that is served.
        num_workers: processes, each started when first needed; so many constraints are tried at once. The first costs
            its caller 0.5 to 0.7 s and the machine 91 MiB (49,152 tokens, two cores, November 2026): too much to hold
            where nobody may ever ask.
        max_waiting: constraints that may wait for a worker; more are refused with Busy.
    """

    def __init__(self, vocabulary: Vocabulary, *, num_workers: int = 2, max_waiting: int = 64):
        self.vocabulary = vocabulary
        self.max_waiting = max_waiting
        self.num_killed = 0
        self._cache: collections.OrderedDict[Constraint, Compiled | str] = collections.OrderedDict()
        self._under_way: dict[Constraint, concurrent.futures.Future] = {}
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers, "grammar")

    async def compile(self, constraint: Constraint) -> Compiled:
        """Gives the compiled constraint, from the cache or from a worker.

        Raises:
            RequestRefused: it is invalid, matches nothing, or costs too much.
            Busy: too many others wait.
        """
        found = await asyncio.shield(asyncio.wrap_future(self._submit(constraint)))
        return dataclasses.replace(found, constraint=constraint)

    def compile_now(self, constraint: Constraint) -> Compiled:
        """The same for callers without an event loop; waits."""
        return dataclasses.replace(self._submit(constraint).result(), constraint=constraint)

    def close(self) -> None:
        """Ends the workers; later calls raise."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while self._idle:
            self._idle.pop().stop()

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    def _submit(self, constraint) -> concurrent.futures.Future:
        key = constraint.parts()
        with self._lock:
            if (known := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return _done(known)
            if (future := self._under_way.get(key)) is None:
                if len(self._under_way) >= self.max_waiting:
                    raise Busy(message=f"{self.max_waiting} constraints wait to be compiled; try again later")
                future = self._under_way[key] = self._threads.submit(self._compile, key)
            return future

    def _compile(self, key) -> Compiled:
        try:
            found = self._try(key)
            with self._lock:
                self._remember(key, found)
            return _done(found).result()
        finally:
            with self._lock:
                self._under_way.pop(key, None)

    def _remember(self, key, found):
        self._cache[key] = found
        while len(self._cache) > limits.MAX_CACHED or self._cached_bytes() > limits.MAX_CACHED_BYTES:
            if len(self._cache) == 1:
                break
            self._cache.popitem(last=False)

    def _cached_bytes(self) -> int:
        return sum(len(key.source) + getattr(found, "num_bytes", 0) for key, found in self._cache.items())

    def _try(self, key) -> "Compiled | str":
        """Runs one job in a worker; then, if all is well, does the same here. A string says why not."""
        worker = self._take()
        try:
            answer = worker.ask(dataclasses.asdict(key), limits.COMPILE_S)
        except _WorkerLost as lost:
            self.num_killed += 1
            return f"Grammar error: the {_name(key)} {lost}; make it smaller or simpler."
        self._give_back(worker)
        if "error" in answer:
            return f"Grammar error: {_told(key, answer['error'])}"
        parser = new_parser(self.vocabulary, answer["grammar"])
        if parser.is_error():
            return f"Grammar error: {_told(key, parser.get_error())}"
        return Compiled(key, self.vocabulary, answer["grammar"], parser, answer["bytes"])

    def _take(self) -> "_Worker":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(self.vocabulary)

    def _give_back(self, worker):
        if worker.num_jobs >= JOBS_A_WORKER:
            worker.stop()
            return
        with self._lock:
            self._idle.append(worker)


def _done(found) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    if isinstance(found, str):
        future.set_exception(RequestRefused(found, "structured_outputs"))
    else:
        future.set_result(found)
    return future


def _name(key: Constraint) -> str:
    return {"json": "JSON schema", "structural_tag": "structural tag", "choice": "list of choices"}.get(
        key.kind, key.kind
    )


def _told(key, message: str) -> str:
    """The library's message as a caller may see it: in one line, and not a page of their own source."""
    lines = [line.strip() for line in message.splitlines()]
    told = next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0] if lines else ""
    )
    told = told if len(told) <= MAX_MESSAGE else told[:MAX_MESSAGE] + "…"
    return f"the {_name(key)}: {told}." if told.startswith(("too complex", "no output", "it leads")) else told


class _WorkerLost(Exception):
    """The worker was killed or died; the message says what the constraint did, after its name."""


class _Worker:
    """A process that knows the vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self.num_jobs = 0
        self._process = WorkerProcess([sys.executable, "-P", "-c", PROGRAM])
        start = {
            "tokenizer": vocabulary.json,
            "eos_token_ids": vocabulary.eos_token_ids,
            "vocab_size": vocabulary.vocab_size,
            "max_bytes": limits.COMPILE_BYTES,
        }
        try:
            answer = self.ask(start, START_S)
        except _WorkerLost as lost:
            raise ConfigError(f"the process that compiles constraints did not start: it {lost}") from None
        if not answer["ready"]:
            self.stop()
            raise RequestRefused(answer["error"], "structured_outputs")
        self.num_jobs = 0

    def ask(self, message: dict, timeout_s: float) -> dict:
        """Sends one message and waits for its answer.

        Raises:
            _WorkerLost: no answer in time, or the process ended; it has been killed then.
        """
        self.num_jobs += 1
        try:
            return self._process.ask(message, timeout_s)
        except TimeoutError:
            raise _WorkerLost(f"took more than {timeout_s:g} s to compile") from None
        except EOFError:
            raise _WorkerLost(f"needs more than {limits.COMPILE_BYTES >> 20} MB to compile") from None

    def stop(self) -> None:
        self._process.stop()
