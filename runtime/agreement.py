"""What hosts that serve one model must have in common, and how they find out before they depend on it."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any, Protocol

import runtime
from converters.checkpoint import Checkpoint
from runtime.config import EngineConfig, EnginePlan, Memory
from runtime.hosts import Place
from runtime.kept_steps import source_digest

# Fields of EngineConfig that may differ: where things lie on a host's disk, and what only rank 0 looks at.
OWN = {"model", "tokenizer", "cache_dir", "generation_config", "override_generation_config", "max_queued"}


class Others(Protocol):
    """The other hosts, as loading sees them: a Leader's followers, or a Follower's rank 0.

    Raises:
        ConfigError: by each, where hosts differ or do not come.
    """

    place: Place

    def join(self, facts: Mapping[str, str]) -> None: ...

    def settle_memory(self, memory: Memory) -> Memory: ...

    def compare(self, facts: Mapping[str, str]) -> None: ...

    def agree(self, names: set[str]) -> set[str]: ...


def facts(place: Place, config: EngineConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """{what: its value}: whatever differs here makes hosts run different programs, or the same on different weights."""
    found = {
        "nnodes": str(place.count),
        "this project": runtime.__version__,
        "its source": source_digest()[:12],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        **{name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")},
        "the model's files": checkpoint.fingerprint(dated=False)[:12],
    }
    for field in dataclasses.fields(config):
        if field.name not in OWN:
            found[field.name] = str(getattr(config, field.name))
    return found


def plan_facts(plan: EnginePlan) -> dict[str, str]:
    """The same of the settled numbers."""
    return {field.name: str(getattr(plan, field.name)) for field in dataclasses.fields(plan) if field.name != "reasons"}


def differences(here: Mapping[str, str], there: Mapping[str, Any], place: str) -> str:
    """What differs between rank 0 and another host, both values named; "" when nothing does."""
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return "; ".join(f"{name} is {here.get(name)!r} on host 0 and {there.get(name)!r} on {place}" for name in names)
