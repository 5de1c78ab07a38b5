"""How fast a step can be at best: what must be read over the memory's bandwidth, or computed at the peak rate.

A floor, not a forecast: all overlaps, no kernel wastes a cycle, devices talk for free. Source: Williams et al. 2009,
"Roofline: an insightful visual performance model".
"""

import dataclasses
import math
from typing import Any

from runtime.chips import Chip
from runtime.mesh import mixture_of
from runtime.preparation import Prepared, element_bytes

TABLE, HEAD = "embed.table", "lm_head.kernel"  # the table is the head too in models that have no other
# What each expert has of its own, in a model that has experts; and its scales and offsets.
OF_EXPERTS = tuple(f".{layer}.kernel{of}" for layer in ("gate_up", "down") for of in ("", "_scale", "_offset"))


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds of one step.

    Attributes:
        memory_s: reading the weights and the rows' keys and values once.
        compute_s: the products with the weights.
    """

    memory_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"


def floor(prepared: Prepared, chip: Chip, *, num_tokens: int, num_rows: int, context: int) -> Floor:
    """The floor of a step on each of the engine's devices.

    Args:
        num_tokens: that pass the layers. num_rows: whose next token is sampled.
        context: tokens of each row that attention reads.
    """
    plan, layout = prepared.plan, prepared.layout
    wheres = layout.shardings(prepared.shapes)
    held = {name: math.prod(wheres[name].shard_shape(shape.shape)) for name, shape in prepared.shapes.items()}
    head = HEAD if HEAD in held else TABLE
    read = {name for name in held if not name.startswith(TABLE) or head == TABLE}  # else a few rows of the table
    is_read, is_used = shares(layout.config, num_tokens)
    share = lambda name, of_experts: of_experts if name.endswith(OF_EXPERTS) else 1.0
    weight_bytes = sum(held[n] * element_bytes(prepared.shapes[n].dtype) * share(n, is_read) for n in read)
    kv_bytes = plan.page_bytes / plan.page_size / len(layout.devices) * num_rows * context
    kernels = [name for name in held if name.endswith(".kernel") and name != head]
    products = sum(held[name] * share(name, is_used) for name in kernels)
    operations = 2 * (products * num_tokens + held[head] * num_rows)
    peak = chip.peak("int8" if plan.quantization == "int8" else plan.dtype)
    return Floor((weight_bytes + kv_bytes) / chip.bandwidth, operations / peak)


def shares(config: Any, num_tokens: int) -> tuple[float, float]:
    """The share of the experts that so many tokens read, evenly spread, and the share that one token multiplies."""
    if (mixture := mixture_of(config)) is None:
        return 1.0, 1.0
    used = mixture.per_token / mixture.num_experts
    return 1 - (1 - used) ** num_tokens, used
