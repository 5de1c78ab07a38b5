"""One model on several devices: what each of them holds, and a step that runs on all at once.

Tensor parallelism: a table says which logical axes of the weights are split over the mesh axis "model". The key/value
cache is split by kv heads; all else that lives across steps, and the packed vector, every device has whole. The step
is one `shard_map` (see models.parallel): two sums over the devices a layer, one for the token table, and the scores of
the vocabulary change hands once, so that each device samples its share of the rows.

Where a model has fewer kv heads than there are devices, each head is kept by several, and computed by each for its
own queries.

Data parallelism: replicas of the whole, each on devices of its own, with pages and steps of its own; see
runtime.async_engine. Only while weights are read do all their devices form one mesh, with an axis DATA before AXIS, so
that each tensor is read and converted once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from converters.place import in_format, sharding_of
from models.layers.experts import Mixture
from models.layers.linear import group_size
from models.parallel import Split, split_over
from pallas_kernels.rotation import block_size
from runtime.errors import ConfigError
from runtime.machine import Machine
from runtime.step_state import StepState

AXIS = "model"
DATA = "data"
COPY = "copy"  # beside AXIS, where several devices have the same kv head
SPLIT = ("vocab", "heads", "kv_heads", "ffn", "experts")  # logical axes of weights that are split; others are whole


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Tensor parallelism over one mesh.

    Attributes:
        mesh: its last axis is AXIS; one before it is DATA, along which everything is repeated.
        split: which logical axes are split.
    """

    mesh: Mesh
    split: Split

    @classmethod
    def over(cls, devices, vocab_size: int) -> "Tensor":
        """Args: devices: `[model]` or `[data, model]`; real ones, or those of a topology that is not here."""
        grid = np.array(devices)
        size = grid.shape[-1]
        names = {name for name in SPLIT if name != "vocab" or vocab_size % size == 0}
        return cls(Mesh(grid, (DATA, AXIS)[-grid.ndim :]), Split(AXIS, size, frozenset(names)))

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
        quantization: "int4" weights are split between groups, and "int8" between rotated blocks, never within one.

    Raises:
        ConfigError: a dimension cannot be divided; the message names the sizes that can.
    """
    check_divides(config, tensor_parallel_size, quantization)
    more = tensor_parallel_size > config.num_kv_heads
    return dataclasses.replace(config, num_kv_heads=tensor_parallel_size) if more else config


def mixture_of(config: Any) -> Mixture | None:
    """The experts of a model; None when it has none."""
    return getattr(config, "mixture", None)


def with_whole_experts(config: Any) -> Any:
    """The model's config where each of several devices has whole experts.

    Raises:
        ConfigError: it has no experts.
    """
    if (mixture := mixture_of(config)) is None:
        raise ConfigError("enable_expert_parallel spreads experts, and this model has none; leave it out")
    return dataclasses.replace(config, mixture=dataclasses.replace(mixture, whole=True))


def check_divides(config: Any, size: int, quantization: str | None = None) -> None:
    """Raises: ConfigError: so many devices cannot share the model's layers; the message names the sizes that can."""
    if reasons := misfits(config, size, quantization):
        fitting = fitting_sizes(config, quantization)
        near = min(fitting, key=lambda n: (abs(n - size), n))
        raise ConfigError(
            f"tensor_parallel_size {size} does not divide {' and '.join(reasons)}; {near} does"
            f" (of {', '.join(map(str, fitting))})"
        )


def fitting_sizes(config: Any, quantization: str | None = None) -> list[int]:
    """Every tensor_parallel_size that divides the model."""
    return [size for size in range(1, config.num_heads + 1) if not misfits(config, size, quantization)]


