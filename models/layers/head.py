"""The end of a model: its last states against the vocabulary.

Dimension key
    S  rows     D  hidden size     V  vocabulary size
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from models import parallel
from models.layers.embedding import Embedding
from models.layers.linear import Linear
from pallas_kernels import likeliest


class Head(nnx.Module):
    """A decoder that scores by its `lm_head`, or by its `embed` where the config ties the two."""

    config: Any
    embed: Embedding
    lm_head: Linear

    def logits(self, hidden_SD, num_rows=None):
        """Scores the vocabulary, float32[S, V]. Pass only the rows to be sampled; rows past num_rows are padding."""
        if self.config.tie_embeddings:
            return self.embed.scores(hidden_SD, num_rows)
        return self.lm_head(hidden_SD, num_rows, out_dtype=jnp.float32)

    def finds_likeliest(self, hidden_SD) -> bool:
        """Whether `likeliest` takes less than `logits` and a look at them: it writes no scores."""
        kernel_VD, _, in_panels = self._vocabulary()
        return parallel.splits("vocab") is None and likeliest.finds(hidden_SD, kernel_VD, in_panels)

    def likeliest(self, hidden_SD, num_rows=None):
        """(token_S, best_S, is_finite_S): the first of each row's highest logits, the logit, whether all are finite."""
        kernel_VD, scale_V, in_panels = self._vocabulary()
        return likeliest.likeliest(hidden_SD, kernel_VD, num_rows, kernel_scale=scale_V, in_panels=in_panels)

    def _vocabulary(self):
        """Each token's vector, its scale if it is int8, and whether they stand in panels."""
        if self.config.tie_embeddings:
            table, scale, in_panels = self.embed.table, self.embed.table_scale, self.embed.in_panels
        else:
            table, scale, in_panels = self.lm_head.kernel, self.lm_head.kernel_scale, self.lm_head.in_panels
        return table[...], None if scale is None else scale[...], in_panels
