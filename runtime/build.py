"""`python -m runtime.build [--target v6e-8] MODEL`: compiles every step ahead of time, and keeps it for `serve`.

MODEL is whatever `serve` takes, or a config.json alone: no weight is read. The flags are those of `serve`, and the
programs are those that `serve` with the same flags would compile on the target. Without a target it compiles for the
devices that are here. `python -m runtime.plan` prints the same and keeps nothing.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import banner, logs, wishes
from runtime.arguments import Flag
from runtime.errors import ConfigError, DoesNotFit, RuntimeServerError

TARGET = Flag("target", "text", "devices to compile for, as v6e-8 or h100-4 (those that are here).", to="build.target")
WEIGHTS = ("*.safetensors", "*.gguf")


def main(words: Sequence[str] | None = None, *, keeps: bool = True) -> int:
    """Compiles, prints the plan and, where it keeps, writes the programs; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    name = "build" if keeps else "plan"
    if {"-h", "--help"} & set(words):
        print(f"usage: python -m runtime.{name} [--target TARGET] MODEL_OR_CONFIG [options of runtime.serve]\n")
        print((__doc__ or "").split("\n\n", 1)[1])
        return 0
    try:
        sections, notes = wishes.read(words, os.environ, more=(TARGET,))
        logs.set_up(sections["start"].get("log_level", "INFO"))
        progress = banner.Starting()
        for line in notes:
            progress.says(line)
        run(sections, keeps, progress)
        return 0
    except (RuntimeServerError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def run(sections: dict[str, dict[str, Any]], keeps: bool, progress: banner.Starting) -> None:
    """All that follows the reading of the command line.

    Raises:
        ConfigError, ConversionError: with the cause and the remedy.
    """
    target = sections["build"].get("target")
    if target:
        # Its devices are not here, and those that are here are left to whoever uses them.
        os.environ["JAX_PLATFORMS"] = "cpu"
    from converters.checkpoint import open_checkpoint
    from pallas_kernels import cpu
    from runtime import executables, machine
    from runtime.alternatives import what_fits
    from runtime.config import EngineConfig
    from runtime.loading import cache_folder
    from runtime.preparation import prepare
    from runtime.report import Report

    place = machine.absent(target) if target else machine.here()
    _check_hosts(sections["hosts"].get("nnodes"), place)
    wishes_of_engine = dict(sections["engine"])
    if target and "tensor_parallel_size" not in wishes_of_engine:
        replicas = wishes_of_engine.get("data_parallel_size", 1)
        wishes_of_engine["tensor_parallel_size"] = max(1, len(place.devices) // max(1, replicas))
    config = EngineConfig(model=str(_config_of(sections, progress)), **wishes_of_engine)
    cache_dir = cache_folder(config) if keeps else None
    if keeps and cache_dir is None:
        raise ConfigError("--cache-dir is empty, so that nothing would be kept; name a folder, or use runtime.plan")
    if keeps and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise ConfigError("JAX_COMPILATION_CACHE_DIR is set, so that serve would not look here; unset it for both")
    checkpoint = open_checkpoint(config.model, overrides=config.hf_overrides, needs_weights=False)
    try:
        prepared, *others = (prepare(config, checkpoint, place, i) for i in range(config.data_parallel_size))
    except DoesNotFit as error:
        raise ConfigError(f"{error}{what_fits(config, checkpoint, target) if target else ''}") from None
    if place.platform == "cpu" and cpu.is_available():
        cpu.register()  # once, before threads trace steps that call its kernels

    def build(one):
        steps = cache_dir and cache_dir / "steps"
        return executables.build(one.programs, one.facts, place, one.layout.devices, steps, progress)

    built = build(prepared)
    report = Report.of(prepared, built)
    print(report.text())
    report.check_fits()
    if built.folder:
        size = sum(path.stat().st_size for path in built.folder.iterdir())
        print(f"\n{len(built.table)} programs, {size / 2**20:,.0f} MiB, are kept in {built.folder}")
        for other in others:  # the same for their own devices
            print(f"and those of another replica in {build(other).folder}")
        print(f"where serve finds them, with the same flags{'' if not target else _serve_flags(config, place)}")


def _check_hosts(nnodes, place) -> None:
    if nnodes not in (None, place.num_hosts):
        what = f"{place.name} is {place.num_hosts} host{'s' if place.num_hosts > 1 else ''}"
        raise ConfigError(
            f"--nnodes {nnodes}, and {what}; "
            + ("leave --nnodes out" if not place.is_here else "name the slice with --target, as v6e-16")
        )


def _serve_flags(config, place) -> str:
    size, hosts = config.tensor_parallel_size, place.num_hosts
    if hosts == 1:
        return f" and --tensor-parallel-size {size}; copy the folder there, or share --cache-dir"
    return f", --tensor-parallel-size {size} and --nnodes {hosts}; copy the folder to every host, or share --cache-dir"


def _config_of(sections, progress) -> Path:
    """The model's folder or file; of a model on the hub all but the weights is fetched."""
    model = sections["start"].get("model")
    if model and Path(model).is_file() and model.endswith(".json"):
        return Path(model)
    fetch = wishes.Fetch(**sections["fetch"])
    return dataclasses.replace(fetch, ignore_patterns=(*fetch.ignore_patterns, *WEIGHTS[:1])).model(model, progress)


if __name__ == "__main__":
    sys.exit(main())
