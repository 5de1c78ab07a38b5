"""Where a model would fit that does not fit where it was asked to."""

import dataclasses
from collections.abc import Iterator

from converters.checkpoint import Checkpoint
from runtime import chips, machine, mesh
from runtime.config import QUANTIZATIONS, EngineConfig
from runtime.machine import Machine
from runtime.preparation import prepare


def what_fits(config: EngineConfig, checkpoint: Checkpoint, place: Machine) -> str:
    """What to change, to be appended to the message that says why `config` does not fit.

    Returns:
        "; v6e-8 with --quantization int8 or v6e-16 would hold it", of devices that are here "; --tensor-parallel-size 4
        …"; or that nothing known would.
    """
    methods = QUANTIZATIONS if config.quantization is None else ()
    found = [method for method in methods if _fits(dataclasses.replace(config, quantization=method), checkpoint, place)]
    choices = [f"--quantization {method}" for method in found[:1]]
    if place.is_here:
        choices += [f"--tensor-parallel-size {size}" for size in _wider(config, checkpoint, place)]
    else:
        choices = [f"{place.name} with {choice}" for choice in choices] + _targets(config, checkpoint, place, found)
    if choices:
        return f"; {' or '.join(choices)} would hold it"
    return "; nothing here holds it" if place.is_here else "; no known target holds it"


def size_for(config: EngineConfig, checkpoint: Checkpoint, place: Machine) -> int:
    """The tensor_parallel_size that uses most of a target's devices: all of them, or as many as divide the model."""
    most = max(1, len(place.devices) // config.data_parallel_size)
    sizes = mesh.fitting_sizes(_spread(config, checkpoint), config.quantization)
    return max((n for n in sizes if n <= most and n % place.num_hosts == 0), default=most)


def idle(config: EngineConfig, checkpoint: Checkpoint, place: Machine) -> list[str]:
    """Says which of a target's devices are not used, where nobody asked how many are."""
    there, size = len(place.devices), config.tensor_parallel_size
    used = size * config.data_parallel_size
    reasons = mesh.misfits(_spread(config, checkpoint), there // config.data_parallel_size, config.quantization)
    if used >= there or not reasons:
        return []
    more = there // size
    hint = f"; --data-parallel-size {more} uses {more * size}" if place.num_hosts == 1 else ""
    return [f"{used} of {there} devices are used, as more do not divide {' and '.join(reasons)}{hint}"]


def _spread(config, checkpoint):
    """The model's config as its experts are to be spread."""
    whole = config.enable_expert_parallel and mesh.mixture_of(checkpoint.config)
    return mesh.with_whole_experts(checkpoint.config) if whole else checkpoint.config


def _wider(config, checkpoint, place) -> list[int]:
    """The smallest tensor_parallel_size above the asked one that holds the model on the devices that are here."""
    if place.platform == "cpu":  # its devices share one memory
        return []
    most = len(place.devices) // config.data_parallel_size
    sizes = mesh.fitting_sizes(_spread(config, checkpoint), config.quantization)
    wider = [n for n in sizes if config.tensor_parallel_size < n <= most]
    return [n for n in wider if _fits(dataclasses.replace(config, tensor_parallel_size=n), checkpoint, place)][:1]


def _targets(config, checkpoint, place, methods) -> list[str]:
    """The smallest target that holds the model as it was asked for, of the same chip if one does.

    Args:
        methods: of rounding, that make it fit where it was asked to. Where none does, the smallest that one needs.
    """
    chip, _ = chips.named(place.name)
    kin = [other for other in chips.CHIPS.values() if other.platform == chip.platform]
    found = []
    if not methods and config.quantization is None:
        int8 = dataclasses.replace(config, quantization=QUANTIZATIONS[0])
        found += [f"{name} with --quantization {QUANTIZATIONS[0]}" for name in _smallest(int8, checkpoint, chip)]
    for candidate in sorted(kin, key=lambda other: other is not chip):
        if names := _smallest(config, checkpoint, candidate):
            return found + names
    return found


def _smallest(config, checkpoint, chip) -> list[str]:
    for name in _names(chip):
        place = machine.absent(name)
        wide = dataclasses.replace(config, tensor_parallel_size=size_for(config, checkpoint, place))
        if _fits(wide, checkpoint, place):
            return [name]
    return []


def _names(chip: chips.Chip) -> Iterator[str]:
    return (f"{chip.name}-{count}" for count in sorted(chip.counts | chip.slices))


def _fits(config, checkpoint, place) -> bool:
    try:
        prepare(dataclasses.replace(config, stacked=True), checkpoint, place)  # as large, and sooner traced
    except ValueError:  # it does not fit, or is none that can be split or rounded so
        return False
    return True
