"""The log says every few seconds what the engine did, and nothing while it does nothing."""

import asyncio
import types

from runtime.metrics import EngineMetrics
from runtime.statistics import Statistics, tell

PLAN = types.SimpleNamespace(
    max_model_len=128, page_size=16, num_pages=64, kv_dtype="bfloat16", enable_prefix_caching=True
)


def busy(metrics, running=2, waiting=1):
    pool = types.SimpleNamespace(used_share=0.25, num_available=48, num_cached=5)
    scheduler = types.SimpleNamespace(num_running=running, num_waiting=waiting, pool=pool)
    metrics._engine = types.SimpleNamespace(scheduler=scheduler, num_recompiles=0)


def test_a_line_has_the_rates_since_the_last():
    metrics = EngineMetrics(PLAN)
    statistics = Statistics(metrics)
    assert statistics.line(10.0) is None
    busy(metrics)
    for name, count in (("prompt_tokens", 25_000), ("generation_tokens", 55), ("prefix_cache_queries", 8)):
        metrics.counters[f"vllm:{name}"] += count
    metrics.counters["vllm:prefix_cache_hits"] += 4
    assert statistics.line(10.0) == (
        "2,500.0 prompt and 5.5 generated tokens a second; 2 requests run, 1 wait; 25.0% of pages in use, "
        "50% of prompt tokens found"
    )
    assert "0.0 prompt and 0.0 generated tokens a second; 2 requests run" in statistics.line(10.0)
    busy(metrics, 0, 0)
    assert statistics.line(10.0) is None


def test_lines_come_until_the_task_ends(caplog):
    caplog.set_level("INFO", logger="runtime.statistics")
    metrics = EngineMetrics(PLAN)

    async def run():
        task = asyncio.create_task(tell(metrics, 0.001))
        await asyncio.sleep(0)
        busy(metrics)
        async with asyncio.timeout(10):
            while len(caplog.records) < 3:
                await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(run())
    assert "2 requests run" in caplog.records[0].getMessage()
