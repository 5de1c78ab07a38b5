"""Latent attention computes what attention over decompressed keys and values computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.latent_attention import cache_shape, latent_attention
from pallas_kernels.latent_attention import reference as module

N, R, H, B = 3, 8, 4, 4
ROWS = [[(1, 1)], [(4, 1)], [(5, 1)], [(8, 1), (3, 1), (5, 5)], [(3, 1), (0, 0), (8, 4), (9, 6)]]


attend = jax.jit(functools.partial(latent_attention, scale=0.3))


def batch(rows, platform="cpu", seed=0, S=5, M=4, T=14, P=12):
    """The call's arrays for rows of (tokens in the cache, of which new), and each row's entries and queries."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    pages = [-(-length // B) for length, _ in rows]
    table = np.full((S, M), 2**20, np.int32)
    cache = np.full(cache_shape(P, B, R, H, platform), np.nan, np.float32)
    ids = iter(rng.permutation(P))
    entries, queries = [], []
    for s, (length, new) in enumerate(rows):
        table[s, : pages[s]] = [next(ids) for _ in range(pages[s])]
        entries.append(draw(length, R + H))
        queries.append(draw(new, N, R + H))
        for position in range(length - new):
            slot = cache[table[s, position // B], position % B]
            slot[:] = 0
            slot[: R + H] = entries[-1][position]
    spare = T - sum(n for _, n in rows)
    q = np.concatenate([*queries, np.zeros((spare, N, R + H), np.float32)])
    new = np.concatenate(
        [e[len(e) - n :] for e, (_, n) in zip(entries, rows, strict=True)] + [np.zeros((spare, R + H))]
    )
    news = [n for _, n in rows] + [0] * (S - len(rows))
    num_decode = next((s for s, n in enumerate(news) if n != 1), len(rows))
    arrays = (q[..., :R], q[..., R:], new[:, :R], new[:, R:], cache)
    integers = ([length for length, _ in rows] + [0] * (S - len(rows)), table, np.concatenate([[0], np.cumsum(news)]))
    integers = (*integers, [num_decode, len(rows)])
    args = (*(jnp.asarray(x, jnp.float32) for x in arrays), *(jnp.asarray(x, jnp.int32) for x in integers))
    return args, entries, queries


def decompressed(entries, queries, scale):
    """Dense attention with explicit per-head keys and values, from up-projections that queries then absorb."""
    outs = []
    for e, q in zip(entries, queries, strict=True):
        for j in range(len(q)):
            seen = e[: len(e) - len(q) + j + 1].astype(np.float64)
            logits = q[j] @ seen.T * scale
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            outs.append(probs / probs.sum(-1, keepdims=True) @ seen[:, :R])
    return np.array(outs).reshape(-1, N, R)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_matches_dense_attention(rows, platform):
    args, entries, queries = batch(rows, platform)
    assert_right(*attend(*args), args, entries, queries)


def assert_right(out, cache, args, entries, queries):
    expected = decompressed(entries, queries, 0.3)
    np.testing.assert_allclose(out[: len(expected)], expected, atol=1e-5)
    assert not np.asarray(out[len(expected) :]).any()
    for s, row in enumerate(entries):
        for position, entry in enumerate(row):
            np.testing.assert_array_equal(cache[args[6][s, position // B], position % B, : R + H], entry)
    written = sum(len(row) for row in entries)
    assert np.isfinite(cache[..., 0]).sum() == written


def test_absorbed_queries_equal_decompressed_keys():
    """softmax(q k) v with k = W_k c, v = W_v c is what absorbed queries and a later up-projection give."""
    rng = np.random.default_rng(1)
    args, entries, queries = batch([(6, 1)])
    key_NHR, value_NHR = rng.normal(size=(2, N, 5, R))
    q_NH = rng.normal(size=(N, 5))
    absorbed = jnp.asarray(np.einsum("NH,NHR->NR", q_NH, key_NHR), jnp.float32)
    q_latent = args[0].at[0].set(absorbed)
    out, _ = attend(q_latent, *args[1:])
    latent_UR, rope_UH = entries[0][:, :R], entries[0][:, R:]
    logits = np.einsum("NH,NHR,UR->NU", q_NH, key_NHR, latent_UR) + np.einsum(
        "NH,UH->NU", queries[0][0, :, R:], rope_UH
    )
    probs = np.exp(0.3 * logits - (0.3 * logits).max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    expected = np.einsum("NU,NHR,UR->NH", probs, value_NHR, latent_UR)
    np.testing.assert_allclose(np.einsum("NR,NHR->NH", out[0], value_NHR), expected, atol=1e-5)


def test_layers_share_an_array_by_offset():
    args, _, _ = batch([(5, 1), (6, 3)])
    out, _ = attend(*args)
    cache = args[4]
    stacked = jnp.concatenate([jnp.full_like(cache, jnp.nan), cache])
    shifted, written = attend(*args[:4], stacked, *args[5:], page_offset=jnp.int32(len(cache)))
    np.testing.assert_array_equal(shifted, out)
    assert np.isnan(written[: len(cache)]).all()


def test_refusals_say_what_to_do():
    args, _, _ = batch([(1, 1)])
    with pytest.raises(ValueError, match="cache_shape"):
        latent_attention(*args[:4], args[4][..., :8], *args[5:], scale=1)
    with pytest.raises(ValueError, match="choose one of"):
        latent_attention(*args, scale=1, implementation="fast")


READ, WRITE, LOCATE = module._read, module._write, module.locate


def to_another_row(*args):
    row_T, position_T, live_T = LOCATE(*args)
    return jnp.maximum(row_T - 1, 0), position_T, live_T


ERRORS = {
    "a length is one short": ("_read", lambda cache, page_M, kv_len: READ(cache, page_M, kv_len - 1)),
    "the page before is read": ("_read", lambda cache, page_M, kv_len: READ(cache, jnp.roll(page_M, 1), kv_len)),
    "a stale tail is not blanked": ("_read", lambda cache, page_M, kv_len: READ(cache, page_M, kv_len + B)),
    "a query sees the key after it": (
        "locate",
        lambda *args: (lambda row_T, position_T, live_T: (row_T, position_T + 1, live_T))(*LOCATE(*args)),
    ),
    "a token goes to another row": ("locate", to_another_row),
    "padding is written": (
        "_write",
        lambda *args: WRITE(*args[:5], jnp.ones_like(args[5]), args[6]),
    ),
    "a layer writes another's pages": ("_write", lambda *args: WRITE(*args[:6], args[6] + 1)),
}


@pytest.mark.parametrize("name, fault", ERRORS.values(), ids=ERRORS)
def test_planted_error_is_noticed(monkeypatch, name, fault):
    args, entries, queries = batch([(3, 1), (9, 1), (8, 4), (9, 3), (5, 2)])
    monkeypatch.setattr(module, name, fault)
    answer = latent_attention(*args, scale=0.3)
    with pytest.raises(AssertionError):
        assert_right(*answer, args, entries, queries)
