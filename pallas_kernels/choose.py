"""Chooses one token a row: the likeliest, or one drawn after temperature, min_p, top_k and top_p.

Everything is about a token's *distance*: how far its logit lies below the row's highest, divided by
the temperature; float32, 0 for the likeliest token, inf for a banned one. Each filter is a cutoff
on it: a token is kept when its distance is at most the cutoff. Hence **tokens tied at the cutoff
are all kept**.

    min_p   distance <= -log(min_p)
    top_k   the smallest cutoff that keeps at least k of what min_p kept
    top_p   the smallest cutoff whose tokens weigh at least top_p of what min_p and top_k kept

Cutoffs are found by bisection instead of a sort. Weights are integers, a row's sum about 2**30, so
that sums are exact: they do not depend on their order, on the other rows, or on how many there are.
The draw inverts the running sum of the kept weights, in the order of the tokens' ids, at one random
number. A row's token therefore does not depend on the batch it is in.

Dimension key
    S  rows    V  vocabulary    A  weights added up at a time
    B  groups of tokens    G  tokens of a group    N  columns
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import cpu
from pallas_kernels.platform import current_platform

EVERYTHING = 3.4028235e38  # a cutoff that leaves out banned tokens only
MAX_VOCABULARY = 1 << 19  # more would overflow the sums
_TOTAL = 2.0**30
_ADDED = 256  # A: 2**22 a weight, 2**30 a sum
_GROUP = 256  # G: two short running sums instead of one over the vocabulary


def choose(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, bits_S, num_rows=None, *, implementation=None):
    """Chooses a token for each row.

    Args:
        logits_SV: float32; -inf marks a banned token. A row with NaN or +inf gets a token that means nothing.
        temperature_S: float32; 0 takes the likeliest token, the first of equals.
        top_k_S: int32, 0 is off. top_p_S: float32, 0 and 1 are off. min_p_S: float32, 0 is off.
        bits_S: uint32, uniform; all the randomness there is.
        num_rows: int32 scalar array: rows at or past it are padding, and come out as anything. None when all are real.
        implementation: a name in IMPLEMENTATIONS, or None for the fastest here.

    Returns:
        (token_S, best_S, cutoff_S, is_finite_S): the token, the row's highest logit, the largest distance kept, and
        whether every logit of the row is a finite number.

    Raises:
        ValueError: the vocabulary is above MAX_VOCABULARY, or the implementation is unknown.
    """
    if logits_SV.shape[1] > MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {logits_SV.shape[1]} is too wide to sample from; at most {MAX_VOCABULARY}")
    name = implementation or _fastest()
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    # abs, for -log(1) is minus zero, whose bits are not those of zero
    cutoff_S = jnp.where(min_p_S > 0, jnp.abs(jnp.log(min_p_S)), EVERYTHING)
    return IMPLEMENTATIONS[name](logits_SV, temperature_S, top_k_S, top_p_S, cutoff_S, bits_S, num_rows)


def _fastest() -> str:
    platform = current_platform()
    if platform == "cpu":
        return "cpu" if cpu.is_available() else "reference"
    return "reference" if platform == "tpu" else "wide"


def reference(logits_SV, temperature_S, top_k_S, top_p_S, cutoff_S, bits_S, num_rows=None, *, search=None):
    """Plain jnp, all rows at once; what no row asks for is skipped. cutoff_S is min_p's, `search` finds the others."""
    best_S, likeliest_S = best(logits_SV)
    sum_S = logits_SV.sum(-1)  # sees NaN and both infinities; a maximum may miss NaN
    # What is not a number is within no cutoff, and the search for one would take its time.
    random_S = (temperature_S > 0) & (sum_S < jnp.inf)

    def at_random():
        distance_SV = distances(logits_SV, best_S, jnp.where(random_S, temperature_S, 1.0))
        scale_S = scales(distance_SV)
        weight_SV = weights(distance_SV, scale_S[:, None])
        k_S, p_S = jnp.where(random_S, top_k_S, 0), jnp.where(random_S, top_p_S, 0.0)
        kept_S = cutoffs(distance_SV, weight_SV, scale_S, k_S, p_S, cutoff_S, search or _smallest)
        return jnp.where(random_S, draw(distance_SV, weight_SV, kept_S, bits_S), likeliest_S), kept_S

    token_S, kept_S = lax.cond(random_S.any(), at_random, lambda: (likeliest_S, cutoff_S))
    return token_S, best_S, jnp.where(random_S, kept_S, EVERYTHING), jnp.isfinite(sum_S)


def wide(*arguments):
    """The same with fewer and wider passes over the vocabulary, and loops whose length no host has to ask for."""
    return reference(*arguments, search=_smallest_of_many)


def cpu_kernel(logits_SV, temperature_S, top_k_S, top_p_S, cutoff_S, bits_S, num_rows):
    """The same, a row at a time, and whether it is finite; see pallas_kernels.cpu.choosing."""
    from pallas_kernels.cpu import choosing

    threads = cpu.register().num_threads
    return choosing.choose(logits_SV, temperature_S, top_k_S, top_p_S, cutoff_S, bits_S, num_rows, num_threads=threads)


