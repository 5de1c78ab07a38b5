"""The server's face of the engine: one thread steps, coroutines listen.

Two places of contact only: the inbox, which coroutines fill and the thread empties before each
step, and one `call_soon_threadsafe` a step, which hands every request its new output.
"""

import asyncio
import collections
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

from runtime.choice import Gain, Gains
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import Busy, EngineStopped, NotReady
from runtime.params import SamplingParams
from runtime.request import Prompt, RequestOutput

log = logging.getLogger(__name__)

STALE_S = 30.0  # an engine with work that has not stepped for so long is not healthy


class AsyncEngine:
    """Runs an Engine on its own thread.

    Made by `AsyncEngine.start(config)`. All public methods are for the event loop's thread.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.metrics = engine.metrics
        self.plan = engine.plan
        self.max_model_len = engine.plan.max_model_len
        self.vocab_size = engine.plan.vocab_size
        self.chat_template = engine.loaded.checkpoint.chat_template
        self.default_sampling = engine.loaded.default_sampling
        self.model_path = str(engine.loaded.checkpoint.path)
        self.model_names = [engine.loaded.checkpoint.path.stem]
        self.compiler = engine.grammar_compiler()
        self._listeners: dict[str, Listener] = {}
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Event()
        self._stopping = False
        self._draining = False
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_id = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    def start(cls, config: EngineConfig, progress: Callable[[str, int, int], None] | None = None) -> "AsyncEngine":
        """Loads the model, compiles every step, and returns an engine ready to answer. Blocks."""
        return cls(Engine.load(config, progress=progress))

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the engine's thread; outputs are delivered on this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """The thread lives, and made progress lately if it has work."""
        if self._failure is not None or not self._thread.is_alive():
            return False
        return not self.engine.has_work or time.monotonic() - self.engine.last_progress < STALE_S

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
        if self.engine.num_waiting + len(self._inbox) >= self.engine.plan.max_queued:
            raise Busy(retry_after_s=1.0)
        # The id inside is ours: what a client sends may repeat.
        self._next_id += 1
        key = f"{self._next_id}"
        choices = self.engine.prepare(key, prompt, params, priority)
        listener = self._listeners[key] = Listener()
        left = len(choices)
        try:
            self._send(functools.partial(self.engine.add, choices))
            while left:
                gain = await listener.next()
                choice = gain.choice
                if choice.is_over:  # it ended on a stop string; these tokens came after
                    continue
                output = choice.output(gain)
                if output.finish_reason is not None:
                    left -= 1
                    if not choice.sequence.is_finished:
                        self._send(functools.partial(self.engine.abort, key, choice.index))
                yield output
        finally:
            self._listeners.pop(key, None)
            if left and self._failure is None:
                self._send(functools.partial(self.engine.abort, key))

    def drain(self) -> None:
        """Refuses new requests from now on; the running ones go on."""
        self._draining = True

    def abort_all(self) -> None:
        """Aborts every open request; their listeners get an error."""
        for key, listener in list(self._listeners.items()):
            self._send(functools.partial(self.engine.abort, key))
            listener.fail(EngineStopped("the server stopped before the answer was complete"))

    def reset_prefix_cache(self) -> None:
        """Forgets every page that nobody holds, before the next step."""
        self._send(self.engine.reset_prefix_cache)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step in flight."""
        self._stopping = True
        self._wake.set()
        if self.compiler is not None:
            self.compiler.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _send(self, action: Callable[[], None]) -> None:
        """Has the engine's thread do something before its next step."""
        self._inbox.append(action)
        self._wake.set()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                while self._inbox:
                    self._inbox.popleft()()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
                else:
                    self._wake.wait()
                    self._wake.clear()
        except BaseException as error:  # the boundary: whoever waits must hear of it
            log.exception("the engine stopped")
            self._failure = error
            self._on_loop(self._fail_all)

    def _deliver(self, gains: Gains) -> None:
        if gains:
            self._on_loop(self._hand_out, gains)

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
    """

    def __init__(self):
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
