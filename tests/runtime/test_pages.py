"""The page pool gives each page to whom it should, and finds a prefix only where it is the same one."""

import numpy as np
import pytest

from runtime.pages import PagePool, PrefixKeys, strong_hash

PAGE = 4
PROMPT = np.arange(1, 13, dtype=np.int32)  # three full pages


def keys_of(pool, tokens=PROMPT, salt=None, adapter=None, media=()):
    keys = PrefixKeys((salt, adapter), media)
    pool.extend_keys(keys, np.asarray(tokens, np.int32))
    return keys


def publish_all(pool, keys):
    """Takes and publishes a page for each of the keys, as a sequence that computed them would."""
    pages, parent = pool.take(len(keys.digests)), None
    for page, digest, content in zip(pages, keys.digests, keys.contents, strict=True):
        parent = pool.publish(page, digest, content, parent)
    return pages


def found(pool, keys, max_pages=99):
    return [hit.page for hit in pool.find(keys, max_pages)]


def test_every_page_is_given_once():
    pool = PagePool(5, PAGE)
    assert sorted(pool.take(2) + pool.take(3)) == [0, 1, 2, 3, 4]
    assert (pool.num_used, pool.num_available, pool.used_share) == (5, 0, 1.0)


def test_taking_more_than_there_is_takes_nothing():
    pool = PagePool(5, PAGE)
    pool.take(3)
    with pytest.raises(LookupError, match="3 pages asked, 2 of 5 available"):
        pool.take(3)
    assert pool.num_available == 2


def test_a_page_cannot_be_released_twice():
    pool = PagePool(5, PAGE)
    pages = pool.take(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(pages)


def test_pages_without_a_hash_are_free_when_released():
    pool = PagePool(5, PAGE)
    pool.release(pool.take(2))
    assert (pool.num_free, pool.num_cached) == (5, 0)


def test_an_untouched_page_is_begun_only_when_the_cache_has_spread_far_enough():
    pool = PagePool(9, PAGE, num_spread=5)
    first = keys_of(pool)
    pool.release(publish_all(pool, first))
    pool.release(publish_all(pool, keys_of(pool, PROMPT + 100)))  # 3 more pages: two begun, one given up
    assert len(found(pool, first)) == 2 and pool.num_cached == 5
    assert sorted(pool.take(5)) == [0, 1, 2, 3, 4] and pool.num_cached == 0
    assert sorted(pool.take(4)) == [5, 6, 7, 8]  # asked for, they are there
    pool.audit([[0, 1, 2, 3, 4], [5, 6, 7, 8]])


def test_a_released_prefix_is_found_and_revived():
    pool = PagePool(5, PAGE)
    keys = keys_of(pool)
    pages = publish_all(pool, keys)
    pool.release(pages)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 3, 0)
    hits = pool.find(keys_of(pool), 99)
    assert pool.num_idle(hits) == 3
    assert pool.hold(hits) == pages
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 0, 3)


def test_a_prefix_in_use_is_shared_and_counted():
    pool = PagePool(5, PAGE)
    keys = keys_of(pool)
    pages = publish_all(pool, keys)
    hits = pool.find(keys, 2)
    assert pool.num_idle(hits) == 0
    assert pool.hold(hits) == pages[:2]
    pool.audit([pages, pages[:2]])
    pool.release(pages)
    pool.audit([pages[:2]])
    assert pool.num_used == 2


@pytest.mark.parametrize(
    "tokens, hits",
    [
        (PROMPT, 3),
        ([*PROMPT, 99], 3),
        (PROMPT[:11], 2),
        ([*PROMPT[:4], 99, *PROMPT[5:]], 1),
        ([99, *PROMPT[1:]], 0),
        (PROMPT[4:], 0),
    ],
    ids=["same", "longer", "partial last page", "second page differs", "first differs", "shifted by a page"],
)
def test_a_hit_is_the_longest_run_of_whole_equal_pages(tokens, hits):
    pool = PagePool(5, PAGE)
    pages = publish_all(pool, keys_of(pool))
    assert found(pool, keys_of(pool, tokens)) == pages[:hits]


SCOPES = {
    "plain": {},
    "salt a": {"salt": "a"},
    "salt b": {"salt": "b"},
    "salt empty": {"salt": ""},
    "salt spells None": {"salt": "None"},
    "adapter a": {"adapter": "a"},
    "salt and adapter": {"salt": "a", "adapter": "a"},
    "salt holds a separator": {"salt": "a', 'a"},
}


@pytest.mark.parametrize("first", SCOPES)
def test_pages_are_shared_only_inside_one_salt_and_adapter(first):
    pool = PagePool(100, PAGE)
    publish_all(pool, keys_of(pool, **SCOPES[first]))
    hits = {name: len(found(pool, keys_of(pool, **scope))) for name, scope in SCOPES.items()}
    assert hits == {name: 3 if name == first else 0 for name in SCOPES}


@pytest.mark.parametrize(
    "media, hits",
    [
        (((5, b"30x100 bytes"),), 3),
        (((5, b"100x30 bytes"),), 1),
        (((6, b"30x100 bytes"),), 1),
        (((9, b"30x100 bytes"),), 1),
        (((5, b"30x100 bytes"), (8, b"more")), 2),
        ((), 1),
    ],
    ids=["same", "other size", "elsewhere in the page", "in the next page", "one more", "none"],
)
def test_pages_from_a_picture_on_are_shared_only_with_the_same_picture(media, hits):
    pool = PagePool(5, PAGE)
    pages = publish_all(pool, keys_of(pool, media=((5, b"30x100 bytes"),)))
    assert found(pool, keys_of(pool, media=media)) == pages[:hits]