def best(logits_SV) -> tuple[jax.Array, jax.Array]:
    """The highest logit of each row and the first token that has it: float32[S], int32[S].

    On a CPU group by group: XLA's own argmax takes several times as long there. Elsewhere in two plain passes: to look
    into each row's group, a TPU first lays all of them out anew.
    """
    S, V = logits_SV.shape
    group = math.gcd(V, 256)
    if group < 64 or current_platform() != "cpu":
        best_S = logits_SV.max(-1)
        return best_S, _first(logits_SV == best_S[:, None])
    best_SB = logits_SV.reshape(S, -1, group).max(-1)
    best_S = best_SB.max(-1)
    group_S1 = _first(best_SB == best_S[:, None])[:, None]
    ids_SG = group_S1 * group + jnp.arange(group, dtype=jnp.int32)
    logits_SG = jnp.take_along_axis(logits_SV, ids_SG, axis=1, mode="clip")
    return best_S, group_S1[:, 0] * group + _first(logits_SG == best_S[:, None])


def _first(found_SX) -> jax.Array:
    """The first true column of each row; the last column when there is none."""
    width = found_SX.shape[1]
    return jnp.where(found_SX, jnp.arange(width, dtype=jnp.int32), width - 1).min(-1)


def distances(logits_SV, best_S, temperature_S) -> jax.Array:
    """How far each token lies below the best, in units of the temperature: float32[S, V], 0 to inf."""
    return (best_S[:, None] - logits_SV) * (1.0 / temperature_S)[:, None]


def scales(distance_SV) -> jax.Array:
    """What exp(-distance) is multiplied by so that a row adds up to about 2**30: float32[S].

    Never more than 2**31 in all. Computed with integers, for the reason given above.
    """
    S, V = distance_SV.shape
    pad = -V % _ADDED
    coarse_SV = jnp.round(jnp.exp(-distance_SV) * 2.0**22).astype(jnp.int32)
    part_SA = jnp.pad(coarse_SV, ((0, 0), (0, pad))).reshape(S, -1, _ADDED).sum(-1)
    num_parts = part_SA.shape[1]
    keep = (num_parts - 1).bit_length()  # bits dropped from each part, so that the sum stays near 2**30
    total_S = ((part_SA + ((1 << keep) - 1)) >> keep).sum(-1).astype(jnp.float32) * 2.0 ** (keep - 22)
    return _TOTAL / total_S


def weights(distance, scale) -> jax.Array:
    """Integer weights, proportional to probabilities: int32, the shape of the broadcast arguments."""
    return jnp.round(jnp.exp(-distance) * scale).astype(jnp.int32)


def cutoffs(distance_SV, weight_SV, scale_S, top_k_S, top_p_S, cutoff_S, search) -> jax.Array:
    """The largest distance that top_k and top_p leave of what cutoff_S keeps: float32[S]."""
    wants_k_S = top_k_S > 0
    wants_p_S = (top_p_S > 0) & (top_p_S < 1)

    def count(cutoff_S):
        return (distance_SV <= cutoff_S[:, None]).astype(jnp.float32).sum(-1).astype(jnp.int32)  # exact below 2**24

    def mass(cutoff_S):
        return jnp.where(distance_SV <= cutoff_S[:, None], weight_SV, 0).sum(-1)

    def lightest(cutoff_S):
        weight_S = weights(cutoff_S, scale_S)
        return weight_S - (weight_S >> 16) - 1  # a vectorised exp may differ from this one in its last bits

    def by_top_k(cutoff_S):
        all_S = count(cutoff_S)
        active_S = wants_k_S & (all_S > top_k_S)
        return search(count, top_k_S, cutoff_S, all_S, active_S, lambda _: 1)

    def by_top_p(cutoff_S):
        all_S = mass(cutoff_S)
        share_S = jnp.ceil(all_S.astype(jnp.float32) * top_p_S).astype(jnp.int32)
        return search(mass, jnp.clip(share_S, 1, all_S), cutoff_S, all_S, wants_p_S, lightest)

    cutoff_S = lax.cond(wants_k_S.any(), by_top_k, lambda same_S: same_S, cutoff_S)
    return lax.cond(wants_p_S.any(), by_top_p, lambda same_S: same_S, cutoff_S)


