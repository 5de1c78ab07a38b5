"""A model's layers in a row: one after another, or stacked and scanned. No model file knows which.

Stacked, each weight has a first axis of L and the layers share one cache array, so the program holds one layer and
compiles in a fraction of the time: the form for TPUs. On a CPU or a GPU a scan would copy every layer's weights in
each step, so there the same blocks are called one by one.

Dimension key
    T  tokens in the step     D  hidden size     L  layers     P  pages of one layer
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.platform import current_platform

# From so many tokens on, each layer's result is written on a GPU. XLA would keep the terms of several layers' sums, 16
# MiB each with 2,048 tokens of Llama-3-8B, and add them up anew wherever they are read; with few tokens that is faster.
MANY_TOKENS = 512
_makes_one = contextvars.ContextVar("makes_one", default=False)
NO_WINDOW = 2**30  # stands for None where windows travel as an array; no position comes near it


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer has that its neighbours may not; each field a Python number, or traced when layers are scanned.

    Attributes:
        page_offset: where this layer's pages start in its cache array.
        window: tokens a query looks back, itself included; None for all.
        rope: which of the model's rotary tables it uses.
    """

    page_offset: Any
    window: Any
    rope: Any


class Uncut(nnx.Param):
    """A weight that a scan over layers leaves where it lies: see InStack."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InStack:
    """What an Uncut weight holds while layers are scanned: the layers' stack, and which of them it is, int32.

    For weights of which a step reads some, as of experts. A kernel that is given one layer's would be given a copy.
    """

    stack: Any
    index: Any


@contextlib.contextmanager
def one_layer() -> Iterator[None]:
    """A Stack that is made inside has one layer, until it is folded or unfolded: tracing a hundred takes seconds."""
    token = _makes_one.set(True)
    try:
        yield
    finally:
        _makes_one.reset(token)


class Stack(nnx.Module):
    """Layers called as `block(x_TD, cache, step, layer) -> (x_TD, cache)`.

    Args:
        make_block: makes one layer.
        windows: a window for each layer; its length is the number of layers.
        ropes: the rotary table of each layer; the first for all when None.
    """

    def __init__(
        self, make_block: Callable[[], nnx.Module], windows: Sequence[int | None], ropes: Sequence[int] | None = None
    ):
        self.windows = tuple(windows)
        self.ropes = tuple(ropes or [0] * len(self.windows))
        self.is_folded = False
        self.blocks: Any = nnx.List([make_block() for _ in (self.windows[:1] if _makes_one.get() else self.windows)])

    def unfold(self):
        """Gives a Stack of shapes, made with one layer, all of them, in place."""
        self.blocks = nnx.List([nnx.clone(self.blocks[0]) for _ in self.windows])

    def fold(self):
        """Turns a Stack of shapes into its stacked form, in place."""
        block = self.blocks[0]
        for _, leaf in nnx.to_flat_state(nnx.state(block)):
            value = leaf.get_value()
            leaf.set_value(jax.ShapeDtypeStruct((len(self.windows), *value.shape), value.dtype))
        self.is_folded, self.blocks = True, block

    def __call__(self, x_TD, caches, step):
        """Runs all layers.

        Args:
            caches: a list of one cache a layer, or of the one they share.
            step: handed to each block as it is.

        Returns:
            x_TD and the caches.
        """
        if self.is_folded:
            return self._scan(x_TD, caches, step)
        caches = list(caches)
        for i, block in enumerate(self.blocks):
            x_TD, caches[i] = block(x_TD, caches[i], step, Layer(0, self.windows[i], self.ropes[i]))
            if len(x_TD) >= MANY_TOKENS and current_platform() == "gpu":
                x_TD = jax.lax.optimization_barrier(x_TD)
        return x_TD, caches

    def _scan(self, x_TD, caches, step):
        (cache,) = caches
        L = len(self.windows)
        graphdef, uncut, weights = nnx.split(self.blocks, Uncut, ...)
        offsets_L = jnp.arange(L, dtype=jnp.int32) * (cache.shape[0] // L)
        windows = _varying(self.windows, lambda window: NO_WINDOW if window is None else window)
        ropes = _varying(self.ropes, int)

        # A layer is cut out of the stack and multiplied in one go only where nothing has to be reshaped in between.
        flat = jax.tree.map(lambda w: w.reshape(L, -1, w.shape[-1]) if w.ndim > 3 else w, weights)

        def one(carry, layer):
            own = jax.tree.map(lambda cut, w: cut.reshape(w.shape[1:]), layer["weights"], weights)
            whole = jax.tree.map(lambda w: InStack(w, layer["index"]), uncut)
            block = nnx.merge(graphdef, whole, own)
            window, rope = layer.get("window", self.windows[0]), layer.get("rope", self.ropes[0])
            return block(*carry, step, Layer(layer["offset"], window, rope)), None

        layers = {"weights": flat, "offset": offsets_L, "index": jnp.arange(L, dtype=jnp.int32)}
        if windows is not None:
            layers["window"] = windows
        if ropes is not None:
            layers["rope"] = ropes
        (x_TD, cache), _ = jax.lax.scan(one, (x_TD, cache), layers)
        return x_TD, [cache]


def _varying(values, number):
    """The values as int32[L]; None when all are the same, so that the block sees a plain Python number."""
    return None if len(set(values)) == 1 else jnp.asarray([number(value) for value in values], jnp.int32)
