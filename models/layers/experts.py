"""A mixture of experts: each token passes a few of many gated feed-forward layers, as a router scores them.

On several devices either each expert is split, as other layers are, or each device has whole experts of its own. All
tokens are everywhere; a device computes its part of them, and the parts are added up.

Source: Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088.

Dimension key
    T  tokens in the step     D  hidden size     F  an expert's feed-forward size
    E  experts                K  experts a token goes to     R  rows, T K
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from models import parallel
from models.layers.linear import Linear, int4_form, int8_form
from models.layers.mlp import FUSED, MLP, SEPARATE
from models.layers.stack import InStack, Uncut
from pallas_kernels import panels
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear import ACTIVATIONS
from pallas_kernels.platform import current_platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """How many experts there are and how a token is shared out.

    Attributes:
        num_experts: E.
        per_token: K.
        ffn_size: F.
        normalised: whether a token's K weights are made to add up to 1.
        whole: whether several devices have whole experts, each others, and not a part of each.
    """

    num_experts: int
    per_token: int
    ffn_size: int
    normalised: bool
    whole: bool = False


def feed_forward(c, *, bias: bool = False, rngs: nnx.Rngs):
    """What stands after a block's attention: an MLP, or experts where the model's config c has a mixture of them."""
    if c.mixture is None:
        return MLP(c.hidden_size, c.ffn_size, activation=c.activation, bias=bias, rngs=rngs)
    return Experts(c.hidden_size, c.mixture, activation=c.activation, rngs=rngs)


class PerExpert(nnx.Module):
    """A linear layer for each expert: kernel `[E, *out, in]`, for rows sorted by expert."""

    def __init__(self, num_experts: int, out: tuple[int, ...], num_in: int, *, axes: tuple, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.num_out_axes, self.in_panels = len(out), False
        self.kernel = Uncut(init(rngs.params(), (num_experts, *out, num_in), jnp.float32), axes=axes)
        self.kernel_scale, self.kernel_offset = nnx.data(None), nnx.data(None)

    def quantise(self, method: str):
        """Turns a layer of shapes into its int8 or int4 form, in place.

        Scales of int8 are few, and are cut out of their stack: only one layer's have to be laid out for a kernel.
        """
        if method == "int4":
            self.kernel_scale, self.kernel_offset = int4_form(self.kernel)
        else:
            self.kernel_scale = int8_form(self.kernel)

    def put_in_panels(self, dtype) -> bool:
        """Makes a layer of shapes expect its kernels, of this dtype, in panels where that is faster; whether it is."""
        *_, num_in = shape = self.kernel.get_value().shape
        self.in_panels = panels.suits(math.prod(shape[1:-1]), num_in, dtype)
        return self.in_panels

    def __call__(self, x_TI, group_sizes_E, *, token_R=None, out_dtype):
        """`[R, outputs]`, all axes of them in one; rows past the last group are zeros.

        Args:
            token_R: which token each row is; None where x has rows.
        """
        kernel, first = self.kernel.get_value(), None
        if isinstance(kernel, InStack):
            first = kernel.index * len(group_sizes_E)
        return grouped_matmul(
            x_TI,
            _whole(self.kernel, self.num_out_axes + 1),
            group_sizes_E,
            token_R=token_R,
            kernel_scale=_whole(self.kernel_scale, self.num_out_axes + (self.kernel_offset is not None)),
            kernel_offset=_whole(self.kernel_offset, self.num_out_axes + 1),
            first=first,
            out_dtype=out_dtype,
            in_panels=self.in_panels,
        )


def _whole(of, num_axes):
    """A parameter's value, with one axis before its last num_axes: of experts, of all layers' where it is InStack."""
    value = of.get_value() if isinstance(of, nnx.Param) else of
    value = value.stack if isinstance(value, InStack) else value
    return None if value is None else value.reshape(-1, *value.shape[value.ndim - num_axes :])


class Experts(nnx.Module):
    """The sum of a token's experts, by its router's weights; called as `models.layers.mlp.MLP` is.

    Args:
        activation: a name in models.layers.mlp.ACTIVATIONS.
    """

    def __init__(self, hidden_size: int, mixture: Mixture, *, activation: str, rngs: nnx.Rngs):
        D, E, F = hidden_size, mixture.num_experts, mixture.ffn_size
        self.mixture = mixture
        self.activation = ACTIVATIONS[FUSED[activation]] if activation in FUSED else SEPARATE[activation]
        self.split_axis = "experts" if mixture.whole else "ffn"
        experts, ffn = ("experts", None) if mixture.whole else (None, "ffn")
        self.router = Linear((E,), D, axes=(None, "hidden"), is_rounded=False, rngs=rngs)
        self.gate_up = PerExpert(E, (2, F), D, axes=(experts, None, ffn, "hidden"), rngs=rngs)
        self.down = PerExpert(E, (D,), F, axes=(experts, "hidden", ffn), rngs=rngs)

    def __call__(self, x_TD, num_tokens, *, norm, residual=None):
        """`[T, D]`: of norm(x), with the residual added to it."""
        T, K = len(x_TD), self.mixture.per_token
        normed_TD = norm(x_TD)
        weights_TK, experts_TK = self._route(normed_TD)
        experts_TK, num_own = self._own(experts_TK)
        is_real_T1 = jnp.arange(T)[:, None] < num_tokens
        experts_R = jnp.where(is_real_T1, experts_TK, self.mixture.num_experts).reshape(-1)

        order_R = jnp.argsort(experts_R)
        sizes_E = (experts_R[:, None] == jnp.arange(num_own)).sum(0, dtype=jnp.int32)
        # Where gate and up are written to memory, they are rounded as Hugging Face's are: see pallas_kernels.linear.
        written = jnp.float32 if current_platform() == "cpu" else x_TD.dtype
        both_RO = self.gate_up(normed_TD, sizes_E, token_R=order_R // K, out_dtype=written)
        gate_RF, up_RF = (half_RF.astype(jnp.float32) for half_RF in jnp.split(both_RO, 2, axis=1))
        out_RF = self.activation(gate_RF) * up_RF
        y_RD = self.down(out_RF.astype(x_TD.dtype), sizes_E, out_dtype=x_TD.dtype)

        y_TKD = y_RD[jnp.argsort(order_R)].reshape(T, K, -1)
        y_TD = jnp.einsum("TK,TKD->TD", weights_TK, y_TKD.astype(jnp.float32), precision="highest")
        if (split := parallel.splits(self.split_axis)) is not None:
            y_TD = parallel.add_up(y_TD.astype(x_TD.dtype), split).astype(jnp.float32)
        if residual is not None:
            y_TD = y_TD + residual.astype(jnp.float32)
        return y_TD.astype(x_TD.dtype)

    def _route(self, x_TD):
        """A token's K experts, and the weight of each, float32."""
        scores_TE = jax.nn.softmax(self.router(x_TD, out_dtype=jnp.float32))
        weights_TK, experts_TK = jax.lax.top_k(scores_TE, self.mixture.per_token)
        if self.mixture.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdims=True)
        return weights_TK, experts_TK

    def _own(self, experts_TK):
        """The experts, counted from this device's first one on, and how many it has."""
        num_experts = self.mixture.num_experts
        if (split := parallel.splits("experts")) is None or not self.mixture.whole:
            return experts_TK, num_experts
        num_own = num_experts // split.size
        return (experts_TK - parallel.place(split) * num_own) % num_experts, num_own
