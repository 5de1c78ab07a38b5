"""The metrics of several engines as those of one server: a series each, told apart by the label `engine`."""

from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client.core import Metric

from runtime.metrics import EngineMetrics

OF_THE_PROCESS = ("runtime:recompiles", "runtime:compiles_at_start")  # every engine counts them all
SHARES = ("vllm:kv_cache_usage_perc",)  # gauges of which the mean means something, not the sum


class MergedMetrics:
    """Has the face of EngineMetrics that a server looks at."""

    def __init__(self, parts: Sequence[EngineMetrics]):
        self.parts = parts

    @property
    def model_name(self) -> str:
        return self.parts[0].model_name

    @model_name.setter
    def model_name(self, name: str) -> None:
        for part in self.parts:
            part.model_name = name

    @property
    def shows_hidden(self) -> bool:
        return self.parts[0].shows_hidden

    @shows_hidden.setter
    def shows_hidden(self, is_wanted: bool) -> None:
        for part in self.parts:
            part.shows_hidden = is_wanted

    @property
    def counters(self) -> dict[Any, int]:
        """Sums over the engines."""
        totals: dict[Any, int] = {}
        for part in self.parts:
            for name, count in part.counters.copy().items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def gauges(self) -> dict[str, tuple[str, float]]:
        """{name: (help, value)} of all engines together."""
        each = [part.gauges() for part in self.parts]
        together = {name: (text, sum(gauges[name][1] for gauges in each)) for name, (text, _) in each[0].items()}
        return together | {name: (together[name][0], together[name][1] / len(each)) for name in SHARES}

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for part in self.parts:
            for family in part.collect():
                known = families.setdefault(family.name, family)
                if known is not family and family.name not in OF_THE_PROCESS:
                    known.samples += family.samples
        return families.values()


def merged(parts: Sequence[EngineMetrics]) -> EngineMetrics | MergedMetrics:
    """One engine's own, or those of all."""
    return parts[0] if len(parts) == 1 else MergedMetrics(parts)
