"""Which replica a request goes to: where the least is left to do, counting the tokens that are known there already.

Each replica has pages of its own, so a prompt's beginning is found only where it was computed before. The router
remembers which beginnings it sent where, at lengths that double: half of what a conversation shares with its last turn
is recognised at least. A replica may have given those pages up since; then the guess costs a prefill, no more.
"""

import array
import collections
import hashlib

from runtime.request import Prompt

MAX_REMEMBERED = 65_536  # beginnings; the one not asked for the longest is forgotten
# What an open row counts for, in prompt tokens to compute: it slows each later step a little, for as long as it runs.
TOKENS_A_ROW = 32


class Router:
    """Picks replicas and counts what is open on each. One thread calls it.

    Args:
        num_replicas: at least 1.
        page_size: tokens of the shortest beginning that is worth remembering.

    Attributes:
        rows: open choices of each replica.
    """

    def __init__(self, num_replicas: int, page_size: int):
        self.rows = [0] * num_replicas
        self._page_size = page_size
        self._seen: collections.OrderedDict[bytes, set[int]] = collections.OrderedDict()
        self._turn = 0

    def pick(self, prompt: Prompt, num_rows: int) -> int:
        """The replica for a request of so many choices, which count as open there until done()."""
        count = len(self.rows)
        if count == 1:
            self.rows[0] += num_rows
            return 0
        beginnings = self._beginnings(prompt)
        known = [0] * count
        for length, digest in beginnings:
            for replica in self._seen.get(digest, ()):
                known[replica] = length
        costs = [TOKENS_A_ROW * rows - tokens for rows, tokens in zip(self.rows, known, strict=True)]
        best = min(range(count), key=lambda i: (costs[i], self.rows[i], (i - self._turn) % count))
        self._turn = (best + 1) % count
        self.rows[best] += num_rows
        self._remember(beginnings, best)
        return best

    def done(self, replica: int, num_rows: int) -> None:
        """A request that was sent there has ended."""
        self.rows[replica] -= num_rows

    def forget(self) -> None:
        """The replicas' prefix caches were emptied."""
        self._seen.clear()

    def _beginnings(self, prompt: Prompt) -> list[tuple[int, bytes]]:
        """(tokens, digest) of the prompt's beginnings of one page, two, four, …"""
        tokens = array.array("i", prompt.token_ids)
        digest = hashlib.blake2b(repr((prompt.cache_salt, prompt.adapter)).encode(), digest_size=16)
        found, last, length = [], 0, self._page_size
        while length <= len(tokens):
            digest.update(tokens[last:length].tobytes())
            found.append((length, digest.digest()))
            last, length = length, 2 * length
        return found

    def _remember(self, beginnings: list[tuple[int, bytes]], replica: int) -> None:
        for _, digest in beginnings:
            replicas = self._seen.pop(digest, set())
            replicas.add(replica)
            self._seen[digest] = replicas
        while len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
