"""Compiling for a GPU that is not there, by JAX's CUDA plugin, on a machine without CUDA or a driver.

`compile_for` gives the executable; with `dump`, `kernels` tells what CUDA's own assembler makes of Mosaic's PTX, and
`triton_kernels` of Triton's.
"""

import dataclasses
import functools
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import time

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def prepare() -> str | None:
    """Sets what the plugin reads when it first loads. Returns why it cannot be used, or None."""
    has_plugin = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")
    if not has_plugin:
        return "JAX's CUDA plugin is not installed: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, as jax"
    if not glob.glob("/dev/nvidia[0-9]*"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The plugin takes a stack trace for each program that it dumps, and LLVM starts a process to give each its names.
    os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")
    flags, no_tuning = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"
    if no_tuning not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {no_tuning}".strip()
    return None


def compile_for(kind, function, shapes, donate=(), dump: pathlib.Path | None = None, options: dict | None = None):
    """Lowers and compiles for one GPU, with XLA's options. Returns the executable and the seconds it took."""
    options = dict(options or {})
    if dump is not None:
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
        options |= {"xla_dump_to": str(dump / "xla"), "xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": ".*"}
    import jax
    import numpy as np
    from jax.experimental import topologies

    from runtime.gpu_targets import described

    config = described(kind)
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        executable = jax.jit(function, donate_argnums=donate).lower(*args).compile(compiler_options=options)
    return executable, time.perf_counter() - start


compile_for_h100 = functools.partial(compile_for, H100)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as assembled for a GPU.

    Attributes:
        registers: of a thread; 255 is the most.
        spilled_bytes: stored and loaded because they did not fit.
        shared_bytes: of a block of threads.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int


def assembler() -> str | None:
    """CUDA's ptxas, where there is one."""
    return shutil.which("ptxas") or next(iter(sorted(glob.glob("/usr/local/cuda*/bin/ptxas"))), None)


def kernels(dump: pathlib.Path) -> list[Kernel]:
    """Assembles every kernel that was dumped."""
    found = []
    # Lowering and compiling count a process's kernels apart: names differ, orders do not.
    in_order = lambda suffix: sorted(dump.glob(f"*{suffix}"), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
    for ptx, resources in zip(in_order(".ptx"), in_order(".resources.txt"), strict=True):
        (shared,) = re.findall(r"smem_scratch_bytes=(\d+)", resources.read_text())
        found.append(_assembled(ptx, "sm_90a", int(shared)))
    return found


def triton_kernels(dump: pathlib.Path, name: str) -> list[Kernel]:
    """Assembles every Triton kernel of this name that was dumped, in the order of their names."""
    found = {}
    for ptx in (dump / "xla").glob("*.ptx"):
        text = ptx.read_text()
        for entry in re.findall(rf"\.entry ({name}\w*)\(", text):
            (passes,) = (dump / "xla").glob(f"*.{entry}.triton-to-llvm.txt")
            shared = re.findall(r"ttg\.shared = (\d+)", passes.read_text())[-1]
            (arch,) = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
            found[entry] = _assembled(ptx, arch, int(shared))
    return [found[entry] for entry in sorted(found)]


def _assembled(ptx, arch, shared_bytes) -> Kernel:
    command = [assembler(), f"-arch={arch}", "-v", str(ptx), "-o", os.devnull]
    says = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, *_ = map(int, re.findall(r"Used (\d+) registers", says))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", says)))
    return Kernel(registers, spilled, shared_bytes)
