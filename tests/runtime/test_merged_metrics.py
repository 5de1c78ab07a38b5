"""Metrics of several engines are one exposition, a series each; the log's line is about all of them."""

import types

from prometheus_client.parser import text_string_to_metric_families

from runtime.merged_metrics import MergedMetrics, merged
from runtime.metrics import EngineMetrics, Exposition
from runtime.statistics import Statistics

PLAN = types.SimpleNamespace(
    max_model_len=128, page_size=16, num_pages=64, kv_dtype="bfloat16", enable_prefix_caching=True
)


def two_engines():
    parts = [EngineMetrics(PLAN, replica=replica) for replica in range(2)]
    for part, used, running in zip(parts, (0.25, 0.75), (3, 5), strict=True):
        pool = types.SimpleNamespace(used_share=used, num_available=8, num_cached=2)
        scheduler = types.SimpleNamespace(num_running=running, num_waiting=1, pool=pool)
        part._engine = types.SimpleNamespace(scheduler=scheduler, num_compiles=9, num_recompiles=7)
        part.counters["vllm:generation_tokens"] += 10 * running
        part.histograms["runtime:step_seconds"].observe(0.01, running)
    return parts


def test_one_engine_is_shown_as_it_is():
    (only,) = parts = [EngineMetrics(PLAN)]
    assert merged(parts) is only


def test_each_engine_has_its_series():
    metrics = merged(two_engines())
    metrics.model_name = "m"
    text = Exposition.of(metrics).text().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE vllm:generation_tokens_total ") == 1
    samples = {sample.labels["engine"]: sample for sample in families["vllm:generation_tokens"].samples}
    assert {engine: sample.value for engine, sample in samples.items()} == {"0": 30, "1": 50}
    assert all(sample.labels["model_name"] == "m" for sample in samples.values())
    steps = [s for s in families["runtime:step_seconds"].samples if s.name.endswith("_count")]
    assert {s.labels["engine"]: s.value for s in steps} == {"0": 3, "1": 5}
    usage = {s.labels["engine"]: s.value for s in families["vllm:kv_cache_usage_perc"].samples}
    assert usage == {"0": 0.25, "1": 0.75}
    assert [s.value for s in families["runtime:recompiles"].samples] == [7]  # of the process: not twice


def test_the_logs_line_is_about_all():
    metrics = merged(two_engines())
    assert isinstance(metrics, MergedMetrics)
    statistics = Statistics(metrics)
    for part in metrics.parts:
        part.counters["vllm:generation_tokens"] += 20
    line = statistics.line(10.0)
    assert "4.0 generated tokens a second; 8 requests run, 2 wait; 50.0% of pages in use" in line
