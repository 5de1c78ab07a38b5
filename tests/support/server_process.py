"""A server in a process of its own, ours or another's: started, waited for, measured, and ended for certain."""

import collections
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
TAIL = 40  # lines of output that are shown when a server does not start


class ServerProcess:
    """Runs a command until the server in it answers /v1/models; `with` ends it and all its children.

    Args:
        url: where it will listen; None reads it from the line "... is ready at URL".
        ready_s: how long it may take.

    Attributes:
        url, seconds: where it listens, and how long that took.
        banner: what it printed until then, one string.

    Raises:
        RuntimeError: it ended or was not ready in time; the message has its last lines.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
        ready_s: float = 900.0,
    ):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` ends the server here too
        start = time.perf_counter()
        self._lines: collections.deque[str] = collections.deque(maxlen=2000)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | dict(environment or {}), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self._until_ready(url, start + ready_s)
        except BaseException:
            self.stop()
            raise
        self.seconds = time.perf_counter() - start
        self.banner = "".join(self._lines.copy())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def memory_mib(self) -> int:
        """Resident memory of the process and all its children; shared pages are counted once."""
        return sum(resident_kib(pid) for pid in tree(self._process.pid)) // 1024

    def stop(self, grace_s: float = 20.0) -> None:
        """Asks it to end, then ends its whole process group."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._reader.join(5)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self._lines.extend(lines)

    def _until_ready(self, url: str | None, deadline: float) -> str:
        while time.perf_counter() < deadline and self._process.poll() is None:
            if url is None and (found := re.search(r" is ready at (\S+)", "".join(self._lines.copy()))):
                url = found[1]
            if url is not None and answers(url):
                return url
            time.sleep(0.05)
        self._reader.join(1)
        why = "ended" if self._process.poll() is not None else "was not ready in time"
        raise RuntimeError(f"the server {why}:\n{''.join(list(self._lines)[-TAIL:])}")


def ours(
    model: str | None, *flags: str, ready_s: float = 900.0, environment: Mapping[str, str] | None = None
) -> ServerProcess:
    """Our server on a free port; None is the demo model."""
    words = [sys.executable, "-m", "runtime.serve", *([model] if model else []), "--port", "0", *flags]
    return ServerProcess(words, ready_s=ready_s, environment=environment)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def tree(pid: int) -> list[int]:
    """A process and its children's children, as far as the system tells."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            found += tree(int(child))
    return found


def resident_kib(pid: int) -> int:
    """Proportional resident memory, or plain where the system does not tell it."""
    for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(key):
                return int(line.split()[1])
    return 0


def phases(banner: str) -> dict[str, float]:
    """{phase: seconds} from our banner's last line."""
    found = re.search(r"^  seconds: (.*)$", banner, re.M)
    return (
        {name.strip(): float(spent) for name, spent in re.findall(r"([a-z][a-z ]*?) ([\d.]+)", found[1])}
        if found
        else {}
    )


def weight_mib(banner: str) -> int | None:
    """Megabytes of weights, as our banner's plan has them."""
    found = re.search(r"^  weights +([\d,]+) MiB", banner, re.M)
    return int(found[1].replace(",", "")) if found else None
