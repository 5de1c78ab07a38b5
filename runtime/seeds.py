"""Seeds for requests that bring none: the same server seed and the same prompts give the same answers.

A seed follows from the server's, from the prompt, and from how often that prompt came before. So it does not depend on
what else runs or in which order, and asking twice still gives two different answers.
"""

import array
import collections
import hashlib
import threading
from collections.abc import Sequence

MAX_REMEMBERED = 16_384  # prompts whose times are counted; the one not asked for the longest is forgotten


class Seeds:
    """Draws seeds. Safe on any thread.

    Args:
        seed: the server's, a 64-bit integer.
    """

    def __init__(self, seed: int):
        self._key = seed.to_bytes(8, "little", signed=True)
        self._times: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._lock = threading.Lock()

    def next(self, token_ids: Sequence[int]) -> int:
        """A seed of 62 bits for one more request of this prompt, so that those of its choices fit 63."""
        prompt = hashlib.blake2b(array.array("q", token_ids).tobytes(), digest_size=16, key=self._key).digest()
        with self._lock:
            times = self._times[prompt] = self._times.pop(prompt, 0) + 1
            if len(self._times) > MAX_REMEMBERED:
                self._times.popitem(last=False)
        digest = hashlib.blake2b(prompt + times.to_bytes(8, "little"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") >> 2
