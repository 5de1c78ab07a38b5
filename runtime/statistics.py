"""What the engine did lately, in a line for the log: for who watches a terminal and has no dashboard."""

import asyncio
import logging
import time

from runtime.merged_metrics import MergedMetrics
from runtime.metrics import EngineMetrics

log = logging.getLogger(__name__)

PROMPT, GENERATED = "vllm:prompt_tokens", "vllm:generation_tokens"
LOOKED_UP, FOUND = "vllm:prefix_cache_queries", "vllm:prefix_cache_hits"


class Statistics:
    """Compares the engine's counters with those of the last look."""

    def __init__(self, metrics: EngineMetrics | MergedMetrics):
        self._metrics = metrics
        self._seen = dict(metrics.counters)

    def line(self, seconds: float) -> str | None:
        """A line on the time since the last look; None when nothing happened and nobody waits."""
        gauges = {name: value for name, (_, value) in self._metrics.gauges().items()}
        running, waiting = gauges["vllm:num_requests_running"], gauges["vllm:num_requests_waiting"]
        before, self._seen = self._seen, dict(self._metrics.counters)
        gained = {name: self._seen[name] - before[name] for name in (PROMPT, GENERATED, LOOKED_UP, FOUND)}
        if not (gained[PROMPT] or gained[GENERATED] or running or waiting):
            return None
        hits = f", {gained[FOUND] / gained[LOOKED_UP]:.0%} of prompt tokens found" if gained[LOOKED_UP] else ""
        return (
            f"{gained[PROMPT] / seconds:,.1f} prompt and {gained[GENERATED] / seconds:,.1f} generated tokens a second; "
            f"{running} requests run, {waiting} wait; {gauges['vllm:kv_cache_usage_perc']:.1%} of pages in use{hits}"
        )


async def tell(metrics: EngineMetrics | MergedMetrics, interval_s: float) -> None:
    """Logs a line every so many seconds, while there is something to tell. Runs until cancelled."""
    statistics, last = Statistics(metrics), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        now = time.monotonic()
        if (line := statistics.line(now - last)) is not None:
            log.info(line)
        last = now
