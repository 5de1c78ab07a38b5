"""Where a model would fit that does not fit where it was asked to."""

import dataclasses
from collections.abc import Iterator

from converters.checkpoint import Checkpoint
from runtime import chips, machine
from runtime.config import QUANTIZATIONS, EngineConfig
from runtime.errors import ConfigError
from runtime.preparation import prepare


def what_fits(config: EngineConfig, checkpoint: Checkpoint, target: str) -> str:
    """ "; v6e-8 would hold it, or v6e-4 with --quantization int8", or "" where nothing known would.

    Args:
        target: on which `config` does not fit.
    """
    chip, _ = chips.named(target)
    kin = [other for other in chips.CHIPS.values() if other.platform == chip.platform]
    found = []
    for method in QUANTIZATIONS if config.quantization is None else ():
        if _fits(dataclasses.replace(config, quantization=method), checkpoint, target):
            found.append(f"{target} with --quantization {method}")
            break
    for candidate in sorted(kin, key=lambda other: other is not chip):
        if smallest := next((name for name in _targets(candidate) if _fits(config, checkpoint, name)), None):
            found.append(smallest)
            break
    return f"; {' or '.join(found)} would hold it" if found else "; no known target holds it"


def _targets(chip: chips.Chip) -> Iterator[str]:
    return (f"{chip.name}-{count}" for count in sorted(chip.counts | chip.slices))


def _fits(config, checkpoint, target) -> bool:
    place = machine.absent(target)
    try:
        prepare(dataclasses.replace(config, tensor_parallel_size=len(place.devices)), checkpoint, place)
    except ConfigError:
        return False
    return True
