"""How much one dispatch may hold, by how long it takes: prompt tokens beside decodes, and steps of a window.

As many prompt tokens join a step as keep the gap between the others' tokens short; as many steps make a window as
still reach a reader one by one.

What a step costs is learned from the steps that ran, so that it fits the machine: a CPU without matrix units pays for
every token, an accelerator has room for hundreds beside the decodes at no cost.
"""

import bisect
import collections
import statistics

GAP_S = 0.055  # between two tokens, for a prompt: a reader hardly sees it, and much less costs throughput
STRETCH = 1.5  # where decoding alone takes longer than that: how much longer a step may take for a prompt's sake
SAMPLES = 5  # steps of a size whose median counts
MIN_TOKENS = 48  # of such a step, decodes and all: fewer would read the weights again for a handful of tokens
MIN_CHUNK = 8  # with many decodes: a prompt always gets on
WINDOW_S = 0.03  # tokens of one window reach their reader together: no longer apart than a reader sees


class Pace:
    """Seconds of steps by their number of tokens, in classes of powers of two. One thread uses it."""

    def __init__(self):
        self._samples: dict[int, collections.deque[tuple[float, int]]] = {}
        self._curve: list[tuple[int, float]] | None = None

    def on_step(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long on the device."""
        size = num_tokens.bit_length()
        self._samples.setdefault(size, collections.deque(maxlen=SAMPLES)).append((seconds, num_tokens))
        self._curve = None

    def seconds(self, num_tokens: int) -> float:
        """What a step of so many tokens takes: by those measured, and outside them in proportion. 0 when none was."""
        curve = self._points()
        if not curve:
            return 0.0
        place = bisect.bisect_left(curve, (num_tokens, 0.0))
        tokens, seconds = curve[max(0, place - 1)]
        if place in (0, len(curve)):
            return seconds * num_tokens / tokens
        more, longer = curve[place]
        return seconds + (longer - seconds) * (num_tokens - tokens) / (more - tokens)

    def chunk(self, num_decode: int, most: int) -> int:
        """Prompt tokens that may join a step with so many decodes, at most `most`."""
        fits = min(most, max(MIN_CHUNK, MIN_TOKENS - num_decode))
        if not self._points():
            return fits
        limit_s = max(GAP_S, STRETCH * self.seconds(num_decode))
        too_many = most + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.seconds(num_decode + middle) <= limit_s:
                fits = middle
            else:
                too_many = middle
        return fits

    def window(self, num_decode: int, most: int) -> int:
        """Steps that one dispatch of so many decodes may run, at most `most`: 1 until such a step was timed."""
        seconds = self.seconds(num_decode)
        return max(1, min(most, round(WINDOW_S / seconds))) if seconds else 1

    def _points(self):
        """(tokens, seconds) of each class measured, both growing."""
        if self._curve is None:
            self._curve, longest = [], 0.0
            for _, samples in sorted(self._samples.items()):
                seconds, tokens = (statistics.median_low(column) for column in zip(*samples, strict=True))
                longest = max(longest, seconds)
                self._curve.append((int(tokens), longest))
        return self._curve
