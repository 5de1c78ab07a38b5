"""Attention over rows' whole histories in float64, and how far the roundings of a kernel may lead from it."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from quick_compile import quick_jit

from pallas_kernels.ragged_paged_attention import reference, scales

SCALE = 0.2  # of every kernel's test
FUNCTION = 8  # half units in the last place that exp, log and tanh may be off in float32


@functools.cache
def compiled_reference(soft_cap):
    return quick_jit(functools.partial(reference.attend, scale=SCALE, soft_cap=soft_cap))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the door takes beside arrays, as far as answers depend on it."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks_N: object = None


@dataclasses.dataclass(frozen=True)
class Rounded:
    """How an implementation computes.

    Attributes:
        weights, answers: formats that softmax weights, as they meet values, and answers are rounded to.
        block: keys that are folded into a running softmax at once, or fewer.
        splits: parts of a row's keys, each answered by itself and joined by their log-sum-exps.
    """

    weights: object = np.float32
    answers: object = np.float32
    block: int = 16
    splits: int = 1


def dense(histories, queries, *, weights=np.float64, answers=np.float64, **options):
    """Attention in float64: `[tokens, N, H]`. Softmax weights and answers may be rounded, and nothing else is.

    Args:
        histories: a row: (keys [L, K, H], values [L, K, H]) with the step's tokens at the end.
        queries: a row: [q_len, N, H].
    """
    outs = []
    for keys, values, q in _rows(histories, queries):
        logits, _ = _logits(keys, q, Options(**options))
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        of_keys = weight[..., : len(keys)].astype(weights).astype(np.float64)
        out = np.einsum("ntu,unh->tnh", of_keys, values) / weight.sum(-1).T[..., None]
        outs.append(out.astype(answers).astype(np.float64))
    return np.concatenate(outs)


def bound(histories, queries, rounded=Rounded(), **options):
    """How far an evaluation in float32 may be from each element of `dense`: `[tokens, N, H]`.

    Every float32 operation is off by a factor 1 + d with |d| <= u = 2**-24, and n of them in a row by no more than
    g(n) = n u / (1 - n u). In whatever order n terms are added, each meets at most n roundings. So:

    * a logit, H products added and scaled by two rounded numbers, is off by at most e = g(H + 4) times the sum of its
      terms' sizes; a soft cap, whose slope is at most 1, adds its own roundings;
    * exp(logit - top) is off by a factor within exp(+-(e + u |logit - top|)) and its own error. What top is cancels in
      the quotient. A running softmax multiplies by exp(old top - new top) after each of its blocks, and the distances
      add up to the final one;
    * so both sums, of weights and of weights times values, have terms off by a factor within exp(+-r), where r also
      counts the additions and two roundings of a value's scale; a quotient of sums is off by no more than the terms'
      errors and its own error together.

    Shorter formats add little to this, since products of two numbers of up to 12 bits are exact in float32:

    * queries, keys and values of 8 or 16 bits are what they are. Weights are rounded once before they meet values, by a
      factor 1 + d with |d| <= w of their format, or by half of its smallest step where that is more; blocks that come
      later only shrink it. The sum of weights is made of those of float32;
    * the answer is rounded once to its format.

    Parts (`splits`) are joined with weights exp(lse - top lse), where lse = top + log(total). A part's total cancels:
    its answer was divided by it. What is left are the roundings of lse, of its distance to the top one, of exp and
    log, a quotient and a sum over parts. lse is within log(number of keys) of a logit, and no farther from the top
    one than any of its keys is, but for that.

    Args:
        histories, queries: as of `dense`.
    """
    step, half_step = _precision(rounded.weights)
    answer_step, half_answer_step = _precision(rounded.answers)
    bounds = []
    for keys, values, q in _rows(histories, queries):
        logits, error = _logits(keys, q, Options(**options))
        top = logits.max(-1, keepdims=True)
        weight = np.exp(logits - top)
        total = weight.sum(-1, keepdims=True)
        is_seen, weight = weight > 0, weight / total
        distance = np.where(is_seen, top - logits, 0)
        blocks = -(-len(keys) // rounded.block) + 1
        roundings = (blocks + 1) * (FUNCTION + 2) + len(keys) + blocks + 4
        error += _roundings(1) * (distance + 2 * error.max(initial=0))
        if rounded.splits > 1:
            spread = np.log(logits.shape[-1])
            error += _roundings(1) * (2 * abs(np.where(is_seen, logits, 0)).max() + distance + 3 * spread)
            roundings += FUNCTION * (spread + 2) + rounded.splits + 4
        relative = np.expm1(error + _roundings(roundings))

        of_keys = slice(len(keys))
        rounding = weight * ((1 + relative) * (1 + step) - 1) + is_seen * half_step * (1 + relative) / total
        above = np.einsum("ntu,unh->tnh", rounding[..., of_keys], abs(values))
        below = (weight * relative).sum(-1).T[..., None]
        answer = abs(np.einsum("ntu,unh->tnh", weight[..., of_keys], values))
        off = (above + answer * below) / (1 - below)
        off += _roundings(2) * (answer + off)
        bounds.append(off + answer_step * (answer + off) + half_answer_step)
    return np.concatenate(bounds)


def assert_same(got, expected, args, *, rounded, padding, times=2, page_offset=0, k_scale=1, v_scale=1, **options):
    """Holds answers and caches of an implementation to the reference's, and the answers of both to float64.

    Each answer is within its bound. In float32 so wide a bound would let a loss of two digits pass: so the largest
    error is no more than some times the reference's, or what rounding weights and answers alone would make of it.
    Caches are equal bit for bit.

    Args:
        got, expected: answers and cache of the implementation, and of the reference.
        args: the door's arrays.
        rounded: how the implementation computes.
        padding: what the answers of padding tokens are, in an array of all tokens.
        times: how many times as large as the reference's error may be.
        page_offset, k_scale, v_scale, options: as they were given to both.
    """
    (out, cache), (expected_out, expected_cache) = (
        [np.asarray(x, np.float32) for x in pair] for pair in (got, expected)
    )
    np.testing.assert_array_equal(cache, expected_cache)
    q_TNH, k_TKH, _, given_cache, lens, table, cu, counts = args
    num_tokens = int(cu[counts[1]])
    np.testing.assert_array_equal(out[num_tokens:], np.asarray(padding, np.float32)[num_tokens:])
    if not num_tokens:
        return
    K = k_TKH.shape[1]
    factors = np.array([k_scale, v_scale] * K, np.float64)
    if scales.are_in(given_cache, K):
        factors = _scales_of(cache, K)
    elif scales.are_behind(given_cache, K):
        B = scales.page_size(given_cache)
        cache, factors = cache[:, :B], _scales_behind(cache, B)[..., : 2 * K]
    rows = _rows_of(q_TNH, cache, lens, table + page_offset, cu, counts, factors)
    assert_answers(out[:num_tokens], expected_out[:num_tokens], rows, rounded=rounded, times=times, **options)


def assert_answers(out, expected_out, rows, *, rounded, times=2, **options):
    """Holds answers of real tokens to those of the reference, and both to float64, as `assert_same` does.

    Args:
        rows: histories and queries, as `dense` takes them.
    """
    exact = dense(*rows, **options)
    error, expected_error = (abs(x - exact) for x in (out, expected_out))
    assert (expected_error <= bound(*rows, Rounded(answers=rounded.answers), **options)).all()
    within = bound(*rows, rounded, **options)
    assert (error <= within).all(), f"off by {(error / within).max():.1f} times the bound"
    least = abs(dense(*rows, weights=rounded.weights, answers=rounded.answers, **options) - exact)
    usual = max(expected_error.max(), least.max())
    assert error.max() <= times * usual, f"off by {error.max():.1e}, where {usual:.1e} is usual"


def _scales_of(cache_PBCH, num_kv_heads):
    """The scales that int8 pages hold: [P, B, 2 K]. What no row uses may be anything."""
    P, B, _, _ = cache_PBCH.shape
    vectors = cache_PBCH[:, :, 2 * num_kv_heads :].astype(np.int8).reshape(P, B, -1)
    return vectors.view(np.float32)[..., : 2 * num_kv_heads].astype(np.float64)


def _scales_behind(cache_PBCH, page_size):
    """The scales that a TPU's int8 pages hold: [P, B, C]."""
    planes = cache_PBCH[:, page_size:, :, :128].astype(np.int8)
    P, L, C, _ = planes.shape
    planes = planes.reshape(P, L // 4, 4, C, 128).transpose(0, 1, 4, 3, 2)
    return np.ascontiguousarray(planes).view(np.float32).reshape(P, -1, C)[:, :page_size].astype(np.float64)


def _rows_of(q_TNH, cache_PBCH, kv_lens_S, page_table_SM, cu_q_lens_S1, counts_2, factors):
    """Histories and queries of a batch, out of the cache as its step left it.

    Args:
        factors: what each key and each value in the cache is multiplied by: [2 K] for all tokens or [P, B, 2 K].
    """
    q, cache, lens, table, cu = map(np.asarray, (q_TNH, cache_PBCH, kv_lens_S, page_table_SM, cu_q_lens_S1))
    factors = np.broadcast_to(factors, (*cache.shape[:2], factors.shape[-1]))
    histories, queries = [], []
    for s in range(int(counts_2[1])):
        pages = table[s, : -(-lens[s] // cache.shape[1])]
        kept, factor = (x[pages].reshape(-1, *x.shape[2:])[: lens[s]] for x in (cache, factors))
        kept = kept[:, : factor.shape[1], : q.shape[2]].astype(np.float64) * factor[..., None]
        histories.append([kept[:, i::2] for i in (0, 1)])
        queries.append(q[cu[s] : cu[s + 1]])
    return histories, queries


def _rows(histories, queries):
    """The keys and values, one a query head, and queries of each row that has any: float64."""
    for (keys, values), q in zip(histories, queries, strict=True):
        if not len(q):
            continue
        groups = q.shape[1] // keys.shape[1]
        yield (*(np.repeat(x.astype(np.float64), groups, axis=1) for x in (keys, values)), q.astype(np.float64))


def _logits(keys, q, options):
    """Logits, and how far float32 is off: two of [N, tokens, L], hidden keys at -inf, or one more for a sink."""
    logits = np.einsum("tnh,unh->ntu", q, keys) * options.scale
    error = _roundings(q.shape[2] + 4) * np.einsum("tnh,unh->ntu", abs(q), abs(keys)) * options.scale
    if options.soft_cap is not None:
        uncapped, logits = logits, options.soft_cap * np.tanh(logits / options.soft_cap)
        error += _roundings(2) * abs(uncapped) + _roundings(FUNCTION + 2) * abs(logits)
    ahead = np.arange(len(keys)) - (len(keys) - len(q) + np.arange(len(q)))[:, None]
    logits[:, (ahead > 0) | (ahead <= -(options.window or 2**30))] = -np.inf
    if options.sinks_N is None:
        return logits, error
    sink = np.broadcast_to(np.asarray(options.sinks_N, np.float64)[:, None, None], (*logits.shape[:2], 1))
    return np.concatenate([logits, sink], -1), np.concatenate([error, np.zeros_like(sink)], -1)


def _precision(dtype):
    """How far rounding to a format moves a number: by this factor, or by half of its smallest step.

    Roundings to float32 are counted elsewhere; what is smaller than its normal numbers may become zero.
    """
    if dtype == np.float32:
        return 0.0, 2.0**-126
    info = jnp.finfo(dtype)
    return float(info.eps) / 2, float(info.smallest_subnormal) / 2


def _roundings(n):
    return n * 2.0**-24 / (1 - n * 2.0**-24)
