"""The token table: ids to vectors, and, in models that tie the two, vectors to scores.

Dimension key
    T  tokens in the step     S  sequences     D  hidden size     V  vocabulary size
"""

import jax.numpy as jnp
from flax import nnx

from models import parallel
from models.layers.linear import int8_form
from pallas_kernels import panels
from pallas_kernels.linear import linear
from pallas_kernels.rotation import rotate


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, size: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.table = nnx.Param(init(rngs.params(), (vocab_size, size), jnp.float32), axes=("vocab", "hidden"))
        self.table_scale = nnx.data(None)
        self.in_panels = False

    def quantise(self, method: str):
        """Turns a table of shapes into its int8 form, in place, whatever the method: a scale for each token."""
        self.table_scale = int8_form(self.table)

    def put_in_panels(self, dtype) -> bool:
        """Makes a table of shapes expect its vectors, of this dtype, in panels where that is faster; whether it is."""
        num_tokens, size = self.table.get_value().shape
        self.in_panels = panels.suits(num_tokens, size, dtype)
        return self.in_panels

    def __call__(self, token_ids_T, dtype=None):
        """`[T, D]` in dtype, or the table's own."""
        table_VD = self.table[...]
        if (split := parallel.splits("vocab")) is not None:
            rows_T = token_ids_T - parallel.place(split) * len(table_VD)
            mine_T = (rows_T >= 0) & (rows_T < len(table_VD))
            token_ids_T = jnp.where(mine_T, rows_T, 0)
        x_TD = panels.rows(table_VD, token_ids_T) if self.in_panels else table_VD[token_ids_T]
        if self.table_scale is not None:
            x_TD = rotate(x_TD.astype(jnp.float32) * self.table_scale[...][token_ids_T][:, None])
        if split is not None:  # the other devices add zeros
            x_TD = parallel.add_up(jnp.where(mine_T[:, None], x_TD, 0), split)
        return x_TD if dtype is None else x_TD.astype(dtype)

    def scores(self, hidden_SD, num_rows=None):
        """float32[S, V]: how well each token's vector fits, for models whose output head is this table."""
        scale_V = None if self.table_scale is None else self.table_scale[...]
        options = {"kernel_scale": scale_V, "out_dtype": jnp.float32, "in_panels": self.in_panels}
        return linear(hidden_SD, self.table[...], num_rows, **options)
