"""Rotary position embedding, and the ways checkpoints stretch it to longer texts.

Source: Su et al. 2021, arXiv 2104.09864; linear: Chen et al. 2023, arXiv 2306.15595; yarn: Peng et al. 2023,
arXiv 2309.00071; llama3: as published with Llama 3.1.

Dimension key
    T  tokens in the step     H  head dimension     R  rotated pairs, H / 2
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn into angles. Every kind starts from theta; `factors` divides each frequency at the end.

    Attributes:
        kind: a name in KINDS.
        factor: how many times longer the text may be than `original_length`.
        low, high: llama3: periods longer than original_length / low are stretched in full, shorter than
            original_length / high not at all. yarn: its beta_slow and beta_fast.
        truncate: yarn: whether its first and last stretched pair are whole numbers.
        magnitude: multiplies sines and cosines, and so queries and keys; yarn's attention factor.
        factors: a divisor for each frequency, for files that carry them.
    """

    theta: float
    head_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 4.0
    truncate: bool = True
    magnitude: float = 1.0
    factors: tuple[float, ...] | None = None


def rope_tables(ropes: tuple[Rope, ...], positions_T):
    """Sines and cosines of every table for these positions: float32 `[len(ropes), T, 2, R]`, cosines first."""
    tables = []
    for rope in ropes:
        # float32: bfloat16 rounds 257 to 256, and sin(257) is far from sin(256).
        angles_TR = positions_T.astype(jnp.float32)[:, None] * jnp.asarray(frequencies(rope))
        tables.append(jnp.stack([jnp.cos(angles_TR), jnp.sin(angles_TR)], axis=1) * rope.magnitude)
    return jnp.stack(tables)


def frequencies(rope: Rope) -> np.ndarray:
    """Radians a position for each pair, float32[R]."""
    base_R = rope.theta ** -(np.arange(0, rope.head_dim, 2, dtype=np.float64) / rope.head_dim)
    scaled_R = KINDS[rope.kind](base_R, rope)
    return (scaled_R / (np.asarray(rope.factors) if rope.factors else 1.0)).astype(np.float32)


def _default(base_R, rope):
    return base_R


def _linear(base_R, rope):
    return base_R / rope.factor


def _llama3(base_R, rope):
    turns_R = rope.original_length * base_R / (2 * math.pi)  # full turns over the original length
    kept_R = np.clip((turns_R - rope.low) / (rope.high - rope.low), 0, 1)
    return kept_R * base_R + (1 - kept_R) * base_R / rope.factor


def _yarn(base_R, rope):
    def pair(turns):  # the (fractional) pair that makes so many turns over the original length
        return rope.head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.high), pair(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.head_dim - 1)
    stretched_R = np.clip((np.arange(len(base_R)) - first) / (max(last - first, 0.001)), 0, 1)
    return base_R * (1 - stretched_R) + base_R / rope.factor * stretched_R


KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
