"""Choosing a token: every implementation against sorts in NumPy, and the promises that batching relies on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_sampler as ref
from quick_compile import quick_jit

from pallas_kernels import cpu
from pallas_kernels.choose import EVERYTHING, IMPLEMENTATIONS, MAX_VOCABULARY, choose, distances, draw, multiply_high

AVAILABLE = [name for name in sorted(IMPLEMENTATIONS) if name != "cpu" or cpu.is_available()]
every_implementation = pytest.mark.parametrize("implementation", AVAILABLE)


@functools.cache
def compiled(implementation):
    jit = quick_jit if implementation == "wide" else jax.jit  # no CPU runs that one
    return jit(functools.partial(choose, implementation=implementation))


def run(implementation, logits_SV, temperature, top_k=0, top_p=0, min_p=0, bits=0):
    """Calls choose with settings that are numbers or one a row; returns NumPy arrays.

    Fewer than 32 rows are padded, so that the programs of a few shapes serve all tests.
    """
    S = len(logits_SV)
    pad = max(32 - S, 0)
    rows = (temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (min_p, np.float32), (bits, np.uint32)
    rows = [np.pad(np.broadcast_to(np.asarray(value, dtype), (S,)), (0, pad)) for value, dtype in rows]
    logits_SV = np.pad(np.asarray(logits_SV, np.float32), ((0, pad), (0, 0)))
    return [np.asarray(part)[:S] for part in compiled(implementation)(logits_SV, *rows, jnp.int32(S))]


def random_rows(rng, S, V):
    """Logits of many shapes (flat, peaked, full of ties, mostly banned) and settings in all combinations."""
    logits_SV = rng.standard_normal((S, V)) * rng.choice([0.1, 1, 3, 10], (S, 1))
    tied_S = rng.random(S) < 0.4
    logits_SV[tied_S] = np.round(logits_SV[tied_S] * 2) / 2
    banned_SV = rng.random((S, V)) < rng.choice([0, 0.5, 0.95], (S, 1))
    banned_SV[:, rng.integers(V)] = False
    wishes = [
        ref.Wish(
            temperature=rng.choice([0.01, 0.5, 1.0, 1.7, 20.0]),
            top_k=int(rng.choice([0, 0, 1, 3, 40, V - 1])),
            top_p=rng.choice([1.0, 1.0, 1e-6, 0.3, 0.9, 0.999]),
            min_p=rng.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
        )
        for _ in range(S)
    ]
    return np.where(banned_SV, -np.inf, logits_SV).astype(np.float32), wishes


def kept_by(logits_SV, temperature_S, cutoff_S):
    with np.errstate(over="ignore"):
        distance_SV = (logits_SV.max(-1, keepdims=True) - logits_SV) * (np.float32(1) / temperature_S)[:, None]
    return distance_SV <= cutoff_S[:, None]


@every_implementation
@pytest.mark.parametrize("V, batches", [(97, 20), (300, 10), (49152, 1)])
def test_it_keeps_and_draws_what_a_sort_does(implementation, V, batches):
    rng = np.random.default_rng(V)
    S, seen, blurred = 32 if V < 1000 else 12, 0, 0
    for _ in range(batches):
        logits_SV, wishes = random_rows(rng, S, V)
        bits_S = rng.integers(0, 2**32, S, dtype=np.uint32)
        settings = [[getattr(w, name) for w in wishes] for name in ("temperature", "top_k", "top_p", "min_p")]
        token_S, best_S, cutoff_S, _ = run(implementation, logits_SV, *settings, bits_S)
        kept_SV = kept_by(logits_SV, np.array(settings[0], np.float32), cutoff_S)
        np.testing.assert_array_equal(best_S, logits_SV.max(-1))
        for s, wish in enumerate(wishes):
            expected_V, is_blurred = ref.kept(logits_SV[s], wish)
            blurred += is_blurred
            if not is_blurred:
                np.testing.assert_array_equal(kept_SV[s], expected_V, str(wish))
            tokens = ref.drawn(logits_SV[s], kept_SV[s], wish.temperature, int(bits_S[s]))
            seen += 1
            assert token_S[s] in tokens and len(tokens) <= 3, wish
    assert blurred <= (0.05 if V < 1000 else 0.25) * seen  # the sets really were compared


@every_implementation
@pytest.mark.parametrize("V", [97, 300, 49152])
def test_greedy_takes_the_first_of_the_highest(implementation, V):
    rng = np.random.default_rng(V)
    logits_SV = rng.integers(-3, 3, (16, V)).astype(np.float32)
    logits_SV[3] = -np.inf
    logits_SV[3, V - 1] = -7.0
    logits_SV[4] = np.where(np.arange(V) % 2, 0.0, -0.0)
    token_S, _, cutoff_S, _ = run(implementation, logits_SV, 0.0, 5, 0.5, 0.5)
    np.testing.assert_array_equal(token_S, logits_SV.argmax(-1))
    assert (cutoff_S == np.float32(EVERYTHING)).all()


@every_implementation
def test_equals_at_the_cutoff_are_all_kept(implementation):
    logits_SV = np.full((6, 97), -np.inf, np.float32)
    logits_SV[:, :8] = [0, 2, 1, 1, 1, 0, 2, -1]
    _, _, cutoff_S, _ = run(
        implementation, logits_SV, 1.0, [1, 2, 3, 0, 0, 0], [0, 0, 0, 0.1, 0.8, 0], [0, 0, 0, 0, 0, 1]
    )
    kept_SV = kept_by(logits_SV, np.ones(6, np.float32), cutoff_S)
    assert kept_SV.sum(-1).tolist() == [2, 2, 5, 2, 5, 2]
    assert kept_SV[2, :8].tolist() == [False, True, True, True, True, False, True, False]


@every_implementation
def test_extremes_stay_inside_the_allowed_tokens(implementation):
    logits_SV = np.full((8, 97), -np.inf, np.float32)
    logits_SV[:, 13] = [3e38, 1e30, -1e30, 0, 0, 0, -3e38, 5]
    logits_SV[:, 50] = [-3e38, -1e30, -1e30, 1e-40, 1e-30, 100, -3e38, 5]
    for bits in (0, 2**31, 2**32 - 1):
        for temperature, top_k, top_p in ((1e-5, 0, 0), (1e30, 2, 0.999), (1, 97, 1e-30), (0.01, 1, 0)):
            token_S, *_ = run(implementation, logits_SV, temperature, top_k, top_p, 0, bits)
            assert set(token_S.tolist()) <= {13, 50}


@every_implementation
def test_a_row_is_the_same_bit_for_bit_in_any_batch(implementation):
    rng = np.random.default_rng(5)
    logits_SV, wishes = random_rows(rng, 32, 97)
    bits_S = rng.integers(0, 2**32, 32, dtype=np.uint32)
    settings = [np.array([getattr(w, n) for w in wishes]) for n in ("temperature", "top_k", "top_p", "min_p")] + [
        bits_S
    ]
    together = run(implementation, logits_SV, *settings)
    order = rng.permutation(32)
    for rows in (order[:8], order, np.tile(order, 16)):
        apart = run(implementation, logits_SV[rows], *[setting[rows] for setting in settings])
        for mine, theirs in zip(apart, together, strict=True):
            np.testing.assert_array_equal(mine, theirs[rows])
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
    alone = compiled(implementation)(logits_SV[[7]], *[s[[7]].astype(d) for s, d in zip(settings, dtypes, strict=True)])
    for mine, theirs in zip(alone, together, strict=True):
        np.testing.assert_array_equal(mine, theirs[[7]])


@every_implementation
def test_rows_that_are_not_numbers_disturb_nobody(implementation):
    rng = np.random.default_rng(6)
    logits_SV = rng.standard_normal((8, 97)).astype(np.float32)
    clean = run(implementation, logits_SV, 0.8, 5, 0.9, 0, 12345)
    logits_SV[2], logits_SV[5, 3], logits_SV[6] = np.nan, np.inf, -np.inf
    dirty = run(implementation, logits_SV, 0.8, 5, 0.9, 0, 12345)
    others = [0, 1, 3, 4, 7]
    for mine, theirs in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(mine[others], theirs[others])
    assert ((dirty[0] >= 0) & (dirty[0] < 97)).all()
    assert clean[3].all() and dirty[3].tolist() == [True, True, False, True, True, False, False, True]


@every_implementation
def test_what_is_past_the_rows_disturbs_nobody(implementation):
    logits_SV = np.random.default_rng(8).standard_normal((32, 300)).astype(np.float32)
    settings = [
        np.full(32, value, dtype) for value, dtype in [(0.8, "f4"), (5, "i4"), (0.9, "f4"), (0, "f4"), (9, "u4")]
    ]
    whole = compiled(implementation)(logits_SV, *settings, jnp.int32(32))
    some = compiled(implementation)(logits_SV, *settings, jnp.int32(5))
    for mine, theirs in zip(some, whole, strict=True):
        np.testing.assert_array_equal(mine[:5], theirs[:5])
    assert ((some[0] >= 0) & (some[0] < 300)).all()


@every_implementation
@pytest.mark.parametrize("top_k, top_p", [(0, 0), (20, 0.0), (0, 0.7)])
def test_draws_follow_the_probabilities(implementation, top_k, top_p):
    rng = np.random.default_rng(9)
    logits_V = (rng.standard_normal(97) * 1.5).astype(np.float32)
    kept_V, _ = ref.kept(logits_V, ref.Wish(temperature=0.8, top_k=top_k, top_p=top_p or 1.0))
    share_V = np.where(kept_V, np.exp(logits_V.astype(np.float64) / 0.8), 0)
    expected_V = share_V / share_V.sum()
    counts_V = np.zeros(97)
    for _ in range(100):
        bits_S = rng.integers(0, 2**32, 512, dtype=np.uint32)
        token_S, *_ = run(implementation, np.tile(logits_V, (512, 1)), 0.8, top_k, top_p, 0, bits_S)
        counts_V += np.bincount(token_S, minlength=97)
    assert counts_V[~kept_V].sum() == 0
    import scipy.stats  # here, as it takes seconds, and every run of other tests reads this file

    test = scipy.stats.chisquare(counts_V[kept_V], expected_V[kept_V] * counts_V.sum())
    assert test.pvalue > 1e-3


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="only the reference runs here")
def test_the_kernel_agrees_with_the_reference():
    rng = np.random.default_rng(11)
    logits_SV, wishes = random_rows(rng, 32, 97)
    settings = [[getattr(w, n) for w in wishes] for n in ("temperature", "top_k", "top_p", "min_p")]
    for kernel, reference in zip(
        run("cpu", logits_SV, *settings, 7), run("reference", logits_SV, *settings, 7), strict=True
    ):
        np.testing.assert_array_equal(kernel, reference)


def test_every_share_of_the_weights_draws_its_own_token():
    rng = np.random.default_rng(2)
    weight_V = rng.choice([0, 0, 1, 2, 300], 600).astype(np.int32)
    distance_V = np.where(rng.random(600) < 0.8, 1, 9).astype(np.float32)  # those beyond the cutoff draw nothing
    upto_V = np.cumsum(np.where(distance_V < 5, weight_V, 0))
    goals = np.union1d(upto_V[:-1], upto_V[:-1] - 1)
    goals = goals[(goals >= 0) & (goals < upto_V[-1])]
    bits_S = (goals.astype(np.uint64) * 2**32 // upto_V[-1] + 1).astype(np.uint32)
    S = len(goals)
    token_S = jax.jit(draw)(
        np.tile(distance_V, (S, 1)), np.tile(weight_V, (S, 1)), np.full(S, 5, np.float32), jnp.asarray(bits_S)
    )
    np.testing.assert_array_equal(token_S, np.searchsorted(upto_V, goals, side="right"))


def test_multiply_high_is_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 1000), dtype=np.uint64)
    a[:2], b[:2] = 2**32 - 1, (2**32 - 1, 0)
    np.testing.assert_array_equal(multiply_high(jnp.uint32(a), jnp.uint32(b)), (a * b) >> np.uint64(32))


def test_distances_are_what_numpy_computes():
    logits_SV = np.random.default_rng(1).standard_normal((4, 97)).astype(np.float32) * 10
    temperature_S = np.array([0.01, 0.7, 1, 3], np.float32)
    expected_SV = (logits_SV.max(-1, keepdims=True) - logits_SV) * (np.float32(1) / temperature_S)[:, None]
    got_SV = jax.jit(distances)(logits_SV, logits_SV.max(-1), temperature_S)
    np.testing.assert_array_equal(got_SV, expected_SV)


def test_what_cannot_be_chosen_from_is_refused():
    wide = jax.ShapeDtypeStruct((1, MAX_VOCABULARY + 1), jnp.float32)
    with pytest.raises(ValueError, match="too wide"):
        jax.eval_shape(lambda x: choose(x, 0, 0, 0, 0, 0), wide)
    with pytest.raises(ValueError, match="reference"):
        choose(jnp.zeros((1, 8)), 0, 0, 0, 0, 0, implementation="sorted")