def test_keys_grow_as_tokens_become_known():
    pool = PagePool(5, PAGE)
    keys = keys_of(pool, PROMPT[:5], media=((6, b"clip"),))
    assert len(keys.digests) == 1
    pool.extend_keys(keys, PROMPT)
    whole = keys_of(pool, PROMPT, media=((6, b"clip"),))
    assert (keys.digests, keys.contents) == (whole.digests, whole.contents)


def test_hashes_differ_from_process_to_process():
    assert keys_of(PagePool(1, PAGE)).digests != keys_of(PagePool(1, PAGE)).digests
    assert len(strong_hash(b"")) == 16


def test_a_colliding_hash_is_not_a_hit():
    pool = PagePool(9, PAGE, hash_bytes=lambda data: b"same")
    keys, others = keys_of(pool, PROMPT[:4]), keys_of(pool, PROMPT[4:8])
    assert keys.digests == others.digests
    pages = publish_all(pool, keys)
    assert found(pool, keys) == pages and found(pool, others) == []
    publish_all(pool, others)  # keeps its page, but cannot be found
    assert found(pool, keys) == pages and found(pool, others) == []


def test_a_page_with_another_prefix_is_not_a_hit_even_when_hash_and_tokens_are_equal():
    def forgets_the_parent(data):
        return strong_hash(data[-16:])

    pool = PagePool(9, PAGE, hash_bytes=forgets_the_parent)
    publish_all(pool, keys_of(pool, [1, 1, 1, 1, 5, 6, 7, 8]))
    first = publish_all(pool, keys_of(pool, [2, 2, 2, 2]))
    assert found(pool, keys_of(pool, [2, 2, 2, 2, 5, 6, 7, 8])) == first


def test_the_prefix_released_longest_ago_is_given_up_first_and_from_its_end():
    pool = PagePool(6, PAGE)
    old, new = keys_of(pool, PROMPT), keys_of(pool, PROMPT + 100)
    old_pages, new_pages = publish_all(pool, old), publish_all(pool, new)
    pool.release(old_pages)
    pool.release(new_pages)
    assert pool.take(1) == old_pages[2:]
    assert found(pool, old) == old_pages[:2] and found(pool, new) == new_pages
    pool.take(3)
    assert found(pool, old) == [] and found(pool, new) == new_pages[:2]


def test_free_pages_go_before_cached_ones():
    pool = PagePool(4, PAGE)
    keys = keys_of(pool)
    pages = publish_all(pool, keys)
    pool.release(pages)
    pool.take(1)
    assert found(pool, keys) == pages


def test_a_hit_makes_a_prefix_young_again():
    pool = PagePool(6, PAGE)
    old, new = keys_of(pool, PROMPT), keys_of(pool, PROMPT + 100)
    for keys in (old, new):
        pool.release(publish_all(pool, keys))
    pool.release(pool.hold(pool.find(old, 99)))
    pool.take(3)
    assert len(found(pool, old)) == 3 and found(pool, new) == []


def test_a_child_is_found_again_when_its_parent_was_given_up_and_came_back():
    pool = PagePool(3, PAGE)
    keys = keys_of(pool, PROMPT[:8])
    parent, child = publish_all(pool, keys)
    pool.release([parent])
    pool.release(pool.take(2))  # the parent is given up; the child is still held
    again = pool.take(1)
    pool.publish(again[0], keys.digests[0], keys.contents[0], None)
    assert found(pool, keys) == [*again, child]


def test_the_second_of_two_equal_pages_stays_private():
    pool = PagePool(6, PAGE)
    keys = keys_of(pool)
    first, second = publish_all(pool, keys), publish_all(pool, keys)
    assert found(pool, keys) == first
    pool.release(second)
    assert pool.num_free == 3


def test_unpublished_pages_are_never_found_and_not_kept():
    pool = PagePool(5, PAGE)
    keys = keys_of(pool)
    held = publish_all(pool, keys)
    pool.unpublish(held)
    assert found(pool, keys) == []
    pool.release(held)
    assert (pool.num_free, pool.num_cached) == (5, 0)


def test_reset_forgets_prefixes_and_keeps_holders():
    pool = PagePool(6, PAGE)
    held, idle = keys_of(pool, PROMPT), keys_of(pool, PROMPT + 100)
    pages = publish_all(pool, held)
    pool.release(publish_all(pool, idle))
    pool.reset_prefix_cache()
    assert found(pool, held) == found(pool, idle) == []
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 0, 3)
    pool.audit([pages])
    pool.release(pages)
    assert pool.num_free == 6


def test_without_a_prefix_cache_nothing_is_hashed():
    pool = PagePool(5, PAGE, caches_prefixes=False)
    assert keys_of(pool).digests == []


@pytest.mark.parametrize(
    "tables, says",
    [
        ([[0, 1]], None),
        ([[0]], "holders differ"),
        ([[0, 1], [1]], "holders differ"),
        ([[0, 1, 2]], "holders differ"),
    ],
)
def test_audit_notices_every_difference(tables, says):
    pool = PagePool(3, PAGE)
    assert sorted(pool.take(2)) == [0, 1]
    if says is None:
        pool.audit(tables)
    else:
        with pytest.raises(AssertionError, match=says):
            pool.audit(tables)


def test_audit_notices_a_lost_page():
    pool = PagePool(3, PAGE)
    pool._untouched.pop()
    with pytest.raises(AssertionError, match="are not all pages"):
        pool.audit([])
