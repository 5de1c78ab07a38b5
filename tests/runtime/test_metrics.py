"""Metrics count what happened, under the names that dashboards know."""

import types

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.buckets import Bucket
from runtime.choice import Gain, Gains
from runtime.config import EngineConfig
from runtime.metrics import EngineMetrics, Exposition, Histogram, HttpMetrics, one_two_five

PLAN = types.SimpleNamespace(
    max_model_len=128, page_size=16, num_pages=64, kv_dtype="bfloat16", enable_prefix_caching=True
)


LENGTHS = (1, 2, 5, 10, 20, 50, 100)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
FIRST_S += (640, 2560)
EACH_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# What dashboards for vLLM of 2025-10-17 ask for: the type, and the bounds of a histogram.
DOCUMENTED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:mm_cache_queries": "counter",
    "vllm:mm_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:request_prompt_tokens": LENGTHS,
    "vllm:request_generation_tokens": LENGTHS,
    "vllm:request_max_num_generation_tokens": LENGTHS,
    "vllm:request_params_max_tokens": LENGTHS,
    "vllm:request_params_n": (1, 2, 5, 10, 20),
    "vllm:iteration_tokens_total": TOKENS,
    "vllm:time_to_first_token_seconds": FIRST_S,
    "vllm:inter_token_latency_seconds": EACH_S,
    "vllm:time_per_output_token_seconds": EACH_S,
    "vllm:request_time_per_output_token_seconds": EACH_S,
    "vllm:e2e_request_latency_seconds": WHOLE_S,
    "vllm:request_queue_time_seconds": WHOLE_S,
    "vllm:request_inference_time_seconds": WHOLE_S,
    "vllm:request_prefill_time_seconds": WHOLE_S,
    "vllm:request_decode_time_seconds": WHOLE_S,
    "vllm:cache_config_info": "gauge",
    "vllm:spec_decode_num_drafts": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "counter",
    "http_requests": "counter",
    "http_request_size_bytes": "summary",
    "http_response_size_bytes": "summary",
    "http_request_duration_highr_seconds": "histogram",
    "http_request_duration_seconds": (0.1, 0.5, 1),
}


class FakeChoice:
    def __init__(self, n=1, index=0, num_prompt=3):
        self.key, self.index = "r", index
        self.params = types.SimpleNamespace(n=n, max_tokens=20)
        self.sequence = types.SimpleNamespace(prompt_ids=[0] * num_prompt, output_ids=[], is_finished=False)
        self.arrived, self.scheduled_at, self.first_token_at, self.last_token_at = 1.0, 2.0, 0.0, 0.0


def gain(choice, count):
    choice.sequence.output_ids += [0] * count
    return Gains(others=[Gain(choice, [0] * count)])


