"""Random batches for ragged paged attention, and what dense attention in float64 makes of them.

A batch lives in a pool whose unused pages are NaN, so that a kernel which reads one page too many says so.
"""

import dataclasses
import itertools

import exact_attention
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


def dense(a_batch, **options):
    """Attention of every real token over its row's whole history, in float64: [tokens, N, H]."""
    return exact_attention.dense(a_batch.histories, a_batch.queries, **options)