def misfits(config: Any, size: int, quantization: str | None = None) -> list[str]:
    """Dimensions of the model that so many devices cannot share, in words."""
    kv_heads, mixture = config.num_kv_heads, mixture_of(config)
    dimensions = {
        f"{config.num_heads} query heads": config.num_heads % size == 0,
        f"{kv_heads} kv heads": kv_heads % size == 0 or size % kv_heads == 0,
    }
    if mixture is None:
        dimensions[f"{config.ffn_size} feed-forward units"] = config.ffn_size % size == 0
    elif mixture.whole:
        dimensions[f"{mixture.num_experts} experts"] = mixture.num_experts % size == 0
    else:
        dimensions[f"{mixture.ffn_size} feed-forward units of an expert"] = mixture.ffn_size % size == 0
    if quantization is not None:
        kind, size_of = ("groups", group_size) if quantization == "int4" else ("rotated blocks", block_size)
        inputs = {"attended": config.num_heads * config.head_dim}
        if mixture is None or not mixture.whole:
            inputs["feed-forward"] = config.ffn_size if mixture is None else mixture.ffn_size
        for name, num_in in inputs.items():
            part = size_of(num_in)
            dimensions[f"{num_in // part} {kind} of {part} {name} inputs"] = num_in // part % size == 0
    return [name for name, fits in dimensions.items() if not fits]


def replica_devices(
    config: Any,
    machine: Machine,
    tensor_parallel_size: int,
    data_parallel_size: int = 1,
    quantization: str | None = None,
) -> list[list[Any]]:
    """The devices of each replica: the first ones of the machine, of every host as many.

    Args:
        config, quantization: the model's; of the sizes that divide it a message advises one.

    Raises:
        ConfigError: there are fewer, or hosts cannot share them; the message has the nearest sizes that work.
    """
    tensor, data = tensor_parallel_size, data_parallel_size
    check_divides(config, tensor, quantization)
    by_host: dict[int, list[Any]] = {}
    for device in machine.devices:
        by_host.setdefault(device.process_index, []).append(device)
    hosts = [by_host[index] for index in sorted(by_host)]
    counts = list(map(len, hosts))
    if len(hosts) > 1 and data > 1:
        raise ConfigError(
            f"data_parallel_size {data} needs all devices on one host, and there are {len(hosts)}; start a server on "
            "each host, or on each group of hosts that holds the model, behind a proxy"
        )
    if len(set(counts)) > 1:
        each = ", ".join(f"{count} on host {i}" for i, count in enumerate(counts))
        raise ConfigError(
            f"hosts of one model need equally many devices, and there are {each}; {min(counts)} on each would work"
        )
    there, wanted = sum(counts), tensor * data
    if wanted > there or wanted % len(hosts):
        works = lambda t, d: t * d <= there and t * d % len(hosts) == 0
        fitting = [t for t in fitting_sizes(config, quantization) if works(t, data)]
        advice = [f"tensor_parallel_size {max(fitting)}"] if fitting else []
        if data > 1 and (most := there // tensor):
            advice.append(f"data_parallel_size {most}")
        asked = f"tensor_parallel_size {tensor}" + (f" times data_parallel_size {data}" if data > 1 else "")
        places = f" on {len(hosts)} hosts, which must share them evenly" if len(hosts) > 1 else ""
        where = "here" if machine.is_here else f"in {machine.name}"
        raise ConfigError(
            f"{asked} needs {wanted} devices, and {where} are {there} of kind {hosts[0][0].device_kind}{places}; "
            f"{' or '.join(advice) or 'use a smaller mesh'} works{_cpu_hint(hosts[0][0])}"
        )
    if len(hosts) > 1:
        return [[device for host in hosts for device in host[: wanted // len(hosts)]]]
    return [hosts[0][i * tensor : (i + 1) * tensor] for i in range(data)]


def _cpu_hint(device):
    if device.platform != "cpu":
        return ""
    return " (a CPU counts as one device, or as many as XLA_FLAGS=--xla_force_host_platform_device_count=N says)"


def part_of_replica(array: jax.Array, where: Any) -> jax.Array:
    """One replica's copy of an array that lies on the devices of all of them; nothing moves.

    Args:
        where: the replica's sharding or format of it.
    """
    sharding = sharding_of(where)
    parts = [part.data for part in array.addressable_shards if part.device in sharding.device_set]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


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
    return in_format(jax.make_array_from_single_device_arrays(shape, sharding_of(where), parts), where)
