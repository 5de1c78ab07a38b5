"""A child process that does work which may never end, or take all memory: it is killed at its limits.

It reads one line of JSON for each job on its standard input and answers with one on its standard output. The child is
made by subprocess, which runs nothing of ours between fork and exec: threads of ours, and JAX has many, could hold any
lock at that moment.
"""

import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from typing import Any

ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME")  # what an interpreter may need; no keys of ours


class WorkerProcess:
    """One process, and the two pipes to it. One thread at a time asks it; any may stop it.

    Args:
        command: of the child, which gets little of our environment.
    """

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is for the server
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"OMP_NUM_THREADS": "1"},
        )
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: Any, timeout_s: float) -> Any:
        """Sends one message and waits for its answer.

        Raises:
            TimeoutError: no answer in time; the process has been killed.
            EOFError: the process has ended.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._read_line(deadline))
        except TimeoutError:
            self.stop()
            raise
        except (OSError, ValueError, EOFError):
            self.stop()
            raise EOFError from None

    def kill(self) -> None:
        """Ends the process; whoever waits for its answer hears of it."""
        self._process.kill()

    def stop(self) -> None:
        """Ends the process and closes its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except OSError:  # a write that never went out
                pass

    def _read_line(self, deadline: float) -> bytes:
        pipe, parts = self._process.stdout, []
        assert pipe is not None
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not parts or not parts[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                if not (part := os.read(pipe.fileno(), 1 << 20)):
                    raise EOFError
                parts.append(part)
        return b"".join(parts)