def samples(metrics):
    text = Exposition.of(metrics).text().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            labels = {k: v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")}
            found[s.name, *labels.values()] = s.value
    return found


def run(metrics, num_tokens, ends_before_its_tokens=True):
    """One request of so many tokens, a token a second from 3.0 on."""
    choice = FakeChoice()
    for i in range(num_tokens):
        now = 3.0 + i
        new = gain(choice, 1)
        if i == num_tokens - 1 and ends_before_its_tokens:
            choice.sequence.is_finished = True
            metrics.on_finish(choice, "length", now)
        metrics.on_tokens(new, now)
    return choice


def test_every_documented_metric_has_its_type_and_bounds():
    engine, http = EngineMetrics(PLAN), HttpMetrics()
    engine.on_drafts(1, 1, [1])
    run(engine, 2)
    http.on_response("POST", "/v1/completions", 200, 0.2, 10, 100)
    families = {f.name: f for f in text_string_to_metric_families(Exposition.of(engine, http).text().decode())}
    assert DOCUMENTED.keys() - families.keys() == set()
    for name, expected in DOCUMENTED.items():
        family = families[name]
        if isinstance(expected, str):
            assert family.type == expected, name
            continue
        bounds = [float(s.labels["le"]) for s in family.samples if s.name == f"{name}_bucket"]
        assert family.type == "histogram" and bounds == [*expected, float("inf")], name
    for name in DOCUMENTED:
        if name.startswith("vllm:"):
            assert all(s.labels["engine"] == "0" for s in families[name].samples), name


def test_times_of_a_request_are_split_at_its_first_step_and_first_token():
    metrics = EngineMetrics(PLAN)
    run(metrics, 5)  # arrived at 1, its first step at 2, tokens at 3 to 7
    got = samples(metrics)
    spent = {"queue": 1.0, "prefill": 1.0, "decode": 4.0, "inference": 5.0}
    assert {name: got[f"vllm:request_{name}_time_seconds_sum",] for name in spent} == pytest.approx(spent)
    assert got["vllm:request_time_per_output_token_seconds_sum",] == pytest.approx(1.0)
    assert got["vllm:request_prompt_tokens_sum",] == 3 and got["vllm:request_generation_tokens_sum",] == 5
    assert got["vllm:request_params_max_tokens_sum",] == 20


def test_counts_of_whole_requests():
    metrics = EngineMetrics(PLAN)
    for _ in range(2):
        run(metrics, 5)
    got = samples(metrics)
    assert got["vllm:prompt_tokens_total",] == 6 and got["vllm:generation_tokens_total",] == 10
    assert got["vllm:inter_token_latency_seconds_count",] == 2 * (5 - 1)
    assert got["vllm:time_per_output_token_seconds_sum",] == pytest.approx(8.0)
    assert got["vllm:iteration_tokens_total_count",] == 2 * 5
    assert got["vllm:time_to_first_token_seconds_sum",] == pytest.approx(4.0)
    assert got["vllm:request_success_total", "length"] == 2 and got["vllm:request_success_total", "stop"] == 0
    assert got["vllm:e2e_request_latency_seconds_sum",] == pytest.approx(2 * 6.0)
    assert got["vllm:request_decode_time_seconds_sum",] == pytest.approx(2 * 4.0)


def test_nothing_is_kept_of_what_has_ended():
    metrics = EngineMetrics(PLAN)
    run(metrics, 3)
    choice = run(metrics, 2, ends_before_its_tokens=False)
    metrics.on_finish(choice, "abort", 9.0)
    step = types.SimpleNamespace(preempted=[], admitted=[], is_empty=True, num_tokens=0)
    metrics.on_step(None, step, host_s=0.1, wall_s=0.2)
    assert not metrics._siblings


def test_choices_that_go_on_are_counted_like_the_others():
    metrics, choices = EngineMetrics(PLAN), [FakeChoice(), FakeChoice()]
    late = FakeChoice()
    metrics.on_tokens(Gains(choices, [7, 8]), 3.0)
    metrics.on_tokens(Gains([*choices, late], [7, 8, 9]), 3.5)
    metrics.on_tokens(Gains([choices[0]], [7], [Gain(choices[1], [8]), Gain(late, [], error=ValueError())]), 4.5)
    got = samples(metrics)
    assert got["vllm:time_to_first_token_seconds_count",] == 3
    assert got["vllm:time_to_first_token_seconds_sum",] == pytest.approx(2.0 + 2.0 + 2.5)
    assert got["vllm:prompt_tokens_total",] == 9 and got["vllm:generation_tokens_total",] == 7
    assert got["vllm:inter_token_latency_seconds_count",] == 4
    assert got["vllm:inter_token_latency_seconds_sum",] == pytest.approx(0.5 + 0.5 + 1.0 + 1.0)
    assert late.last_token_at == 3.5


def test_several_tokens_at_once_share_the_time():
    metrics, choice = EngineMetrics(PLAN), FakeChoice()
    metrics.on_tokens(gain(choice, 1), 3.0)
    metrics.on_tokens(gain(choice, 4), 5.0)
    got = samples(metrics)
    assert got["vllm:inter_token_latency_seconds_count",] == 4
    assert got["vllm:inter_token_latency_seconds_sum",] == pytest.approx(2.0)
    assert got["vllm:inter_token_latency_seconds_bucket", "0.4"] == 0
    assert got["vllm:inter_token_latency_seconds_bucket", "0.5"] == 4


def test_the_longest_choice_is_counted_once_a_request():
    metrics = EngineMetrics(PLAN)
    for index, count in enumerate((2, 7)):
        choice = FakeChoice(n=2, index=index)
        metrics.on_tokens(gain(choice, count), 3.0)
        metrics.on_finish(choice, "stop", 4.0)
    got = samples(metrics)
    assert got["vllm:request_params_n_count",] == 1 and got["vllm:request_params_n_sum",] == 2
    assert got["vllm:request_max_num_generation_tokens_sum",] == 7


def test_steps_and_gauges():
    metrics = EngineMetrics(PLAN)
    pool = types.SimpleNamespace(used_share=0.25, num_available=48, num_cached=5)
    scheduler = types.SimpleNamespace(num_running=2, num_waiting=1, pool=pool)
    engine = types.SimpleNamespace(scheduler=scheduler, num_recompiles=0, num_compiles=7)
    new = types.SimpleNamespace(prompt_ids=[0] * 8, num_cached_tokens=4, num_preemptions=0)
    again = types.SimpleNamespace(prompt_ids=[0] * 8, num_cached_tokens=8, num_preemptions=1)
    step = types.SimpleNamespace(preempted=[again], admitted=[new, again], is_empty=False, num_tokens=12)
    bucket = Bucket(16, 4, False)
    metrics.on_step(engine, step, host_s=0.001, wall_s=0.01, num_padding=4, bucket=bucket)
    metrics.on_step(engine, step, host_s=0.001, wall_s=0.01, bucket=bucket)
    got = samples(metrics)
    assert got["runtime:steps_total", "mixed 16x4"] == 2 and got["runtime:compiles_at_start",] == 7
    assert got["vllm:num_requests_running",] == 2 and got["vllm:num_requests_waiting",] == 1
    assert got["vllm:kv_cache_usage_perc",] == 0.25 and got["runtime:pages_free",] == 48
    assert got["vllm:prefix_cache_queries_total",] == 16 and got["vllm:prefix_cache_hits_total",] == 8
    assert got["vllm:num_preemptions_total",] == 2 and got["runtime:step_padding_tokens_total",] == 4
    assert got["runtime:step_host_seconds_count",] == 2
    assert got["runtime:recompiles_total",] == 0


def test_the_cache_is_told_field_by_field():
    text = Exposition.of(EngineMetrics(PLAN, EngineConfig(model="", num_gpu_blocks_override=64))).text().decode()
    (family,) = [f for f in text_string_to_metric_families(text) if f.name == "vllm:cache_config_info"]
    (sample,) = family.samples
    told = {"block_size": "16", "num_gpu_blocks": "64", "cache_dtype": "bfloat16", "enable_prefix_caching": "True"}
    told |= {"gpu_memory_utilization": "0.9", "num_gpu_blocks_override": "64", "swap_space": "0", "engine": "0"}
    assert sample.value == 1 and told.items() <= sample.labels.items() and "model_name" not in sample.labels


def test_withdrawn_names_are_shown_when_asked_for():
    metrics = EngineMetrics(PLAN)
    metrics.counters["vllm:prefix_cache_hits"] = 3
    assert "vllm:gpu_" not in Exposition.of(metrics).text().decode()
    metrics.shows_hidden = True
    got = samples(metrics)
    assert got["vllm:gpu_prefix_cache_hits_total",] == 3 and got["vllm:gpu_prefix_cache_queries_total",] == 0
    assert got["vllm:gpu_cache_usage_perc",] == 0


def test_speculation_is_counted_from_zero_where_it_is_on():
    plan = types.SimpleNamespace(**vars(PLAN), speculation=types.SimpleNamespace(num_drafts=2))
    got = samples(EngineMetrics(plan))
    assert got["vllm:spec_decode_num_drafts_total",] == 0
    assert got["vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"] == 0


def test_speculation_shows_only_when_there_is_some():
    metrics = EngineMetrics(PLAN)
    assert ("vllm:spec_decode_num_drafts_total",) not in samples(metrics)
    metrics.on_drafts(2, 6, [2, 1, 0])
    metrics.on_drafts(1, 3, [1, 1, 1])
    got = samples(metrics)
    assert got["vllm:spec_decode_num_drafts_total",] == 3 and got["vllm:spec_decode_num_accepted_tokens_total",] == 6
    assert got["vllm:spec_decode_num_accepted_tokens_per_pos_total", "0"] == 3


def test_the_model_is_a_label():
    metrics = EngineMetrics(PLAN)
    metrics.model_name = 'a "model"'
    assert b'vllm:num_requests_running{engine="0",model_name="a \\"model\\""} 0.0' in Exposition.of(metrics).text()


def test_http_requests_are_grouped():
    metrics = HttpMetrics()
    metrics.on_response("POST", "/v1/completions", 200, 0.2, 10, 100)
    metrics.on_response("POST", "/v1/completions", 204, 2.0, 5, 50)
    got = samples(metrics)
    assert got["http_requests_total", "/v1/completions", "POST", "2xx"] == 2
    assert got["http_response_size_bytes_sum", "/v1/completions"] == 150
    assert got["http_request_duration_highr_seconds_count",] == 2


@pytest.mark.parametrize("value, bucket", [(0.5, 0), (1, 0), (1.5, 1), (2, 1), (3, 2)])
def test_a_bound_belongs_to_its_bucket(value, bucket):
    histogram = Histogram([1, 2])
    histogram.observe(value)
    assert histogram.counts[bucket] == 1 and histogram.count == 1


def test_length_buckets_end_at_the_models_length():
    assert one_two_five(128) == [1, 2, 5, 10, 20, 50, 100]
