"""From a model's config and a machine to the plan and every program that will run: all that needs no weights.

Serving, planning and building ahead of time prepare in this one way, so that a program built for a machine elsewhere
is the one that the machine would have compiled.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.checkpoint import Checkpoint
from models.interface import abstract, bind, logical_axes
from pallas_kernels import cpu, grouped_matmul
from pallas_kernels.ragged_paged_attention import cache_shape, planning
from runtime import formats, mesh, step_state
from runtime.batch import StepLayout
from runtime.buckets import buckets_for
from runtime.config import EngineConfig, EnginePlan, Memory, is_stacked, itemsize, kv_dtype_for, page_size_for, settle
from runtime.errors import ConfigError
from runtime.executables import Program
from runtime.machine import Machine
from runtime.sampling import empty_row
from runtime.step import make_step


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known of an engine before any weight is read.

    Attributes:
        shapes: {name: shape and dtype} of every weight, whole.
        in_panels: names of the weights that the programs expect in panels.
        caches: of each array of pages, whole.
        programs: {key: Program} of all that will ever run: a Bucket's step, "load_history", "load_tables", "new_state".
        facts: {name: text} of what the programs depend on, beside the compiler and the devices.
    """

    machine: Machine
    checkpoint: Checkpoint
    plan: EnginePlan
    layout: "Layout"
    shapes: dict[str, jax.ShapeDtypeStruct]
    in_panels: frozenset[str]
    caches: list[jax.ShapeDtypeStruct]
    programs: dict[Any, Program]
    facts: dict[str, str]


