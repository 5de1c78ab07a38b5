"""Llama 2 and 3, and every checkpoint of the same block (Mistral, Mixtral, Qwen2, SmolLM2, Yi).

Source: Touvron et al. 2023, arXiv 2307.09288; Dubey et al. 2024, arXiv 2407.21783; Jiang et al. 2023,
arXiv 2310.06825; Yang et al. 2024, arXiv 2407.10671.

Dimension key
    T  tokens in the step, all sequences end to end     S  sequences in the step
    D  hidden size      F  feed-forward size            V  vocabulary size
    N  query heads      K  key/value heads              H  head dimension
"""

import dataclasses

from flax import nnx

from models.inputs import CacheSpec
from models.layers.attention import Attention, Step
from models.layers.embedding import Embedding
from models.layers.experts import Mixture, feed_forward
from models.layers.head import Head
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.rope import Rope, rope_tables
from models.layers.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """
    Attributes:
        windows: for each layer, how many tokens a query looks back, itself included; None for all.
        mixture: the experts that stand for each feed-forward layer; None where there is one layer.
    """

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rope: Rope
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    mixture: Mixture | None = None

    @property
    def num_layers(self) -> int:
        return len(self.windows)


class Llama(Head):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.hidden_size, rngs=rngs)
        self.layers = Stack(lambda: Block(c, rngs=rngs), c.windows)
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Linear((c.vocab_size,), c.hidden_size, axes=("vocab", "hidden"), rngs=rngs)

    def cache_specs(self) -> list[CacheSpec]:
        c = self.config
        return [CacheSpec(c.num_kv_heads, c.head_dim, window) for window in c.windows]

    def __call__(self, inputs, caches):
        """Runs one step. Returns hidden_TD and the caches with this step's tokens written."""
        step = Step(inputs, rope_tables((self.config.rope,), inputs.positions_T))
        x_TD, caches = self.layers(self.embed(inputs.token_ids_T, self.norm.scale[...].dtype), caches, step)
        return self.norm(x_TD), caches


class Block(nnx.Module):
    def __init__(self, c: LlamaConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = Attention(
            c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, qkv_bias=c.qkv_bias, o_bias=c.o_bias, rngs=rngs
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = feed_forward(c, bias=c.mlp_bias, rngs=rngs)

    def __call__(self, x_TD, cache, step, layer):
        x_TD, cache = self.attn(x_TD, cache, step, layer, norm=self.attn_norm, residual=x_TD)
        return self.mlp(x_TD, step.inputs.num_tokens, norm=self.mlp_norm, residual=x_TD), cache
