"""The page pool: who holds each page of KV memory, and which pages hold a prefix that is already known.

A page is in exactly one of three places: free, cached (nobody holds it, but its content may be asked for again), or
used (its reference count is the number of sequences that hold it). Cached pages are the memory of last resort: they
are taken for new work when no page is free, the one released longest ago first.

A full page is found again by a hash of its own tokens and its parent's hash, so one hash speaks for the whole prefix.
The first page's hash also covers the cache salt and the adapter, the page where an image or audio clip begins covers
its digest, and the chain starts from a secret of this process. A hit is believed only when the contents are equal too.

No jax: page ids are numbers, and what they stand for is the business of runtime/caches.py.

Dimension key
    P  pages in the pool     B  tokens in a page
"""

import collections
import dataclasses
import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def strong_hash(data: bytes) -> bytes:
    """128 bits: beyond guessing and beyond accident."""
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclasses.dataclass(slots=True, eq=False)
class PrefixKeys:
    """The hashes of one sequence's full pages, grown as its tokens become known.

    Attributes:
        scope: what besides tokens decides whether pages may be shared: (cache salt, adapter).
        media: (position of the first placeholder, digest) of each image or clip, in order. The digest is the
            caller's, over bytes, size and mode.
        digests: one hash a full page.
        contents: what each hash is of, without the parent: compared on a hit.
    """

    scope: tuple[str | None, str | None] = (None, None)
    media: tuple[tuple[int, bytes], ...] = ()
    digests: list[bytes] = dataclasses.field(default_factory=list)
    contents: list[bytes] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class CachedPage:
    """A page found by its hash: what it holds, and the page before it."""

    page: int
    digest: bytes
    content: bytes
    parent: "CachedPage | None"

    def follows(self, before: "CachedPage | None") -> bool:
        """Whether `before` holds what this page's prefix held. Nearly always the parent is that very page."""
        mine, theirs = self.parent, before
        while mine is not theirs:
            if mine is None or theirs is None or mine.content != theirs.content:
                return False
            mine, theirs = mine.parent, theirs.parent
        self.parent = before
        return True


