"""What the engine asks of a model, and how a model's shape and its weights are kept apart.

A model's weights travel as a plain dictionary {"layers.0.attn.qkv.kernel": array}. `abstract` gives the names and
shapes without using memory; `bind` puts arrays into the module while a step is traced. Layers are either a list
("layers.0.…", "layers.1.…") or stacked ("layers.…", with a first axis of L); see layers/stack.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from models.inputs import CacheSpec, StepInputs
from models.layers.embedding import Embedding
from models.layers.experts import PerExpert
from models.layers.linear import Linear
from models.layers.stack import Stack, one_layer


class Model(Protocol):
    """A decoder. Built as `Model(config, rngs=...)` from the family's frozen config."""

    def cache_specs(self) -> list[CacheSpec]:
        """What each layer keeps between steps, one entry a layer."""
        ...

    def __call__(self, inputs: StepInputs, caches: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        """Runs one step.

        Args:
            caches: one array of pages a layer; or a single array for all, layer l at page_offset l * pages, when
                the layers are stacked.

        Returns:
            hidden_TD after the last norm, and the caches with this step's tokens written.
        """
        ...

    def logits(self, hidden_SD: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """Scores the vocabulary: float32[S, V]. Pass only the rows to be sampled; rows past num_rows are padding.

        Where the vocabulary is split, each device scores its part; see models.parallel.
        """
        ...

    def finds_likeliest(self, hidden_SD: jax.Array) -> bool:
        """Whether `likeliest` takes less than `logits` and a look at them."""
        ...

    def likeliest(
        self, hidden_SD: jax.Array, num_rows: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(token_S, best_S, is_finite_S): the first of each row's highest logits, the logit, whether all are finite."""
        ...


@dataclasses.dataclass(frozen=True)
class Graph:
    """A model without its weights; hashable."""

    graphdef: nnx.GraphDef
    paths: tuple[tuple[str, tuple], ...]  # (dotted name, where nnx keeps it)
    in_panels: frozenset[str]  # names of the weights that are expected as `pallas_kernels.panels` packs them


def abstract(
    model_class, config, dtype, stacked: bool = False, *, quantization: str | None = None, in_panels: bool = False
) -> tuple[Graph, dict[str, jax.ShapeDtypeStruct]]:
    """The model as shapes: no weight is allocated.

    Args:
        dtype: what every weight is held in.
        stacked: fold each Stack's layers into `[L, ...]` weights.
        quantization: "int8" or "int4": beside the integers "x.kernel" stands "x.kernel_scale", and for int4
            "x.kernel_offset".
        in_panels: expect weights in panels where this machine multiplies them faster; for one CPU, not stacked.

    Returns:
        the graph for `bind`, and {name: shape and dtype} of every weight.
    """
    model = _shapes(model_class, config, stacked, quantization)
    packed = _put_in_panels(model, dtype) if in_panels else frozenset()
    graphdef, state = nnx.split(model)
    flat = [(path, leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
    graph = Graph(graphdef, tuple((_name(path), path) for path, _ in flat), packed)
    shapes = {_name(path): jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in flat}
    integers = [_name(path) for path, leaf in flat if leaf.dtype in (jnp.int8, jnp.int4)]
    kept = {f"{name}{suffix}" for name in integers for suffix in ("", "_scale", "_offset")}
    shapes |= {_name(path): leaf for path, leaf in flat if _name(path) in kept}
    return graph, shapes


def bind(graph: Graph, weights: Mapping[str, Any]):
    """The module holding these weights; costs milliseconds, so use it while tracing and not in each step.

    Raises:
        KeyError: a weight of the model is not in `weights`.
    """
    return nnx.merge(graph.graphdef, nnx.from_flat_state([(path, weights[name]) for name, path in graph.paths]))


def logical_axes(
    model_class, config, stacked: bool = False, *, quantization: str | None = None
) -> dict[str, tuple[str | None, ...]]:
    """The logical axis names of every weight, for a table that maps them onto a mesh; "layers" is a stack's first."""
    model = _shapes(model_class, config, stacked, quantization)
    axes = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        folded = leaf.get_value().ndim - len(leaf.axes)
        axes[_name(path)] = ("layers",) * folded + leaf.axes
    return axes


def _shapes(model_class, config, stacked, quantization):
    with one_layer():
        model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    for _, module in list(nnx.iter_modules(model)) if quantization else ():
        if isinstance(module, Linear | Embedding | PerExpert):
            module.quantise(quantization)
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Stack):
            module.fold() if stacked else module.unfold()
    return model


def _put_in_panels(model, dtype) -> frozenset[str]:
    """Makes a model of shapes expect weights in panels; gives their names. What is no integer is held in dtype."""
    names = set()
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear | Embedding | PerExpert):
            attribute = "table" if isinstance(module, Embedding) else "kernel"
            held = getattr(module, attribute).get_value().dtype
            if module.put_in_panels(held if held in (jnp.int8, jnp.int4) else dtype):
                suffixes = ("", "_scale", "_offset") if held == jnp.int4 else ("",)
                names |= {_name((*path, attribute + suffix)) for suffix in suffixes}
    return frozenset(names)


def _name(path) -> str:
    """The dotted name; a Stack's own attribute is left out, so a layer is "layers.0"."""
    return ".".join(str(part) for part in path if part != "blocks")
