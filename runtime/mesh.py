"""One model on several devices: what each of them holds, and a step that runs on all at once.

Tensor parallelism: a table says which logical axes of the weights are split over the mesh axis "model". The key/value
cache is split by kv heads; all else that lives across steps, and the packed vector, every device has whole. The step
is one `shard_map` (see models.parallel): two sums over the devices a layer, one for the token table, and the scores of
the vocabulary change hands once, so that each device samples its share of the rows.

Where a model has fewer kv heads than there are devices, each head is kept by several, and computed by each for its
own queries.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.parallel import Split, split_over
from runtime.errors import ConfigError
from runtime.step_state import StepState

AXIS = "model"
SPLIT = ("vocab", "heads", "kv_heads", "ffn")  # logical axes of weights that are split; all others are whole


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Tensor parallelism over one mesh.

    Attributes:
        mesh: its only axis is AXIS.
        split: which logical axes are split.
    """

    mesh: Mesh
    split: Split

    @classmethod
    def over(cls, devices, vocab_size: int) -> "Tensor":
        """Args: devices: real ones, or those of a topology that is not here."""
        names = {name for name in SPLIT if name != "vocab" or vocab_size % len(devices) == 0}
        return cls(Mesh(np.array(devices), (AXIS,)), Split(AXIS, len(devices), frozenset(names)))

    @property
    def size(self) -> int:
        return self.split.size

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def weight_specs(self, axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, PartitionSpec]:
        """{name: spec} of weights, from their logical axes."""
        return {
            path: PartitionSpec(*(AXIS if name in self.split.names else None for name in names))
            for path, names in axes.items()
        }

    def shardings(self, specs: Any) -> Any:
        """Specs, in any tree, as shardings of this mesh."""
        is_spec = lambda x: isinstance(x, PartitionSpec)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=is_spec)

    def state_specs(self, num_caches: int) -> StepState:
        """What is split of the state: the pages, by kv heads."""
        whole = PartitionSpec()
        pages: Any = [PartitionSpec(None, None, AXIS)] * num_caches
        return StepState(pages, whole, whole, whole, whole)  # type: ignore[arg-type]

    def spread(self, step: Callable, weight_specs: Mapping[str, PartitionSpec], num_caches: int) -> Callable:
        """A step of one device's parts as a step of the whole: same arguments, same results."""

        def on_each(weights, state, packed, mask_SW):
            with split_over(self.split):
                return step(weights, state, packed, mask_SW)

        whole, state = PartitionSpec(), self.state_specs(num_caches)
        return jax.shard_map(
            on_each,
            mesh=self.mesh,
            in_specs=(dict(weight_specs), state, whole, whole),
            out_specs=(state, whole),
            check_vma=False,  # every device computes the whole of what is not split, the same
        )


def fit(config: Any, tensor_parallel_size: int) -> Any:
    """The model's config on so many devices: with as many kv heads as devices where it has fewer.

    Raises:
        ConfigError: a dimension cannot be divided; the message names the sizes that can.
    """
    size = tensor_parallel_size
    reasons = _misfits(config, size)
    if reasons:
        fitting = [n for n in range(1, config.num_heads + 1) if not _misfits(config, n)]
        near = min(fitting, key=lambda n: (abs(n - size), n))
        raise ConfigError(
            f"tensor_parallel_size {size} does not divide {' and '.join(reasons)}; {near} does"
            f" (of {', '.join(map(str, fitting))})"
        )
    return dataclasses.replace(config, num_kv_heads=size) if size > config.num_kv_heads else config


def _misfits(config, size):
    kv_heads = config.num_kv_heads
    dimensions = {
        f"{config.num_heads} query heads": config.num_heads % size == 0,
        f"{kv_heads} kv heads": kv_heads % size == 0 or size % kv_heads == 0,
        f"{config.ffn_size} feed-forward units": config.ffn_size % size == 0,
    }
    return [name for name, fits in dimensions.items() if not fits]


def devices_for(tensor_parallel_size: int) -> list[Any]:
    """The first so many devices of this process.

    Raises:
        ConfigError: there are fewer.
    """
    devices = jax.local_devices()
    if len(devices) < tensor_parallel_size:
        kinds = f"{len(devices)} {devices[0].device_kind} device{'s' * (len(devices) > 1)}"
        hint = (
            "; a CPU counts as one, or as XLA_FLAGS=--xla_force_host_platform_device_count=N says"
            if devices[0].platform == "cpu"
            else ""
        )
        raise ConfigError(
            f"tensor_parallel_size {tensor_parallel_size} needs as many devices, and here are {kinds}; lower it{hint}"
        )
    return devices[:tensor_parallel_size]


def repeat_kv_heads(weights: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Gives each kv head of the fused projections `[..., K, G + 2, H, ...]` to several devices, each its own queries.

    Args:
        weights: as the checkpoint has them.
        shapes: as the mesh wants them; where they are the same, a weight is left as it is.
    """

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def repeated(weight, axis, copies):
        heads = jnp.moveaxis(weight, (axis, axis + 1), (0, 1))
        K, X, *rest = heads.shape
        queries = heads[:, :-2].reshape(K * copies, (X - 2) // copies, *rest)
        both = jnp.concatenate([queries, jnp.repeat(heads[:, -2:], copies, axis=0)], axis=1)
        return jnp.moveaxis(both, (0, 1), (axis, axis + 1))

    def one(weight, wanted):
        if weight.shape == wanted:
            return weight
        axis = next(i for i, (a, b) in enumerate(zip(weight.shape, wanted, strict=True)) if a != b)
        return repeated(weight, axis, wanted[axis] // weight.shape[axis])

    return {path: one(weight, shapes[path].shape) for path, weight in weights.items()}
