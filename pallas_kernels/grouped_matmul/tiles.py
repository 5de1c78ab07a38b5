"""Sorted rows cut into tiles of one expert each.

Dimension key
    T  rows, sorted by expert     E  experts     N  tiles
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Where experts' rows and tiles lie. Tiles past the last are of expert E, and end at row 0.

    Attributes:
        expert_N: int32, each tile's.
        start_N, end_N: int32, its first row, and the row that its expert ends before.
        first_row_E, first_tile_E: int32, each expert's.
    """

    expert_N: jax.Array
    start_N: jax.Array
    end_N: jax.Array
    first_row_E: jax.Array
    first_tile_E: jax.Array

    @classmethod
    def of(cls, sizes_E, T: int, rows: int) -> "Tiles":
        """Args: sizes_E: int32, rows of each expert; T: rows in all, padding with them; rows: of a tile."""
        E = len(sizes_E)
        tiles_E = -(-sizes_E // rows)
        last_row_E, last_tile_E = jnp.cumsum(sizes_E), jnp.cumsum(tiles_E)
        first_row_E, first_tile_E = last_row_E - sizes_E, last_tile_E - tiles_E
        # Each expert that has rows leaves one tile unfilled at most.
        tile_N = jnp.arange(T // rows + min(E, T), dtype=jnp.int32)
        expert_N = (last_tile_E <= tile_N[:, None]).sum(1, dtype=jnp.int32)
        known_N = jnp.minimum(expert_N, E - 1)
        start_N = first_row_E[known_N] + (tile_N - first_tile_E[known_N]) * rows
        end_N = jnp.where(expert_N < E, last_row_E[known_N], 0)
        return cls(expert_N, start_N, end_N, first_row_E, first_tile_E)