def prepare(config: EngineConfig, checkpoint: Checkpoint, machine: Machine, replica: int = 0) -> Prepared:
    """Settles the plan and lists the programs of one replica; the plan is the same for all.

    Raises:
        ConfigError: the wishes contradict each other, or the model does not fit; the message has the numbers.
    """
    platform = machine.platform
    dtype = resolve_dtype(config.dtype, checkpoint.dtype, platform)
    stacked, method = is_stacked(config, platform), config.quantization
    if config.enable_expert_parallel:
        checkpoint = dataclasses.replace(checkpoint, config=mesh.with_whole_experts(checkpoint.config))
    sizes = config.tensor_parallel_size, config.data_parallel_size
    devices = mesh.replica_devices(checkpoint.config, machine, *sizes, method)[replica]
    layout = Layout.of(checkpoint, stacked, method, devices)
    graph, shapes = abstract(
        checkpoint.model_class,
        layout.config,
        jnp.dtype(dtype),
        stacked,
        quantization=method,
        # XLA multiplies tokens of float16, and would turn panels back in every step.
        in_panels=platform == "cpu" and not stacked and sizes == (1, 1) and jnp.dtype(dtype) != jnp.float16,
    )
    kv_dtype, page_size = kv_dtype_for(config, dtype), page_size_for(config, platform)
    specs = bind(graph, shapes).cache_specs()
    a_page = [_pages(s, 1, page_size, config.tensor_parallel_size, platform, kv_dtype) for s in specs]
    memory = machine.memory
    if platform == "cpu":  # one memory for all replicas
        memory = Memory(memory.total // config.data_parallel_size, memory.free // config.data_parallel_size)
    plan = settle(
        config,
        platform=platform,
        memory=memory,
        vocab_size=checkpoint.config.vocab_size,
        model_max_len=checkpoint.config.max_length,
        weight_bytes=layout.num_bytes(shapes),
        token_bytes=sum(int(np.prod(shape)) for shape in a_page) * itemsize(kv_dtype) // page_size,
        dtype=dtype,
    )
    plan = _with_vocabulary(plan, layout)
    plan = _with_attention(plan, machine, layout.config.num_heads, specs)
    plan = _with_experts(plan, machine, layout.config, bool(graph.in_panels))
    caches = cache_shapes(specs, plan)
    programs = programs_for(graph, shapes, plan, caches, layout)
    # The model's own config: what a mesh makes of it follows, and a start looks for what is kept of the same model.
    facts = {"model": f"{checkpoint.model_class.__qualname__} {checkpoint.config}"} | plan.compiled_fields
    facts["in panels"] = ",".join(sorted(graph.in_panels))
    if platform == "cpu" and cpu.is_available():
        facts["products"] = cpu.products()
    return Prepared(machine, checkpoint, plan, layout, shapes, graph.in_panels, caches, programs, facts)


def _with_vocabulary(plan: EnginePlan, layout: "Layout") -> EnginePlan:
    """The plan, with a word on a vocabulary that each of several devices has to hold and to score whole."""
    if layout.tensor is None or "vocab" in layout.tensor.split.names:
        return plan
    why = f"{layout.tensor.size} does not divide it, so that each device holds and scores all of it"
    return dataclasses.replace(plan, reasons=(*plan.reasons, ("vocabulary", f"{plan.vocab_size:,}", why)))


def _with_attention(plan: EnginePlan, machine: Machine, num_heads: int, specs) -> EnginePlan:
    """The plan, with what attends among its reasons.

    Raises:
        ConfigError: nothing that is fit for use attends to this model here, with these numbers.
    """
    devices, kind = plan.tensor_parallel_size, machine.devices[0].device_kind
    for spec in dict.fromkeys((s.num_kv_heads, s.head_dim) for s in specs):
        reason, attends = planning.check(
            plan.platform,
            kind,
            num_heads=num_heads // devices,
            num_kv_heads=spec[0] // devices,
            head_dim=spec[1],
            page_size=plan.page_size,
            dtype=plan.dtype,
            cache_dtype=plan.kv_dtype,
            num_rows=plan.max_num_seqs,
            num_columns=plan.page_columns,
        )
        if reason:
            raise ConfigError(f"attention on {kind}: {reason}")
    return dataclasses.replace(plan, reasons=(*plan.reasons, ("attention", plan.platform, attends)))


def _with_experts(plan: EnginePlan, machine: Machine, config: Any, in_panels: bool) -> EnginePlan:
    """The plan, with where a model's experts are among its reasons, and what multiplies by them.

    Raises:
        ConfigError: a device's part of an expert is none that its kernel takes.
    """
    if (mixture := mesh.mixture_of(config)) is None:
        return plan
    devices, kind = plan.tensor_parallel_size, machine.devices[0].device_kind
    ffn_size = mixture.ffn_size // (1 if mixture.whole else devices)
    unit, kernel = grouped_matmul.check(
        plan.platform, kind, config.hidden_size, ffn_size, plan.dtype, plan.quantization, in_panels
    )
    if unit is not None and devices > 1:
        sizes = [n for n in mesh.fitting_sizes(config, plan.quantization) if mixture.ffn_size // n % unit == 0]
        smaller = f", or tensor_parallel_size {max(sizes)}" if sizes else ""
        raise ConfigError(
            f"tensor_parallel_size {devices} gives each device {ffn_size} of an expert's {mixture.ffn_size} "
            f"feed-forward units, and {kernel} takes whole {unit}s of them; use enable_expert_parallel{smaller}"
        )
    where = f"{mixture.num_experts // devices} whole ones a device" if mixture.whole else "a part of each a device"
    why = f"{mixture.per_token} a token" + (f"; {where}" if devices > 1 else "") + f"; multiplied by {kernel}"
    return dataclasses.replace(plan, reasons=(*plan.reasons, ("experts", f"{mixture.num_experts}", why)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the weights of one replica are.

    Attributes:
        config: the model's, as the devices want it.
        devices: in the order of the mesh.
        tensor: how it is split over them; None for one.
        specs: {name: what of each weight a device holds}; empty for one.
    """

    config: Any
    devices: list[Any]
    tensor: mesh.Tensor | None
    specs: dict[str, jax.sharding.PartitionSpec]

    @classmethod
    def of(cls, checkpoint: Checkpoint, stacked: bool, quantization: str | None, devices: list[Any]) -> "Layout":
        if len(devices) == 1:
            return cls(checkpoint.config, devices, None, {})
        config = mesh.fit(checkpoint.config, len(devices), quantization)
        tensor = mesh.Tensor.over(devices, config.vocab_size)
        axes = logical_axes(checkpoint.model_class, config, stacked, quantization=quantization)
        return cls(config, devices, tensor, tensor.weight_specs(axes))

    @classmethod
    def together(cls, layouts: list["Layout"]) -> "Layout":
        """Where weights are placed for all replicas at once; each then has its own() of them."""
        first = layouts[0]
        if len(layouts) == 1:
            return first
        tensor = mesh.Tensor.over([layout.devices for layout in layouts], first.config.vocab_size)
        return dataclasses.replace(first, devices=list(tensor.mesh.devices.flat), tensor=tensor)

    @property
    def whole(self) -> jax.sharding.Sharding:
        """Everything on every device."""
        return self.tensor.whole if self.tensor else jax.sharding.SingleDeviceSharding(self.devices[0])

    def shardings(self, names) -> dict[str, Any]:
        """{name: sharding} of weights."""
        if self.tensor is None:
            return dict.fromkeys(names, self.whole)
        whole = jax.sharding.PartitionSpec()
        return self.tensor.shardings({name: self.specs.get(name, whole) for name in names})

    def own(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Of weights on the devices of all replicas, this one's; without a copy."""
        wheres = self.shardings(weights)
        return {name: mesh.part_of_replica(array, wheres[name]) for name, array in weights.items()}

    def state_shardings(self, state, num_caches: int):
        """The sharding of each array of a StepState."""
        if self.tensor is None:
            return jax.tree.map(lambda _: self.whole, state)
        return self.tensor.shardings(jax.tree.broadcast(self.tensor.state_specs(num_caches), state))

    def num_bytes(self, shapes) -> int:
        """Bytes of these weights on all devices together."""
        copies = lambda name: self.tensor.size if self.tensor and mesh.AXIS not in self.specs[name] else 1
        return sum(int(copies(name) * np.prod(s.shape) * element_bytes(s.dtype)) for name, s in shapes.items())


def element_bytes(dtype: Any) -> float:
    """Bytes of an element on a device, where two of int4 share one."""
    return 0.5 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize


def resolve_dtype(wish: str, stored: str, platform: str) -> str:
    """ "auto" keeps bfloat16, and halves float32 to it; float16 stays only where it is fast."""
    if wish != "auto":
        return wish
    return "float16" if stored == "float16" and platform == "gpu" else "bfloat16"


def mask_words(plan: EnginePlan) -> int:
    """32-bit words of a vocabulary mask."""
    return -(-plan.vocab_size // 32)


def cache_shapes(specs, plan: EnginePlan) -> list[jax.ShapeDtypeStruct]:
    """One array a layer, or one of all layers' pages when layers are stacked."""
    sizes = (plan.num_pages, plan.page_size, plan.tensor_parallel_size, plan.platform, plan.kv_dtype)
    shapes = [_pages(spec, *sizes) for spec in specs]
    if plan.stacked:
        shapes = [(len(shapes) * shapes[0][0], *shapes[0][1:])]
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(plan.kv_dtype)) for shape in shapes]


def _pages(spec, num_pages, page_size, num_devices, platform, kv_dtype):
    """The shape of one layer's pages; each device pads its own part of it."""
    pages, tokens, vectors, width = cache_shape(
        num_pages, page_size, spec.num_kv_heads // num_devices, spec.head_dim, platform, kv_dtype
    )
    return pages, tokens, num_devices * vectors, width


def programs_for(graph, shapes: Mapping, plan: EnginePlan, caches, layout: Layout) -> dict[Any, Program]:
    """{key: Program} of all that will ever run."""
    as_shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    usual = as_shape(empty_row(plan.vocab_size, ()))  # as values they differ by the tokenizer
    state = jax.eval_shape(functools.partial(step_state.empty_state, plan), usual, caches)
    of_state = layout.state_shardings(state, len(caches))
    state = _placed(state, of_state)
    weights = _placed(dict(shapes), layout.shardings(shapes))
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tensor = layout.tensor
    programs: dict[Any, Program] = {}
    buckets = buckets_for(plan)
    largest = max((bucket for bucket in buckets if bucket.is_decode), key=lambda bucket: bucket.num_rows)
    wishes = formats.left_open(plan.platform, weights)
    for bucket in buckets:
        step = make_step(graph, bucket, plan)
        step = tensor.spread(step, layout.specs, len(caches)) if tensor else step
        jit = functools.partial(jax.jit, step, donate_argnums=1)
        left_open = jit(in_shardings=(wishes, of_state, None, None)) if wishes else None
        mask = jax.ShapeDtypeStruct((bucket.num_rows, mask_words(plan)), jnp.uint32)
        args = weights, state, int32((StepLayout.of(bucket, plan).size,)), mask
        programs[bucket] = Program(jit(), args, left_open, chooses=bool(wishes) and bucket == largest)
    history = jax.jit(step_state.load_history, donate_argnums=0, out_shardings=of_state)
    programs["load_history"] = Program(history, (state, int32(()), int32((plan.max_model_len,))))
    tables = jax.jit(step_state.load_tables, donate_argnums=0, out_shardings=of_state)
    programs["load_tables"] = Program(tables, (state, int32(()), usual))
    untouched = cpu.blank if plan.platform == "cpu" and cpu.is_available() and not tensor else jnp.zeros

    def new_state(usual):
        return step_state.empty_state(plan, usual, [untouched(c.shape, c.dtype) for c in caches])

    programs["new_state"] = Program(jax.jit(new_state, out_shardings=of_state), (usual,))
    return programs


def _placed(shapes, shardings):
    """Shapes that say where their arrays are."""
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
