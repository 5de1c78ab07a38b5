"""Sampling in parts: where the vocabulary is split over devices the scores change hands once, and each device samples
its rows; where many are left to one TPU, they take turns.

Dimension key
    S  rows    V  vocabulary, this device's part or all of it
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from models import parallel
from pallas_kernels.platform import current_platform
from runtime.sampling.knobs import Knobs
from runtime.sampling.sampler import Sampled, sample

ROWS = 16


def sample_spread(logits_SV, knobs: Knobs, tables, slots_S, history_XU, mask_SW, **options) -> Sampled:
    """As `sample`, of this device's part of the vocabulary; every device gets what all rows sampled."""
    split = parallel.splits("vocab")
    if split is None:
        return sample_in_turns(logits_SV, knobs, tables, slots_S, history_XU, mask_SW, **options)
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


def sample_in_turns(logits_SV, knobs: Knobs, tables, slots_S, history_XU, mask_SW, *, rows=None, **options) -> Sampled:
    """As `sample`, so many rows at a time: it keeps several arrays as large as their scores.

    Args:
        rows: None for all at once, but ROWS on a TPU, where 256 rows of 128,000 tokens would take 900 MiB.
    """
    rows = rows or (ROWS if current_platform() == "tpu" else len(slots_S))
    if len(slots_S) <= rows or len(slots_S) % rows:
        return sample(logits_SV, knobs, tables, slots_S, history_XU, mask_SW, **options)
    turns = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (logits_SV, knobs, slots_S, mask_SW))

    def one(turn):
        logits_SV, knobs, slots_S, mask_SW = turn
        return sample(logits_SV, knobs, tables, slots_S, history_XU, mask_SW, **options)

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(one, turns))


def whole_scores(logits: Callable) -> Callable:
    """A model's `logits` that gives every device the whole vocabulary; for a few rows."""
    split = parallel.splits("vocab")
    if split is None:
        return logits
    return lambda hidden_RD: lax.all_gather(logits(hidden_RD), split.mesh_axis, axis=1, tiled=True)


def _padded(x, padding):
    return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) if padding else x
