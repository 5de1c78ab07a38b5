"""Logits -> one token a row, inside the compiled step, whatever mix of settings the rows have.

One program serves every batch: a setting is an array, and what no row asks for is skipped by a
`lax.cond`. Rows never touch each other: a row's token is the same bit for bit in any batch.

Dimension key
    S  rows    V  vocabulary    W  mask words    X  slots    U  tokens a slot's history holds
    J  likeliest tokens reported    E  stop tokens
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.choose import best, choose, distances
from pallas_kernels.platform import current_platform
from runtime.sampling import logprobs
from runtime.sampling.adjust import (
    BANNED,
    adjust,
    is_held_S,
    needs_adjusting_S,
    only_holds_stops_S,
    own_stops_SE,
)
from runtime.sampling.knobs import IGNORE_EOS, LOGPROBS, Knobs
from runtime.sampling.noise import random_bits
from runtime.sampling.tables import Tables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """What the sampler says of each row.

    Attributes:
        token_S: int32.
        is_faulty_S: the row's logits were not finite, or every token was banned; its token means nothing.
        logprob_S, rank_S: of the token; rank 1 is the likeliest. Zero unless some row has the LOGPROBS flag.
        top_ids_SJ, top_logprobs_SJ: the likeliest tokens, sorted. Zero likewise.
    """

    token_S: jax.Array
    is_faulty_S: jax.Array
    logprob_S: jax.Array
    rank_S: jax.Array
    top_ids_SJ: jax.Array
    top_logprobs_SJ: jax.Array


def sample(
    logits_SV: jax.Array,
    knobs: Knobs,
    tables: Tables,
    slots_S: jax.Array,
    history_XU: jax.Array,
    mask_SW: jax.Array,
    *,
    num_rows: jax.Array | None = None,
    max_logprobs: int,
    logprobs_mode: str = "raw_logprobs",
) -> Sampled:
    """Samples one token for each row.

    Order: allowed tokens and mask, bad words, bias, stop tokens held back, penalties; then the likeliest
    token, or temperature, min_p, top_k, top_p and a draw.

    Args:
        logits_SV: float32, finite.
        knobs: one row's settings each; a row of zeros is greedy and free.
        tables, slots_S: rarely used settings, and each row's place in them and in the history.
        history_XU: int32 tokens by position, read up to num_known_S where a setting looks back.
        mask_SW: uint32 bits, read for rows with the MASK flag.
        num_rows: int32 scalar: rows at or past it are padding, and come out as anything. None when all are real.
        max_logprobs: J, static.
        logprobs_mode: static: "raw_" is before any setting, "processed_" after all of them;
            "_logits" are reported without normalising.
    """
    rows = knobs, tables, slots_S, history_XU, mask_SW
    token_S, is_faulty_S, cutoff_S = pick(logits_SV, *rows, num_rows=num_rows)
    described = lax.cond(
        knobs.has(LOGPROBS).any(),
        lambda: describe(logits_SV, token_S, cutoff_S, *rows, max_logprobs=max_logprobs, logprobs_mode=logprobs_mode),
        lambda: logprobs.nothing(len(token_S), max_logprobs),
    )
    return Sampled(token_S, is_faulty_S, *described)


def pick(logits_SV, knobs: Knobs, tables, slots_S, history_XU, mask_SW, *, num_rows=None):
    """(token_S, is_faulty_S, cutoff_S): the first half of `sample`, and the largest distance from the best kept."""
    rows = knobs, tables, slots_S, history_XU, mask_SW
    if current_platform() != "cpu":
        return _choose(adjust(logits_SV, *rows), knobs, num_rows, _is_finite_S(logits_SV))
    # There a look at all logits takes less time than a copy of them, and a cond that gives them back copies.
    needs_S = needs_adjusting_S(knobs)
    greedy = dataclasses.replace(knobs, temperature_S=jnp.where(needs_S, 0.0, knobs.temperature_S))
    token_S, is_faulty_S, cutoff_S = _choose(logits_SV, greedy, num_rows)
    # A greedy row that only holds its stop tokens back gains another token by that if it was one of them.
    held_S = is_held_S(token_S, knobs, tables, slots_S)
    settled_S = ~needs_S | (only_holds_stops_S(knobs) & ~knobs.is_random_S & ~held_S)
    return lax.cond(
        settled_S.all(),
        lambda: (token_S, is_faulty_S, cutoff_S),
        lambda: _choose(adjust(logits_SV, *rows), knobs, num_rows, ~is_faulty_S),
    )


def describe(
    logits_SV, token_S, cutoff_S, knobs: Knobs, tables, slots_S, history_XU, mask_SW, *, max_logprobs, logprobs_mode
):
    """(logprob_S, rank_S, top_ids_SJ, top_logprobs_SJ): the second half of `sample`, of the tokens that were picked."""
    if logprobs_mode not in logprobs.MODES:
        raise ValueError(f"unknown logprobs_mode {logprobs_mode!r}; choose one of {logprobs.MODES}")
    if logprobs_mode.startswith("processed"):
        adjusted_SV = adjust(logits_SV, knobs, tables, slots_S, history_XU, mask_SW)
        logits_SV = _processed(adjusted_SV, cutoff_S, knobs)
    normalise = logprobs_mode.endswith("logprobs")
    return logprobs.describe(logits_SV, token_S, max_logprobs=max_logprobs, normalise=normalise)


def wants_more_S(knobs: Knobs) -> jax.Array:
    """Which rows ask for anything but their likeliest token: bool[S]."""
    return needs_adjusting_S(knobs) | knobs.is_random_S | knobs.has(LOGPROBS)


def likeliest(logits_SV, max_logprobs: int) -> Sampled:
    """What `sample` gives when no row wants more."""
    best_S, token_S = best(logits_SV)
    return of_likeliest(token_S, best_S, _is_finite_S(logits_SV), max_logprobs)


def of_likeliest(token_S, best_S, is_finite_S, max_logprobs: int) -> Sampled:
    """The same, of each row's likeliest token, its logit, and whether all of the row's are finite."""
    is_faulty_S = ~(is_finite_S & jnp.isfinite(best_S))
    return Sampled(token_S, is_faulty_S, *logprobs.nothing(len(token_S), max_logprobs))


def finished(token_S, knobs: Knobs, tables: Tables, slots_S) -> jax.Array:
    """Which rows end with this token: bool[S].

    A row ends at max_tokens, with one of its stop ids, or with the model's EOS unless that is ignored;
    the last two only once min_tokens are there.
    """
    is_own_S = (own_stops_SE(knobs, tables, slots_S) == token_S[:, None]).any(-1)
    is_eos_S = (tables.eos_ids_XE[slots_S] == token_S[:, None]).any(-1) & ~knobs.has(IGNORE_EOS)
    stops_S = (is_own_S | is_eos_S) & (knobs.num_generated_S >= knobs.min_tokens_S)
    return stops_S | ((knobs.max_tokens_S > 0) & (knobs.num_generated_S + 1 >= knobs.max_tokens_S))


def _is_finite_S(logits_SV):
    return jnp.isfinite(logits_SV.sum(-1))  # a sum sees NaN and both infinities; a maximum may miss NaN


def _choose(logits_SV, knobs: Knobs, num_rows, is_finite_S=None):
    """(token_S, is_faulty_S, cutoff_S); is_finite_S is whether the logits were finite before they were adjusted."""
    k = knobs
    temperature_S = jnp.where(k.is_random_S, k.temperature_S, 0.0)
    bits_S = random_bits(k.seed_high_S, k.seed_low_S, k.num_generated_S)
    settings = temperature_S, k.top_k_S, k.top_p_S, k.min_p_S
    token_S, best_S, cutoff_S, finite_S = choose(logits_SV, *settings, bits_S, num_rows)
    is_finite_S = finite_S if is_finite_S is None else is_finite_S
    return token_S, ~(is_finite_S & jnp.isfinite(best_S)), cutoff_S


def _processed(logits_SV, cutoff_S, knobs: Knobs):
    """What a row was drawn from: divided by the temperature, filtered-out tokens at -inf; greedy rows as they are."""
    temperature_S = jnp.where(knobs.is_random_S, knobs.temperature_S, 1.0)
    kept_SV = distances(logits_SV, best(logits_SV)[0], temperature_S) <= cutoff_S[:, None]
    return jnp.where(kept_SV | ~knobs.is_random_S[:, None], logits_SV / temperature_S[:, None], BANNED)
