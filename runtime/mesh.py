"""One model on several devices: what each of them holds, and a step that runs on all at once.

Tensor parallelism: a table says which logical axes of the weights are split over the mesh axis "model". The key/value
cache is split by kv heads; all else that lives across steps, and the packed vector, every device has whole. The step
is one `shard_map` (see models.parallel): two sums over the devices a layer, one for the token table, and the scores of
the vocabulary change hands once, so that each device samples its share of the rows.

Where a model has fewer kv heads than there are devices, each head is kept by several, and computed by each for its
own queries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from converters.place import sharding_of
from models.layers.linear import group_size
from models.parallel import Split, split_over
from runtime.errors import ConfigError
from runtime.machine import Machine
from runtime.step_state import StepState

AXIS = "model"
COPY = "copy"  # beside AXIS, where several devices have the same kv head
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

    def before_repeating(self, num_kv_heads: int) -> Callable[[Any], NamedSharding]:
        """Where a weight of fewer kv heads than devices is until each takes its own of it: see repeat_kv_heads."""
        devices = self.mesh.devices
        grid = devices.reshape(*devices.shape[:-1], num_kv_heads, -1)
        mesh = Mesh(grid, (*self.mesh.axis_names, COPY))
        return lambda where: NamedSharding(mesh, sharding_of(where).spec)

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


def fit(config: Any, tensor_parallel_size: int, quantization: str | None = None) -> Any:
    """The model's config on so many devices: with as many kv heads as devices where it has fewer.

    Args:
        quantization: "int4" weights are split between groups, never within one.

    Raises:
        ConfigError: a dimension cannot be divided; the message names the sizes that can.
    """
    size = tensor_parallel_size
    reasons = _misfits(config, size, quantization)
    if reasons:
        fitting = [n for n in range(1, config.num_heads + 1) if not _misfits(config, n, quantization)]
        near = min(fitting, key=lambda n: (abs(n - size), n))
        raise ConfigError(
            f"tensor_parallel_size {size} does not divide {' and '.join(reasons)}; {near} does"
            f" (of {', '.join(map(str, fitting))})"
        )
    return dataclasses.replace(config, num_kv_heads=size) if size > config.num_kv_heads else config


def _misfits(config, size, quantization):
    kv_heads = config.num_kv_heads
    dimensions = {
        f"{config.num_heads} query heads": config.num_heads % size == 0,
        f"{kv_heads} kv heads": kv_heads % size == 0 or size % kv_heads == 0,
        f"{config.ffn_size} feed-forward units": config.ffn_size % size == 0,
    }
    if quantization == "int4":
        for name, num_in in (("attended", config.num_heads * config.head_dim), ("feed-forward", config.ffn_size)):
            group = group_size(num_in)
            dimensions[f"{num_in // group} groups of {group} {name} inputs"] = num_in // group % size == 0
    return [name for name, fits in dimensions.items() if not fits]


def devices_for(tensor_parallel_size: int, machine: Machine) -> list[Any]:
    """The first so many devices of a machine.

    Raises:
        ConfigError: there are fewer.
    """
    devices = machine.devices
    if len(devices) < tensor_parallel_size:
        kinds = f"{len(devices)} {devices[0].device_kind} device{'s' * (len(devices) > 1)}"
        hint = (
            "; a CPU counts as one, or as XLA_FLAGS=--xla_force_host_platform_device_count=N says"
            if devices[0].platform == "cpu"
            else ""
        )
        where = "here" if machine.is_here else f"in {machine.name}"
        raise ConfigError(
            f"tensor_parallel_size {tensor_parallel_size} needs as many devices, and {where} are {kinds}; "
            f"lower it{hint}"
        )
    return list(devices[:tensor_parallel_size])


def repeat_kv_heads(weight: jax.Array, shape: tuple[int, ...], where: Any) -> jax.Array:
    """Gives each kv head of a fused projection `[..., K, G + 2, H, ...]` to the devices that keep it.

    No device sends anything to another: each takes, of the head that it has, the queries that are its own.

    Args:
        weight: placed as Tensor.before_repeating says; deleted.
        shape: what it becomes, `[..., K * copies, G / copies + 2, H, ...]`.
        where: the sharding or format of that.
    """
    axis = next(i for i, (a, b) in enumerate(zip(weight.shape, shape, strict=True)) if a != b)
    spread = weight.sharding
    assert isinstance(spread, NamedSharding)

    def own(part):
        size = shape[axis + 1] - 2
        first = jax.lax.axis_index(COPY) * size
        queries = jax.lax.dynamic_slice_in_dim(part, first, size, axis + 1)
        keys_and_values = jax.lax.slice_in_dim(part, part.shape[axis + 1] - 2, None, axis=axis + 1)
        return jnp.concatenate([queries, keys_and_values], axis + 1)

    out = PartitionSpec(*spread.spec[:axis], (AXIS, COPY), *spread.spec[axis + 1 :])
    take = jax.shard_map(own, mesh=spread.mesh, in_specs=spread.spec, out_specs=out, check_vma=False)
    repeated = jax.block_until_ready(jax.jit(take)(weight))
    weight.delete()
    parts = [part.data for part in repeated.addressable_shards]
    repeated = jax.make_array_from_single_device_arrays(shape, sharding_of(where), parts)
    return jax.device_put(repeated, where) if isinstance(where, Format) else repeated
