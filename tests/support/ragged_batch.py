"""Random batches for ragged paged attention, and what a dense numpy attention makes of them.

A batch lives in a pool whose unused pages are NaN, so that a kernel which reads one page too many says so.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class Batch:
    """The door's array arguments, and the rows' histories as they were before they were cut into pages."""

    q_TNH: jnp.ndarray
    k_TKH: jnp.ndarray
    v_TKH: jnp.ndarray
    cache_PBCH: jnp.ndarray
    kv_lens_S: jnp.ndarray
    page_table_SM: jnp.ndarray
    cu_q_lens_S1: jnp.ndarray
    counts_2: jnp.ndarray
    histories: list  # a row: (keys [L, K, H], values [L, K, H]) with this step's tokens at the end
    queries: list  # a row: [q_len, N, H]

    @property
    def args(self):
        names = [field.name for field in dataclasses.fields(self)][:8]
        return tuple(getattr(self, name) for name in names)


def batch(rows, *, seed=0, N=4, K=2, H=16, page_size=4, dtype=jnp.float32, pad_rows=2, pad_tokens=3, spare_pages=3):
    """Builds a batch from (tokens already cached, tokens in this step) a row; decodes must come first."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
    lens = [past + new for past, new in rows]
    histories = [(draw(n, K, H), draw(n, K, H)) for n in lens]
    queries = [draw(new, N, H) for _, new in rows]
    num_pages = [-(-n // page_size) for n in lens]
    P, M = sum(num_pages) + spare_pages, max(num_pages) + 1
    ids = iter(rng.permutation(P))
    table = np.full((len(rows) + pad_rows, M), 2**30, np.int32)
    cache = np.full((P, page_size, 2 * K, H), np.nan, np.asarray(jnp.zeros((), dtype)).dtype)
    for s, ((keys, values), (past, _)) in enumerate(zip(histories, rows, strict=True)):
        table[s, : num_pages[s]] = list(itertools.islice(ids, num_pages[s]))
        for position in range(past):
            page = cache[table[s, position // page_size], position % page_size]
            page[0::2], page[1::2] = keys[position], values[position]
    end = [np.zeros((pad_tokens, heads, H), cache.dtype) for heads in (N, K, K)]
    new = [slice(past, past + count) for past, count in rows]
    q_lens = [count for _, count in rows] + [0] * pad_rows
    return Batch(
        q_TNH=jnp.asarray(np.concatenate([*queries, end[0]])),
        k_TKH=jnp.asarray(np.concatenate([*(h[0][s] for h, s in zip(histories, new, strict=True)), end[1]])),
        v_TKH=jnp.asarray(np.concatenate([*(h[1][s] for h, s in zip(histories, new, strict=True)), end[2]])),
        cache_PBCH=jnp.asarray(cache),
        kv_lens_S=jnp.asarray(lens + [0] * pad_rows, jnp.int32),
        page_table_SM=jnp.asarray(table),
        cu_q_lens_S1=jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32),
        counts_2=jnp.asarray([next((i for i, n in enumerate(q_lens) if n != 1), len(rows)), len(rows)], jnp.int32),
        histories=histories,
        queries=queries,
    )


def rows_of(q_TNH, k_TKH, v_TKH, cache_PBCH, kv_lens_S, page_table_SM, cu_q_lens_S1, counts_2, page_offset=0):
    """The histories and queries, as in Batch, that the door's arguments describe; pages are floats without scales."""
    q, k, v, cache, lens, table, cu = map(
        np.asarray, (q_TNH, k_TKH, v_TKH, cache_PBCH, kv_lens_S, page_table_SM, cu_q_lens_S1)
    )
    K, H, page_size = k.shape[1], k.shape[2], cache.shape[1]
    histories, queries = [], []
    for s in range(int(counts_2[1])):
        new = slice(cu[s], cu[s + 1])
        past = lens[s] - (new.stop - new.start)
        pages = table[s, : -(-past // page_size)] + page_offset
        old = cache[pages].reshape(-1, *cache.shape[2:])[:past, : 2 * K, :H]
        histories.append((np.concatenate([old[:, 0::2], k[new]]), np.concatenate([old[:, 1::2], v[new]])))
        queries.append(q[new])
    return histories, queries


def dense(a_batch, **options):
    """Attention of every real token over its row's whole history, in float64: [tokens, N, H]."""
    return dense_and_bound(a_batch.histories, a_batch.queries, **options)[0]


FUNCTION = 8  # half units in the last place that exp and tanh may be off in float32


def dense_and_bound(histories, queries, *, scale, window=None, soft_cap=None, sinks_N=None, block=16):
    """That attention, and how far a float32 evaluation may be from each element: two of [tokens, N, H].

    Every float32 operation is off by a factor 1 + d with |d| <= u = 2**-24, and n of them in a row by no more than
    g(n) = n u / (1 - n u). In whatever order n terms are added, each meets at most n roundings. So:

    * a logit, H products added and scaled by a rounded number, is off by at most e = g(H + 2) times the sum of its
      terms' sizes; a soft cap, whose slope is at most 1, adds its own roundings;
    * exp(logit - top) is off by a factor within exp(+-(e + u |logit - top|)) and its own error. What top is cancels in
      the quotient. A running softmax multiplies by exp(old top - new top) after each of its blocks, and the distances
      add up to the final one;
    * so both sums, of weights and of weights times values, have terms off by a factor within exp(+-r), where r also
      counts the additions; a quotient of sums is off by no more than the terms' errors and its own error together.

    Args:
        histories, queries: as in Batch.
        block: keys that are folded into a running softmax at once; fewer make the bound larger.
    """
    outs, bounds = [], []
    for (keys, values), q in zip(histories, queries, strict=True):
        past, groups = len(keys) - len(q), q.shape[1] // keys.shape[1]
        keys, values = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (keys, values))
        q = q.astype(np.float64)
        logits = np.einsum("tnh,unh->ntu", q, keys) * scale
        error = _roundings(q.shape[2] + 2) * np.einsum("tnh,unh->ntu", abs(q), abs(keys)) * scale
        if soft_cap is not None:
            uncapped, logits = logits, soft_cap * np.tanh(logits / soft_cap)
            error += _roundings(2) * abs(uncapped) + _roundings(FUNCTION + 2) * abs(logits)
        ahead = np.arange(len(keys)) - (past + np.arange(len(q)))[:, None]
        hidden = (ahead > 0) | (ahead <= -(window or 2**30))
        logits[:, hidden] = -np.inf
        if sinks_N is not None:
            sink = np.broadcast_to(np.asarray(sinks_N, np.float64)[:, None, None], (*logits.shape[:2], 1))
            logits, error = np.concatenate([logits, sink], -1), np.concatenate([error, np.zeros_like(sink)], -1)
        distance = logits.max(-1, keepdims=True, initial=-1e30) - logits
        weights = np.exp(-distance)
        weights /= weights.sum(-1, keepdims=True)
        outs.append(np.einsum("ntu,unh->tnh", weights[..., : len(keys)], values))

        blocks = -(-len(keys) // block) + 1
        error += _roundings(1) * (np.where(weights > 0, distance, 0) + 2 * error.max(initial=0))
        relative = np.expm1(error + _roundings((blocks + 1) * (FUNCTION + 2)) + _roundings(len(keys) + blocks + 2))
        below = (weights * relative).sum(-1).T[..., None]
        above = np.einsum("ntu,unh->tnh", (weights * relative)[..., : len(keys)], abs(values))
        bounds.append((above + abs(outs[-1]) * below) / (1 - below) + _roundings(2) * abs(outs[-1]))
    return np.concatenate(outs), np.concatenate(bounds)


def _roundings(n):
    return n * 2.0**-24 / (1 - n * 2.0**-24)
