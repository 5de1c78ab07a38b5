"""What a model runs on: the devices that are here, or those of a host that is only compiled for.

Devices that are not here come from JAX's topologies: libtpu compiles for a TPU on any Linux machine, JAX's CUDA plugin
for a GPU, and neither needs an accelerator or a driver.
"""

import contextlib
import dataclasses
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from runtime import chips, gpu_targets
from runtime.config import Memory, host_memory
from runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a host, or of several that share a model.

    Attributes:
        name: for messages.
        devices: all of them, of one kind, in JAX's order.
        memory: of one of them.
        is_here: whether they can run what is compiled.
        options: what the compiler must be told where it cannot ask the device.
    """

    name: str
    devices: tuple[Any, ...]
    memory: Memory
    is_here: bool = True
    options: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @property
    def compiler_options(self) -> dict[str, str]:
        """What XLA is told about every program for devices of this kind, here or not; a user's own flags come first.

        On GPUs a step becomes one CUDA graph, its loops and conditions too: a loop outside of one asks the host in each
        turn, which then cannot prepare the next step while this one runs (8B on an H100: 2 ms of each step).
        """
        if self.platform == "gpu":
            kinds = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
            return {"xla_gpu_enable_command_buffer": kinds}
        chip, flags = chips.of_kind(self.devices[0].device_kind), os.environ.get("LIBTPU_INIT_ARGS", "")
        return {name: value for name, value in chip.options.items() if f"--{name}" not in flags} if chip else {}

    @property
    def num_hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    def tracing(self, devices) -> AbstractContextManager:
        """Tracing inside picks what suits these devices, rather than those of JAX's default backend."""
        if self.is_here:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(Mesh(np.array(devices), ("model",)).abstract_mesh)


def here() -> Machine:
    """The devices of this process, and of the others that JAX was started with."""
    devices, (own, *_) = jax.devices(), jax.local_devices()
    return Machine(f"{len(devices)} x {own.device_kind}", tuple(devices), device_memory(own))


def device_memory(device) -> Memory:
    """Memory of an accelerator as its client states it, or of this host under its cgroup.

    A kind that is known counts as what the table says of it, so that a program built elsewhere has the same pages.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    limit, chip = stats.get("bytes_limit"), chips.of_kind(device.device_kind)
    if not limit:
        raise ConfigError(f"{device} does not tell its memory; set kv_cache_memory_bytes")
    total = min(limit, chip.memory_bytes) if chip else limit
    return Memory(total, total - stats.get("bytes_in_use", 0))


def absent(target: str) -> Machine:
    """The host that a target names, "v6e-8", or the hosts, "v6e-16", from a topology: it compiles, and runs nothing.

    Raises:
        ConfigError: the target is not known, or its compiler is not installed.
    """
    from jax.experimental import topologies

    chip, count = chips.named(target)
    topology, of_host = chip.topology(count)
    if chip.platform == "tpu":
        _needs("libtpu", f"'jax[tpu]=={jax.__version__}'", chip)
        # What libtpu would ask a TPU VM's metadata for, and wait for in vain.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{topology}", chips_per_host_bounds=of_host
        )
        options = {}
    else:
        names = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
        _needs(
            "jax_plugins.xla_cuda13", " ".join(["--no-deps", *(f"{name}=={jax.__version__}" for name in names)]), chip
        )
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=gpu_targets.described(chip.kind), topology=topology
        )
        options = {"xla_gpu_autotune_level": "0"}  # there is nothing to try kernels on
    devices = tuple(sorted(found.devices, key=lambda device: device.id))
    return Machine(target, devices, Memory(chip.memory_bytes, chip.memory_bytes), is_here=False, options=options)


def _needs(module: str, packages: str, chip: chips.Chip) -> None:
    parent = module.partition(".")[0]
    if not importlib.util.find_spec(parent) or not importlib.util.find_spec(module):
        raise ConfigError(f"compiling for {chip.kind} needs its compiler, no device: pip install {packages}")