def _smallest(measure, target_S, cutoff_S, measure_S, active_S, lightest) -> jax.Array:
    """Bisects for the smallest cutoff whose measure reaches the target; inactive rows keep theirs.

    Distances are never negative, so their bits order as integers do. The interval (low, high] always
    holds the answer. A row is done when one token, or one set of equals, is left in it.

    Args:
        measure: cutoff_S -> int32[S], what the tokens within it count or weigh.
        cutoff_S, measure_S: where to start from, above, and the measure there.
        lightest: cutoff_S -> int32[S], at most what one token within it counts or weighs.
    """

    def is_open(low_S, high_S, below_S, within_S):
        several_S = within_S - below_S >= 2 * lightest(_value(high_S))
        return active_S & (high_S - low_S > 1) & several_S & (within_S > target_S)

    def body(state):
        i, open_S, low_S, high_S, below_S, within_S = state
        # Halving the distance converges faster than halving its bits, except over many powers of two.
        near_S = _bits(0.5 * (_value(jnp.maximum(low_S, 0)) + _value(high_S)))
        halves_S = low_S + (high_S - low_S) // 2
        middle_S = jnp.where((i < 20) & (high_S < _bits(jnp.float32(64.0))), near_S, halves_S)
        middle_S = jnp.clip(middle_S, low_S + 1, high_S - 1)
        measure_S = measure(_value(middle_S))
        reached_S = measure_S >= target_S
        up_S, down_S = open_S & reached_S, open_S & ~reached_S
        high_S, within_S = jnp.where(up_S, middle_S, high_S), jnp.where(up_S, measure_S, within_S)
        low_S, below_S = jnp.where(down_S, middle_S, low_S), jnp.where(down_S, measure_S, below_S)
        return i + 1, is_open(low_S, high_S, below_S, within_S), low_S, high_S, below_S, within_S

    low_S, below_S = jnp.full_like(target_S, -1), jnp.zeros_like(target_S)
    high_S = _bits(cutoff_S)
    start = (jnp.int32(0), is_open(low_S, high_S, below_S, measure_S), low_S, high_S, below_S, measure_S)
    return _value(lax.while_loop(lambda state: state[1].any(), body, start)[3])


def _smallest_of_many(measure, target_S, cutoff_S, measure_S, active_S, lightest) -> jax.Array:
    """The same by eight passes, each of which tries fifteen cutoffs of the interval at once.

    A loop of unknown length costs a GPU a round trip to the host in each turn, more than a pass over the vocabulary.
    """

    def body(_, interval):
        low_S, high_S = interval
        width_S = high_S - low_S
        bounds = [low_S + (width_S >> 4) * i + ((width_S & 15) * i >> 4) for i in range(1, 16)]
        bounds_NS = jnp.stack([low_S, *bounds, high_S])
        num_S = sum((measure(_value(bound_S)) < target_S).astype(jnp.int32) for bound_S in bounds)
        column = lambda n_S: jnp.take_along_axis(bounds_NS, n_S[None], axis=0)[0]
        return column(num_S), column(num_S + 1)

    start = (jnp.full_like(target_S, -1), _bits(cutoff_S))
    _, high_S = lax.fori_loop(0, 8, body, start)  # 2 ** 31 values, sixteen times fewer in each
    return jnp.where(active_S, _value(high_S), cutoff_S)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _value(x):
    return lax.bitcast_convert_type(x, jnp.float32)


def draw(distance_SV, weight_SV, cutoff_S, bits_S) -> jax.Array:
    """Draws from the tokens within the cutoff, in proportion to their weights: int32[S].

    Args:
        distance_SV, weight_SV, cutoff_S: as above.
        bits_S: uint32, uniform.
    """
    S, V = distance_SV.shape
    kept_SV = jnp.where(distance_SV <= cutoff_S[:, None], weight_SV, 0)
    kept_SBG = jnp.pad(kept_SV, ((0, 0), (0, -V % _GROUP))).reshape(S, -1, _GROUP)
    upto_SB = running_sum(kept_SBG.sum(-1))
    goal_S1 = multiply_high(bits_S, upto_SB[:, -1].astype(jnp.uint32)).astype(jnp.int32)[:, None]
    group_S = (upto_SB <= goal_S1).sum(-1, dtype=jnp.int32)
    before_S1 = jnp.where(jnp.arange(upto_SB.shape[1]) == group_S[:, None] - 1, upto_SB, 0).sum(-1, keepdims=True)
    kept_SG = jnp.take_along_axis(kept_SBG, group_S[:, None, None], axis=1, mode="clip")[:, 0]
    within_S = (before_S1 + running_sum(kept_SG) <= goal_S1).sum(-1, dtype=jnp.int32)
    return jnp.minimum(group_S * _GROUP + within_S, V - 1)


def running_sum(x_SN) -> jax.Array:
    """jnp.cumsum over the last axis, for a few hundred columns; XLA takes a second to compile that one for a CPU."""
    S, N = x_SN.shape
    x_SAB = jnp.pad(x_SN, ((0, 0), (0, -N % 16))).reshape(S, -1, 16)
    inner_SAB = jnp.where(jnp.tri(16, dtype=bool), x_SAB[:, :, None, :], 0).sum(-1)
    num_outer = x_SAB.shape[1]
    is_before_AA = jnp.tri(num_outer, k=-1, dtype=bool)
    outer_SA = jnp.where(is_before_AA, inner_SAB[:, None, :, -1], 0).sum(-1)
    return (inner_SAB + outer_SA[:, :, None]).reshape(S, -1)[:, :N]


def multiply_high(a, b) -> jax.Array:
    """The upper 32 bits of the 64-bit product of two uint32."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16) + ((a0 * b1 + (middle & 0xFFFF)) >> 16)


IMPLEMENTATIONS = {"reference": reference, "wide": wide, "cpu": cpu_kernel}