class PagePool:
    """Gives out page ids 0 to P - 1, counts who holds them, and finds known prefixes.

    Args:
        num_pages: P.
        page_size: B.
        caches_prefixes: False turns the prefix cache off; nothing is hashed then.
        num_spread: past so many pages ever used, the oldest cached prefix is given up before a page that was never
            used is begun: a host gives memory to a page only when it is first written. None for all.
        hash_bytes: replaced in tests, to force collisions.

    Attributes:
        query_tokens, hit_tokens: counters, filled by whoever admits a sequence.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        caches_prefixes: bool = True,
        num_spread: int | None = None,
        hash_bytes: Callable[[bytes], bytes] = strong_hash,
    ):
        self.num_pages = num_pages
        self.page_size = page_size
        self.caches_prefixes = caches_prefixes
        self.query_tokens = 0
        self.hit_tokens = 0
        self._hash = hash_bytes
        self._secret = secrets.token_bytes(16)
        self._num_spread = num_pages if num_spread is None else num_spread
        self._untouched = list(range(num_pages - 1, -1, -1))
        self._free: list[int] = []
        self._holders = [0] * num_pages
        self._cached_as: list[CachedPage | None] = [None] * num_pages
        self._found: dict[bytes, CachedPage] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # cached, nobody holds it

    @property
    def num_free(self) -> int:
        """Pages that hold nothing worth keeping."""
        return len(self._free) + len(self._untouched)

    @property
    def num_cached(self) -> int:
        """Pages nobody holds whose content may be found again."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that take() can give."""
        return self.num_free + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages somebody holds."""
        return self.num_pages - self.num_available

    @property
    def used_share(self) -> float:
        """Used pages as a share of all, 0 to 1."""
        return self.num_used / self.num_pages

    def take(self, count: int) -> list[int]:
        """Takes `count` pages nobody holds, each then held once. Cached pages are given up oldest first.

        Raises:
            LookupError: fewer are available; ask num_available before.
        """
        if count > self.num_available:
            raise LookupError(f"{count} pages asked, {self.num_available} of {self.num_pages} available")
        while len(self._free) < count:
            spreads = self.num_pages - len(self._untouched) < self._num_spread or not self._idle
            if spreads and self._untouched:
                page = self._untouched.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._free.append(page)
        cut = len(self._free) - count
        pages = self._free[cut:]
        del self._free[cut:]
        holders = self._holders
        for page in pages:
            holders[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Lets go of one sequence's pages, given in its order. Its last pages will be given up before its first."""
        holders = self._holders
        for page in reversed(pages):
            left = holders[page] - 1
            if left < 0:
                raise AssertionError(f"page {page} released, but nobody holds it")
            holders[page] = left
            if left == 0:
                if self._cached_as[page] is not None:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def extend_keys(self, keys: PrefixKeys, token_ids: np.ndarray) -> None:
        """Hashes every full page of `token_ids` that `keys` has not hashed yet.

        Args:
            keys: grown in place.
            token_ids: int32, all the sequence's known tokens from its first one.
        """
        first, last = len(keys.digests), len(token_ids) // self.page_size
        if first >= last or not self.caches_prefixes:
            return
        width = 4 * self.page_size
        data = np.ascontiguousarray(token_ids[first * self.page_size : last * self.page_size], np.int32).tobytes()
        parts = [data[start : start + width] for start in range(0, len(data), width)]
        for index, extra in self._extras(keys, first, last).items():
            parts[index - first] += extra
        digest, hash_bytes, digests = keys.digests[-1] if first else self._secret, self._hash, keys.digests
        for part in parts:
            digest = hash_bytes(digest + part)
            digests.append(digest)
        keys.contents += parts

    def _extras(self, keys: PrefixKeys, first: int, last: int) -> dict[int, bytes]:
        """What pages [first, last) hold besides tokens. A page's tokens have a fixed width, so nothing can run over."""
        extras: dict[int, list] = {}
        if first == 0 and keys.scope != (None, None):
            extras[0] = [keys.scope]
        for position, digest in keys.media:
            if first <= (index := position // self.page_size) < last:
                extras.setdefault(index, []).append((position, digest))
        return {index: repr(parts).encode() for index, parts in extras.items()}

    def find(self, keys: PrefixKeys, max_pages: int) -> list[CachedPage]:
        """The longest known prefix, at most max_pages long. Changes nothing: hold() the result to keep it."""
        hits: list[CachedPage] = []
        before = None
        for digest, content in zip(keys.digests[:max_pages], keys.contents, strict=False):
            hit = self._found.get(digest)
            if hit is None or hit.content != content or not (hit.parent is before or hit.follows(before)):
                break
            hits.append(hit)
            before = hit
        return hits

    def num_idle(self, hits: Iterable[CachedPage]) -> int:
        """How many of these pages nobody holds: holding them makes that many fewer available."""
        return sum(self._holders[hit.page] == 0 for hit in hits)

    def hold(self, hits: Iterable[CachedPage]) -> list[int]:
        """Adds a holder to each page found; cached ones come back to life. Returns their ids."""
        pages = [hit.page for hit in hits]
        for page in pages:
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1
        return pages

    def publish(self, page: int, digest: bytes, content: bytes, parent: CachedPage | None) -> CachedPage:
        """Makes a held, full and computed page findable. It must never be written again.

        Returns:
            The page that stands for this prefix: an equal one published earlier keeps its place.
        """
        known = self._found.get(digest)
        if known is not None:
            if known.content == content and known.follows(parent):
                return known
            return CachedPage(page, digest, content, parent)  # a hash collision: not findable, but a true parent
        cached = self._found[digest] = self._cached_as[page] = CachedPage(page, digest, content, parent)
        return cached

    def unpublish(self, pages: Iterable[int]) -> None:
        """Makes pages unfindable, for instance because a fault may have spoiled them. Holders keep them."""
        for page in pages:
            self._forget(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def reset_prefix_cache(self) -> None:
        """Forgets every known prefix; cached pages become free, used ones stay with their holders."""
        self._found.clear()
        self._cached_as = [None] * self.num_pages
        self._free.extend(reversed(self._idle))
        self._idle.clear()

    def _forget(self, page: int) -> None:
        cached = self._cached_as[page]
        if cached is not None:
            del self._found[cached.digest]
            self._cached_as[page] = None

    def audit(self, tables: Iterable[Iterable[int]]) -> None:
        """Checks the books against the page lists of all sequences that hold pages.

        Raises:
            AssertionError: a page is in two places or none, or its count is not the number of its holders.
        """
        counted = collections.Counter(page for table in tables for page in table)
        held = {page: count for page, count in enumerate(self._holders) if count}
        if held != dict(counted):
            wrong = sorted(page for page in held | counted if held.get(page) != counted.get(page))
            raise AssertionError(f"holders differ for pages {wrong[:8]}: counted {counted}, recorded {held}")
        free = self._free + self._untouched
        places = sorted([*free, *self._idle, *held])
        if places != list(range(self.num_pages)):
            raise AssertionError(f"free {free}, cached {list(self._idle)}, used {sorted(held)} are not all pages")
        published = {cached.page: cached for cached in self._cached_as if cached is not None}
        if sorted(published) != sorted(cached.page for cached in self._found.values()):
            raise AssertionError("the hash table and the pages disagree about what is published")
        if not set(self._idle) <= set(published) or set(free) & set(published):
            raise AssertionError("a cached page has no hash, or a free page still has one")
