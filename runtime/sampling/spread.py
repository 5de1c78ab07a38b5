"""Sampling in parts: where the vocabulary is split over devices the scores change hands once, and each device samples
its rows; where many are left to one accelerator, they take turns.

Dimension key
    S  rows    V  vocabulary, this device's part or all of it
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from models import parallel
from pallas_kernels.platform import current_platform
from runtime.sampling.knobs import LOGPROBS, Knobs
from runtime.sampling.logprobs import nothing
from runtime.sampling.sampler import Sampled, describe, likeliest, of_likeliest, pick, sample, wants_more_S

# Rows sampled at a time. A turn keeps some arrays as large as its scores: with 256 rows of 128,000 tokens at once they
# would be 500 MiB beside the scores themselves. On a CPU scores are small, and a turn more costs more than it saves.
ROWS = {"tpu": 8, "gpu": 16}


def sample_states(
    model, hidden_SD, knobs: Knobs, tables, slots_S, history_XU, mask_SW, *, num_rows=None, **options
) -> Sampled:
    """Scores a model's last states and samples, as `sample` does; no scores are written where there is no need."""

    def by_scores():
        logits_SV = model.logits(hidden_SD, num_rows)
        return sample_spread(logits_SV, knobs, tables, slots_S, history_XU, mask_SW, num_rows=num_rows, **options)

    def by_likeliest():
        token_S, best_S, is_finite_S = model.likeliest(hidden_SD, num_rows)
        return of_likeliest(token_S, best_S, is_finite_S, options["max_logprobs"])

    if not model.finds_likeliest(hidden_SD):
        return by_scores()
    return lax.cond(wants_more_S(knobs).any(), by_scores, by_likeliest)


def sample_spread(
    logits_SV, knobs: Knobs, tables, slots_S, history_XU, mask_SW, *, num_rows=None, **options
) -> Sampled:
    """As `sample`, of this device's part of the vocabulary; every device gets what all rows sampled."""
    split = parallel.splits("vocab")
    if split is None:
        return sample_in_turns(logits_SV, knobs, tables, slots_S, history_XU, mask_SW, num_rows=num_rows, **options)
    S = len(logits_SV)
    padding = -S % split.size
    mine = (S + padding) // split.size
    logits_SV = lax.all_to_all(_padded(logits_SV, padding), split.mesh_axis, split_axis=0, concat_axis=1, tiled=True)

    def own(x):
        return lax.dynamic_slice_in_dim(_padded(x, padding), parallel.place(split) * mine, mine)

    sampled = sample_in_turns(
        logits_SV, jax.tree.map(own, knobs), tables, own(slots_S), history_XU, own(mask_SW), **options
    )  # fmt: skip
    return jax.tree.map(lambda x: lax.all_gather(x, split.mesh_axis, tiled=True)[:S], sampled)


def sample_in_turns(
    logits_SV, knobs: Knobs, tables, slots_S, history_XU, mask_SW, *,
    max_logprobs, logprobs_mode, num_rows=None, rows=None,
) -> Sampled:  # fmt: skip
    """As `sample`, so many rows at a time; all at once where each wants its likeliest token and nothing else.

    Args:
        rows: None for what suits the platform, see ROWS.
    """
    rows = rows or ROWS.get(current_platform(), len(slots_S))
    options = {"max_logprobs": max_logprobs, "logprobs_mode": logprobs_mode}
    if len(slots_S) <= rows or len(slots_S) % rows:
        return sample(logits_SV, knobs, tables, slots_S, history_XU, mask_SW, num_rows=num_rows, **options)
    by_row = slots_S, knobs, mask_SW

    def turns(part, *more):
        """part of so many rows at a time, with the rows of more."""

        def turn(i):
            own = lambda x: lax.dynamic_slice_in_dim(x, i * rows, rows)
            slots_R, knobs_R, mask_RW = jax.tree.map(own, by_row)
            return part(own(logits_SV), *map(own, more), knobs_R, tables, slots_R, history_XU, mask_RW)

        parts = lax.map(turn, jnp.arange(len(slots_S) // rows))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)

    def in_turns():
        token_S, is_faulty_S, cutoff_S = turns(pick)
        described = lax.cond(
            knobs.has(LOGPROBS).any(),
            lambda: turns(functools.partial(describe, **options), token_S, cutoff_S),
            lambda: nothing(len(token_S), max_logprobs),
        )
        return Sampled(token_S, is_faulty_S, *described)

    return lax.cond(wants_more_S(knobs).any(), in_turns, lambda: likeliest(logits_SV, max_logprobs))


def whole_scores(logits: Callable) -> Callable:
    """A model's `logits` that gives every device the whole vocabulary; for a few rows."""
    split = parallel.splits("vocab")
    if split is None:
        return logits
    return lambda hidden_RD: lax.all_gather(logits(hidden_RD), split.mesh_axis, axis=1, tiled=True)


def _padded(x, padding):
    return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) if padding else x
