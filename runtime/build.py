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

from runtime import banner, chips, logs, wishes
from runtime.arguments import Flag
from runtime.errors import ConfigError, DoesNotFit, RuntimeServerError
from runtime.flags import FLAGS

TARGET = Flag("target", "text", "devices to compile for, as v6e-8 or h100-4 (those that are here).", to="build.target")
SHOWN = {"tensor-parallel-size", "data-parallel-size", "enable-expert-parallel", "quantization", "kv-cache-dtype"}
SHOWN |= {"dtype", "max-model-len", "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization", "cache-dir"}
WEIGHTS = ("*.safetensors", "*.gguf")


def main(words: Sequence[str] | None = None, *, keeps: bool = True) -> int:
    """Compiles, prints the plan and, where it keeps, writes the programs; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    name = "build" if keeps else "plan"
    if {"-h", "--help"} & set(words):
        print(help_text(name))
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


def help_text(name: str) -> str:
    """Usage, targets and examples."""
    alone, slices = chips.targets()
    return "\n".join(
        [
            f"usage: python -m runtime.{name} [--target TARGET] [MODEL_OR_CONFIG] [options of runtime.serve]",
            "",
            (__doc__ or "").split("\n\n", 1)[1],
            "Without MODEL_OR_CONFIG it is the demo model. Without --tensor-parallel-size layers are split over as",
            "many devices of the target as divide the model.",
            "",
            f"Targets of one host: {', '.join(alone)};",
            f"of several: {', '.join(slices)}.",
            "",
            "Examples:",
            f"  python -m runtime.{name} --target v6e-8 path/to/Llama-3-70B/config.json",
            f"  python -m runtime.{name} --target h100-1 path/to/Llama-3-8B --quantization int8 --max-model-len 8K",
            "",
            "Options that change what is compiled, of those of runtime.serve, whose --help has them all:",
            *(f"  --{flag.name:30} {flag.help}" for flag in FLAGS if flag.name in SHOWN),
        ]
    )


def run(sections: dict[str, dict[str, Any]], keeps: bool, progress: banner.Starting) -> None:
    """All that follows the reading of the command line.

    Raises:
        ConfigError, ConversionError: with the cause and the remedy.
    """
    target = sections["build"].get("target")
    if target:
        # Its devices are not here, and those that are here are left to whoever uses them.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compilers warn of what only their authors can change
    from converters.checkpoint import open_checkpoint
    from pallas_kernels import cpu
    from runtime import executables, machine
    from runtime.alternatives import idle, size_for, what_fits
    from runtime.config import EngineConfig
    from runtime.loading import cache_folder
    from runtime.preparation import prepare
    from runtime.report import Report

    place = machine.absent(target) if target else machine.here()
    _check_hosts(sections["hosts"].get("nnodes"), place)
    config = EngineConfig(model=str(_config_of(sections, progress)), **sections["engine"])
    cache_dir = cache_folder(config) if keeps else None
    if keeps and cache_dir is None:
        raise ConfigError("--cache-dir is empty, so that nothing would be kept; name a folder, or use runtime.plan")
    if keeps and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise ConfigError("JAX_COMPILATION_CACHE_DIR is set, so that serve would not look here; unset it for both")
    checkpoint = open_checkpoint(config.model, overrides=config.hf_overrides, needs_weights=False)
    if target and "tensor_parallel_size" not in sections["engine"]:
        config = dataclasses.replace(config, tensor_parallel_size=size_for(config, checkpoint, place))
        for line in idle(config, checkpoint, place):
            progress.says(line)
    try:
        prepared, *others = (prepare(config, checkpoint, place, i) for i in range(config.data_parallel_size))
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}{what_fits(config, checkpoint, place)}") from None
    if place.platform == "cpu" and cpu.is_available():
        cpu.register()  # once, before threads trace steps that call its kernels

    def build(one):
        steps = cache_dir and cache_dir / "steps"
        return executables.build(one.programs, one.facts, place, one.layout.devices, steps, progress)

    print(Report(prepared).settled(), flush=True)
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
