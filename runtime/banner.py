"""What a person sees while the server starts, and when it is ready."""

import dataclasses
import json
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

STAGES = ("download", "weights", "kernels")


def stage_of(name: str) -> str:
    """Downloads, weights and kernels are stages of their own; any other name is a step being compiled."""
    return name if name.startswith(STAGES) else "steps"


class Starting:
    """Progress of start-up on one stream: a bar on a terminal, one line a stage elsewhere.

    An instance is the `progress` that loading takes: called with (name, done, total), from any thread. Of stages that
    run beside each other the one that began first has the bar, and the others are shown when they end.
    """

    def __init__(self, stream: TextIO = sys.stderr, show: bool = True):
        self.stream = stream
        self.show = show
        self.is_terminal = stream.isatty()
        self.start = time.monotonic()
        self.said: set[str] = set()
        self.drawn = ""  # the stage whose bar is on the last line, which has not ended
        self.drawn_at = 0.0
        self._lock = threading.Lock()

    def __call__(self, name: str, done: int, total: int) -> None:
        if self.show:
            with self._lock:
                self._on(stage_of(name), name, done, total)

    def _on(self, stage: str, name: str, done: int, total: int) -> None:
        if not self.is_terminal:
            if stage not in self.said:
                self.said.add(stage)
                self._line(stage)
            return
        ends, now = done >= total, time.monotonic()
        if ends or (self.drawn in ("", stage) and now - self.drawn_at > 0.05):
            self.drawn_at = now
            if self.drawn in ("", stage):
                self.drawn = "" if ends else stage
            detail = "" if stage == name else f"  {name}"
            self._draw(f"{stage:24.24} {_bar(done, total)} {done:,}/{total:,}{detail}", ends)

    def says(self, text: str) -> None:
        """One line, whatever the stream is."""
        if self.show:
            self._line(text)

    def _line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", file=self.stream, flush=True)

    def _draw(self, text: str, ends: bool) -> None:
        self.stream.write(f"\r\x1b[K{text[:119]}" + ("\n" if ends else ""))
        self.stream.flush()


def _bar(done: int, total: int, width: int = 24) -> str:
    full = width * done // max(1, total)
    return "[" + "=" * full + " " * (width - full) + "]"


def ready(
    url: str,
    model: str,
    reasons: Iterable[tuple[str, str, str]],
    seconds: Mapping[str, float],
    *,
    limits: Any = None,
    needs_key: bool = False,
    body: Mapping | None = None,
    path: str = "/v1/chat/completions",
) -> str:
    """The banner: where, how to ask, what was settled and why, and where the time went.

    Args:
        url: http://host:port, or unix:PATH.
        reasons: (name, value, why) rows of the plan.
        seconds: {phase: seconds}.
        limits: a dataclass of numbers: what one request may ask.
        body, path: the example request.
    """
    times = "  ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items() if spent >= 0.05)
    return "\n".join(
        [
            "",
            f"{model} is ready at {url}",
            "",
            f"  {_curl(url, path, body or {}, needs_key)}",
            "",
            *table(reasons),
            "",
            *_wrapped("limits", dataclasses.asdict(limits) if limits else {}),
            f"  seconds: {times}  in all {sum(seconds.values()):.1f}",
            "",
        ]
    )


def table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """(name, value, why) rows as aligned lines."""
    texts = [tuple(map(str, row)) for row in rows]
    widths = [max((len(row[i]) for row in texts), default=0) for i in (0, 1)]
    return [f"  {name:{widths[0]}}  {value:>{widths[1]}}  {why}".rstrip() for name, value, why in texts]


def _wrapped(title: str, numbers: Mapping[str, float]) -> list[str]:
    if not numbers:
        return []
    words = "  ".join(f"{name}\xa0{number:,}" for name, number in numbers.items())
    lines = textwrap.wrap(words, 110, initial_indent=f"  {title}: ", subsequent_indent="    ", break_on_hyphens=False)
    return [*(line.replace("\xa0", " ") for line in lines), ""]


def _curl(url: str, path: str, body: Mapping, needs_key: bool) -> str:
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if needs_key else ""
    place = f"--unix-socket {url[5:]} http://localhost" if url.startswith("unix:") else url
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {place}{path} -H 'Content-Type: application/json' {key}-d '{quoted}'"
