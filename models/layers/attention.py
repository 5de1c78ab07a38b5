"""Self-attention with grouped key/value heads over the paged cache.

Source: Ainslie et al. 2023, arXiv 2305.13245.

Dimension key
    T  tokens in the step     D  hidden size            H  head dimension
    N  query heads            K  key/value heads        G  query heads a kv head, N / K
    P  pages in the cache     B  tokens in a page       C  2 K
"""

import dataclasses

import jax
from flax import nnx

from models.inputs import StepInputs
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.stack import Layer
from pallas_kernels.qkv_attention import qkv_attention


@dataclasses.dataclass(frozen=True)
class Step:
    """What every layer shares in one step: the batch, and the rotary tables `[tables, T, 2, H/2]`."""

    inputs: StepInputs
    ropes: jax.Array


class Attention(nnx.Module):
    """Projects, rotates, attends, projects back.

    Args:
        scale: multiplies the logits; H ** -0.5 when None.
        soft_cap: bounds the logits to +- this, as c * tanh(logits / c).
        qkv_bias, o_bias: whether the projections have one.
        q_norm, k_norm: norms over each head's vector before rotation, for the families that have them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        rngs: nnx.Rngs,
    ):
        D, N, K, H = hidden_size, num_heads, num_kv_heads, head_dim
        self.scale, self.soft_cap = H**-0.5 if scale is None else scale, soft_cap
        # What each kv head gets of a token: its queries, then its key, then its value.
        self.qkv = Linear((K, N // K + 2, H), D, axes=("kv_heads", None, None, "hidden"), bias=qkv_bias, rngs=rngs)
        self.o = Linear((D,), N * H, axes=("hidden", "heads"), bias=o_bias, rngs=rngs)
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, x_TD, cache_PBCH, step: Step, layer: Layer, *, norm: RMSNorm, residual=None):
        """`[T, D]`: of norm(x), with the residual added to it; and the cache with this step's keys and values."""
        qkv_TKXH = self.qkv(x_TD, step.inputs.num_tokens, norm=norm)
        out_TNH, cache_PBCH = qkv_attention(
            qkv_TKXH,
            cache_PBCH,
            step.inputs.kv_lens_S,
            step.inputs.page_table_SM,
            step.inputs.cu_q_lens_S1,
            step.inputs.counts_2,
            scale=self.scale,
            soft_cap=self.soft_cap,
            window=layer.window,
            page_offset=layer.page_offset,
            max_q_len=step.inputs.max_q_len,
            ropes_ET2R=step.ropes,
            rope_index=layer.rope,
            **self._head_norms(),
        )
        return self.o(out_TNH.reshape(len(x_TD), -1), step.inputs.num_tokens, residual=residual), cache_PBCH

    def _head_norms(self):
        if self.q_norm is None or self.k_norm is None:
            return {}
        return {
            "q_norm_H": self.q_norm.scale[...],
            "k_norm_H": self.k_norm.scale[...],
            "norm_eps": self.q_norm.eps,
            "norm_offset": float(self.q_norm.unit_offset),
        }
