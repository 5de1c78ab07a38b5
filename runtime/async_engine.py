"""The server's face of the engine: a thread steps, coroutines listen.

Two places of contact only: the inbox, which coroutines fill and the thread empties before each
step, and one `call_soon_threadsafe` a step, which hands every request its new output.

With data parallelism there are several engines, each on a thread and on devices of its own, and a request is sent to
one of them, with all its choices. They share nothing that a step waits for: another design, one program over all
devices with the rows split among them, would make each decode wait for whatever prompt any other replica reads, and
needs its rows balanced in each step. An engine takes the interpreter for well under a millisecond a dispatch.
"""

import asyncio
import collections
import functools
from collections.abc import AsyncIterator, Callable

from runtime.choice import Gain, Gains
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.engine_thread import EngineThread
from runtime.errors import Busy, EngineStopped, NotReady
from runtime.leader import Leader
from runtime.merged_metrics import merged
from runtime.params import SamplingParams
from runtime.request import Prompt, RequestOutput
from runtime.router import Router


class AsyncEngine:
    """Runs engines, replicas of one model, each on its own thread.

    Made by `AsyncEngine.start(config)`. All public methods are for the event loop's thread.

    Args:
        leader: of the other hosts, where the engine has devices on several.

    Attributes:
        engine: the first replica, for what is the same of all.
    """

    def __init__(self, *engines: Engine, leader: Leader | None = None):
        self.engine = engine = engines[0]
        self.tokenizer = engine.tokenizer
        self.metrics = merged([each.metrics for each in engines])
        self.plan = engine.plan
        self.max_model_len = engine.plan.max_model_len
        self.vocab_size = engine.plan.vocab_size
        self.chat_template = engine.loaded.checkpoint.chat_template
        self.default_sampling = engine.loaded.default_sampling
        self.model_path = str(engine.loaded.checkpoint.path)
        self.model_names = [engine.loaded.checkpoint.path.stem]
        self.compiler = engine.grammar_compiler()
        self._listeners: dict[str, Listener] = {}
        self._draining = False
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_id = 0
        self._router = Router(len(engines), engine.plan.page_size)
        self._threads = [
            EngineThread(each, self._deliver, self._on_failure, f"engine {i}" if i else "engine")
            for i, each in enumerate(engines)
        ]

        self._leader = leader
        if leader is not None:
            leader.on_loss = lambda why: self._on_failure(EngineStopped(why))

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        progress: Callable[[str, int, int], None] | None = None,
        leader: Leader | None = None,
    ) -> "AsyncEngine":
        """Loads the model, compiles every step, and returns an engine ready to answer. Blocks."""
        return cls(*Engine.load_replicas(config, progress, leader), leader=leader)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the threads; outputs are delivered on this loop."""
        self._loop = loop
        for thread in self._threads:
            thread.start()

    @property
    def is_healthy(self) -> bool:
        """Every replica lives, and made progress lately if it has work."""
        return self._failure is None and all(thread.is_well for thread in self._threads)

    @property
    def is_accepting(self) -> bool:
        """Whether a new request would be taken now."""
        return self.is_healthy and not self._draining

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and not yet ended."""
        return len(self._listeners)

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs of all n choices as they come; a choice's last one has a finish_reason.

        Closing the generator early aborts the request and gives its pages back.

        Raises:
            RequestRefused: the request can never run; nothing was queued.
            Busy: the queue is full.
            NotReady: the server is draining.
            EngineStopped: the engine is gone.
        """
        if self._failure is not None:
            raise EngineStopped()
        if self._draining:
            raise NotReady("the server is shutting down; send the request to another one")
        if sum(thread.num_waiting for thread in self._threads) >= self.plan.max_queued:
            raise Busy(retry_after_s=1.0)
        # The id inside is ours: what a client sends may repeat.
        self._next_id += 1
        key = f"{self._next_id}"
        choices = self.engine.prepare(key, prompt, params, priority)  # the same for every replica
        replica = self._router.pick(prompt, len(choices))
        thread = self._threads[replica]
        listener = self._listeners[key] = Listener(thread)
        left = len(choices)
        try:
            thread.send(functools.partial(thread.engine.add, choices))
            while left:
                gain = await listener.next()
                choice = gain.choice
                if choice.is_over:  # it ended on a stop string; these tokens came after
                    continue
                output = choice.output(gain)
                if output.finish_reason is not None:
                    left -= 1
                    if not choice.sequence.is_finished:
                        thread.send(functools.partial(thread.engine.abort, key, choice.index))
                yield output
        finally:
            self._listeners.pop(key, None)
            self._router.done(replica, len(choices))
            if left:
                thread.send(functools.partial(thread.engine.abort, key))

    def drain(self) -> None:
        """Refuses new requests from now on; the running ones go on."""
        self._draining = True

    def abort_all(self) -> None:
        """Aborts every open request; their listeners get an error."""
        for key, listener in list(self._listeners.items()):
            thread = listener.thread
            thread.send(functools.partial(thread.engine.abort, key))
            listener.fail(EngineStopped("the server stopped before the answer was complete"))

    def reset_prefix_cache(self) -> None:
        """Forgets every page that nobody holds, before the next step."""
        self._router.forget()
        for thread in self._threads:
            thread.send(thread.engine.reset_prefix_cache)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the threads after the steps in flight."""
        for thread in self._threads:
            thread.ask_to_stop()
        if self.compiler is not None:
            self.compiler.close()
        for thread in self._threads:
            thread.join(timeout_s)
        if self._leader is not None:
            self._leader.stop()

    # On an engine's thread, or a leader's.

    def _deliver(self, gains: Gains) -> None:
        self._on_loop(self._hand_out, gains)

    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        for thread in self._threads:
            thread.ask_to_stop()
        self._on_loop(self._fail_all)

    def _on_loop(self, function, *args) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # Back on the event loop.

    def _hand_out(self, gains: Gains) -> None:
        for gain in gains:
            listener = self._listeners.get(gain.choice.key)
            if listener is not None:
                listener.put(gain)

    def _fail_all(self) -> None:
        for listener in self._listeners.values():
            listener.fail(EngineStopped())


class Listener:
    """What one request's coroutine waits on. All on the event loop.

    A reader who is slower than the engine gets what has come meanwhile as one larger piece.

    Attributes:
        thread: whose engine works for the request.
    """

    def __init__(self, thread: EngineThread):
        self.thread = thread
        self._gains: collections.deque[Gain] = collections.deque()
        self._failure: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, gain: Gain) -> None:
        self._gains.append(gain)
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """Ends the request with an error; what was not read yet is not read any more."""
        self._failure = error
        self._ready.set()

    async def next(self) -> Gain:
        """The next gain.

        Raises:
            Exception: what fail() was given.
        """
        while not self._gains and self._failure is None:
            self._ready.clear()
            await self._ready.wait()
        if self._failure is not None:
            raise self._failure
        gain = self._gains.popleft()
        while self._gains and gain.joins(self._gains[0]):
            gain.join(self._gains.popleft())
        return gain
