"""Chat templates that nobody vouches for run in a process of their own, which is killed at its limits.

A sandboxed template cannot reach anything, but it can still loop for hours or build a string of gigabytes, and a thread
cannot be stopped.
"""

import asyncio
import contextlib
import json
import sys

from runtime.chat import rendering
from runtime.errors import RequestRefused

START_LIMIT_S = 20.0  # a worker that cannot even start on a loaded machine


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
        self._free = asyncio.Semaphore(size)
        self._idle: list[asyncio.subprocess.Process] = []

    async def render(self, source: str, variables: dict) -> str:
        """The rendered text.

        Raises:
            RequestRefused: the template is wrong, or was stopped at a limit.
        """
        request = {"source": source, "variables": variables, "max_chars": self.max_chars}
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start()
            try:
                answer = await asyncio.wait_for(self._ask(worker, request), self.limit_s)
            except TimeoutError:
                raise RequestRefused(f"the chat template ran longer than {self.limit_s:g} s", self.param) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise RequestRefused("the chat template needs more memory than it may use", self.param) from None
            else:
                self._idle.append(worker)
                worker = None
            finally:  # also when the caller goes away
                if worker is not None:
                    await _kill(worker)
        if "error" in answer:
            raise RequestRefused(answer["error"], self.param)
        return answer["text"]

    async def start(self) -> None:
        """Starts one worker ahead of the first template."""
        async with self._free:
            if not self._idle:
                self._idle.append(await self._start())

    async def close(self) -> None:
        while self._idle:
            await _kill(self._idle.pop())

    async def _start(self):
        """A worker that has answered once, so that its start is not counted against a template."""
        command = [sys.executable, "-I", rendering.__file__, str(self.max_memory_bytes)]
        pipe = asyncio.subprocess.PIPE
        worker = await asyncio.create_subprocess_exec(
            *command,
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            limit=1 << 20,
            start_new_session=True,  # an interrupt from the keyboard is for the server
        )
        try:
            warm = {"source": "{{ a }}", "variables": {"a": "a"}, "max_chars": 1}
            await asyncio.wait_for(self._ask(worker, warm), START_LIMIT_S)
        except BaseException:
            await _kill(worker)
            raise
        return worker

    async def _ask(self, worker, request):
        data = json.dumps(request).encode()
        worker.stdin.write(rendering.LENGTH.pack(len(data)) + data)
        await worker.stdin.drain()
        (size,) = rendering.LENGTH.unpack(await worker.stdout.readexactly(rendering.LENGTH.size))
        return json.loads(await worker.stdout.readexactly(size))


async def _kill(worker):
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
    worker._transport.close()  # else its pipes wait for the garbage collector
