"""One engine on a thread of its own.

The inbox is the only way in: what others want of the engine is done between two of its steps. What a step gave is
handed out by a function of the caller's.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable

from runtime.choice import Gains
from runtime.engine import Engine

log = logging.getLogger(__name__)

STALE_S = 30.0  # an engine with work that has not stepped for so long is not well


class EngineThread:
    """Steps an engine while it has work.

    Args:
        engine: nobody else may call what changes it.
        deliver: called on this thread with what each step gave.
        on_failure: called on this thread with the error that ended it.
    """

    def __init__(
        self, engine: Engine, deliver: Callable[[Gains], None], on_failure: Callable[[BaseException], None], name: str
    ):
        self.engine = engine
        self._deliver, self._on_failure = deliver, on_failure
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_well(self) -> bool:
        """It runs, and made progress lately if there is work."""
        if not self._thread.is_alive():
            return False
        return not self.engine.has_work or time.monotonic() - self.engine.last_progress < STALE_S

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row, and what the engine was not told yet."""
        return self.engine.num_waiting + len(self._inbox)

    def send(self, action: Callable[[], None]) -> None:
        """Has the engine do something before its next step."""
        self._inbox.append(action)
        self._wake.set()

    def ask_to_stop(self) -> None:
        """Ends the thread after the step in flight."""
        self._stopping = True
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        """Waits for its end."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._stopping:
                while self._inbox:
                    self._inbox.popleft()()
                if self.engine.has_work:
                    if gains := self.engine.step():
                        self._deliver(gains)
                else:
                    self._wake.wait()
                    self._wake.clear()
        except BaseException as error:  # the boundary: whoever waits must hear of it
            log.exception("the engine stopped")
            self._on_failure(error)
