"""Chat templates that nobody vouches for run in a process of their own, which is killed at its limits.

A sandboxed template cannot reach anything, but it can still loop for hours or build a string of gigabytes, and a thread
cannot be stopped.
"""

import asyncio
import concurrent.futures
import logging
import sys
import threading

from runtime.chat import rendering
from runtime.errors import RequestRefused
from runtime.worker_process import WorkerProcess

log = logging.getLogger(__name__)

START_LIMIT_S = 20.0  # a worker that cannot even start on a loaded machine
WARM = {"source": "{{ a }}", "variables": {"a": "a"}, "max_chars": 1}


class TemplateWorkers:
    """At most `size` worker processes, started when first needed, each rendering one template at a time.

    Args:
        limit_s: wall time of one rendering; past it the worker is killed and the request refused.
        max_memory_bytes: address space of a worker.
        max_chars: of rendered text.
        param: the field that refusals blame.
    """

    def __init__(
        self,
        size: int = 2,
        limit_s: float = 1.0,
        max_memory_bytes: int = 512 << 20,
        max_chars: int = 4 << 20,
        param: str = "chat_template",
    ):
        self.limit_s, self.max_memory_bytes, self.max_chars = limit_s, max_memory_bytes, max_chars
        self.param = param
        self._threads = concurrent.futures.ThreadPoolExecutor(size, "template")
        self._lock = threading.Lock()
        self._idle: list[WorkerProcess] = []
        self._busy: set[WorkerProcess] = set()

    async def render(self, source: str, variables: dict) -> str:
        """The rendered text. A caller who goes away takes the worker with it.

        Raises:
            RequestRefused: the template is wrong, or was stopped at a limit.
        """
        job = _Job({"source": source, "variables": variables, "max_chars": self.max_chars})
        try:
            answer = await asyncio.wrap_future(self._threads.submit(self._run, job))
        except asyncio.CancelledError:
            job.cancel()
            raise
        except TimeoutError:
            raise RequestRefused(f"the chat template ran longer than {self.limit_s:g} s", self.param) from None
        except EOFError:
            raise RequestRefused("the chat template needs more memory than it may use", self.param) from None
        if "error" in answer:
            raise RequestRefused(answer["error"], self.param)
        return answer["text"]

    async def start(self) -> None:
        """Starts one worker ahead of the first template; where it does not start, that is a warning."""
        try:
            await asyncio.wrap_future(self._threads.submit(lambda: self._give_back(self._take())))
        except (EOFError, TimeoutError):
            log.warning("the process that renders chat templates did not start; the first chat starts another")

    async def close(self) -> None:
        """Ends the workers, those at work too; later calls raise."""
        with self._lock:
            for worker in self._busy:
                worker.kill()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        while self._idle:
            self._idle.pop().stop()

    def _run(self, job: "_Job") -> dict:
        worker = self._take()
        try:
            job.begin(worker)
            answer = worker.ask(job.request, self.limit_s)
        finally:
            with self._lock:
                self._busy.discard(worker)
        if job.end():
            self._give_back(worker)
        else:
            worker.stop()
        return answer

    def _take(self) -> WorkerProcess:
        """An idle worker, or a new one that has answered once, so that its start is not counted against a template."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    self._busy.add(worker)
                    return worker
                worker.stop()
        worker = WorkerProcess([sys.executable, "-I", rendering.__file__, str(self.max_memory_bytes)])
        with self._lock:
            self._busy.add(worker)
        worker.ask(WARM, START_LIMIT_S)
        return worker

    def _give_back(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._busy.discard(worker)
            self._idle.append(worker)


class _Job:
    """One rendering, and the worker that has it."""

    def __init__(self, request: dict):
        self.request = request
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._is_cancelled = False

    def begin(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._worker = worker
            if self._is_cancelled:
                worker.kill()

    def end(self) -> bool:
        """The answer is there; False when the worker was killed nevertheless."""
        with self._lock:
            self._worker = None
            return not self._is_cancelled

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._worker is not None:
                self._worker.kill()
