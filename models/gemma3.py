"""Gemma 3, text: local and global layers in turn, each sublayer normalised before and after.

Local layers look back over a window and have their own rotary base; the vectors of the token table are scaled by
the root of their length; the norms' stored scales are differences from one.

Source: Gemma Team 2025, arXiv 2503.19786.

Dimension key
    T  tokens in the step, all sequences end to end     S  sequences in the step
    D  hidden size      V  vocabulary size
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from models.inputs import CacheSpec
from models.layers.attention import Attention, Step
from models.layers.embedding import Embedding
from models.layers.head import Head
from models.layers.linear import Linear
from models.layers.mlp import MLP
from models.layers.norm import RMSNorm
from models.layers.rope import Rope, rope_tables
from models.layers.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """A layer is local when its entry in `windows` is a number, global when it is None.

    Attributes:
        query_scale: attention logits are multiplied by this.
        attention_soft_cap, logits_soft_cap: bounds as c * tanh(x / c), or None.
    """

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    global_rope: Rope
    local_rope: Rope
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]
    query_scale: float
    attention_soft_cap: float | None
    logits_soft_cap: float | None
    attention_bias: bool
    tie_embeddings: bool

    @property
    def num_layers(self) -> int:
        return len(self.windows)


class Gemma3(Head):
    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.hidden_size, rngs=rngs)
        ropes = [0 if window is None else 1 for window in c.windows]
        self.layers = Stack(lambda: Block(c, rngs=rngs), c.windows, ropes)
        self.norm = RMSNorm(c.hidden_size, c.norm_eps, unit_offset=True)
        if not c.tie_embeddings:
            self.lm_head = Linear((c.vocab_size,), c.hidden_size, axes=("vocab", "hidden"), rngs=rngs)

    def cache_specs(self) -> list[CacheSpec]:
        c = self.config
        return [CacheSpec(c.num_kv_heads, c.head_dim, window) for window in c.windows]

    def __call__(self, inputs, caches):
        """Runs one step. Returns hidden_TD and the caches with this step's tokens written."""
        c = self.config
        step = Step(inputs, rope_tables((c.global_rope, c.local_rope), inputs.positions_T))
        x_TD = self.embed(inputs.token_ids_T, self.norm.scale[...].dtype)
        # The factor is rounded to the table's dtype first, as in the code these weights were trained with.
        x_TD = x_TD * jnp.asarray(c.hidden_size**0.5, x_TD.dtype)
        x_TD, caches = self.layers(x_TD, caches, step)
        return self.norm(x_TD), caches

    def logits(self, hidden_SD, num_rows=None):
        """See `Head.logits`."""
        logits_SV, cap = super().logits(hidden_SD, num_rows), self.config.logits_soft_cap
        return logits_SV if cap is None else cap * jnp.tanh(logits_SV / cap)

    def finds_likeliest(self, hidden_SD) -> bool:
        """Not under a soft cap, which makes equals of some scores."""
        return self.config.logits_soft_cap is None and super().finds_likeliest(hidden_SD)


class Block(nnx.Module):
    def __init__(self, c: Gemma3Config, *, rngs: nnx.Rngs):
        def norm(size):
            return RMSNorm(size, c.norm_eps, unit_offset=True)

        self.attn_norm, self.after_attn_norm = norm(c.hidden_size), norm(c.hidden_size)
        self.mlp_norm, self.after_mlp_norm = norm(c.hidden_size), norm(c.hidden_size)
        self.attn = Attention(
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            scale=c.query_scale,
            soft_cap=c.attention_soft_cap,
            qkv_bias=c.attention_bias,
            o_bias=c.attention_bias,
            q_norm=norm(c.head_dim),
            k_norm=norm(c.head_dim),
            rngs=rngs,
        )
        self.mlp = MLP(c.hidden_size, c.ffn_size, activation=c.activation, rngs=rngs)

    def __call__(self, x_TD, cache, step, layer):
        out_TD, cache = self.attn(x_TD, cache, step, layer, norm=self.attn_norm)
        x_TD = x_TD + self.after_attn_norm(out_TD)
        out_TD = self.mlp(x_TD, step.inputs.num_tokens, norm=self.mlp_norm)
        return x_TD + self.after_mlp_norm(out_TD), cache
