"""Every Prometheus metric, named in one place.

The engine's thread adds to plain Python numbers; text is made only when somebody asks at /metrics. Names with the
prefix `vllm:` are those that dashboards exist for; ours stand beside them under `runtime:`.
"""

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort")

TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_S = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4, 8)
PARAMS_N = (1, 2, 5, 10, 20)
HTTP_S = (0.1, 0.5, 1)
HTTP_FINE_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)


class Histogram:
    """Counts by bucket. One thread adds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `count` observations of one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations at or below it), the last bound infinite."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, itertools.accumulate(self.counts)), strict=True))


def one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to limit."""
    return [m * 10**e for e in range(len(str(limit))) for m in (1, 2, 5) if m * 10**e <= limit]


class EngineMetrics:
    """What the engine does, counted. Times are seconds on the monotonic clock.

    Args:
        plan: the engine's settled numbers; max_model_len sets the length buckets.
        wishes: the EngineConfig that the plan was settled from, where there was one.
        replica: the engine's number among replicas of one model, its label `engine`.

    Attributes:
        model_name: the label of every series; the server sets it to the first served name.
        shows_hidden: whether names are shown as well that vLLM withdrew in its version 0.11.
    """

    def __init__(self, plan: Any, wishes: Any = None, replica: int = 0):
        self.model_name, self.replica = "", replica
        self.shows_hidden = False
        self._wishes = wishes
        lengths = one_two_five(plan.max_model_len)
        self._plan = plan
        self._engine: Any = None
        self._siblings: dict[str, list[int]] = {}  # request -> choices still open, most tokens of one
        self.success: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.counters: dict[Any, int] = dict.fromkeys(COUNTERS, 0)
        self.histograms = {name: Histogram(bounds or lengths) for name, (_, bounds) in HISTOGRAMS.items()}
        self.steps: dict[str, int] = {}  # by bucket
        if (speculation := getattr(plan, "speculation", None)) and speculation.num_drafts:
            self.on_drafts(0, 0, [0] * speculation.num_drafts)

    # ---- recording, on the engine's thread --------------------------------------------------------------------------

    def on_tokens(self, gains: Any, now: float) -> None:
        """One step's tokens, as Gains; those with an error are left out."""
        between = self.histograms["vllm:inter_token_latency_seconds"]
        choices, num_new = gains.choices, len(gains.choices)
        # Nearly all had their last token at the same moment: the step before.
        for last, count in collections.Counter([choice.last_token_at for choice in choices]).items():
            if last:
                between.observe(now - last, count)
        fresh = [choice for choice in choices if not choice.last_token_at]
        for choice in choices:
            choice.last_token_at = now
        for gain in gains.others:
            choice, count = gain.choice, len(gain.token_ids)
            if gain.error is not None or not count:
                continue
            num_new += count
            if choice.last_token_at:
                between.observe((now - choice.last_token_at) / count, count)
            else:
                fresh.append(choice)
                if count > 1:
                    between.observe(0.0, count - 1)
            choice.last_token_at = now
        for choice in fresh:
            choice.first_token_at = now
            self.histograms["vllm:time_to_first_token_seconds"].observe(now - choice.arrived)
        if num_new:
            num_prompt = sum(len(choice.sequence.prompt_ids) for choice in fresh)
            self.counters["vllm:prompt_tokens"] += num_prompt
            self.counters["vllm:generation_tokens"] += num_new
            self.histograms["vllm:iteration_tokens_total"].observe(num_prompt + num_new)

    def on_finish(self, choice: Any, reason: str, now: float) -> None:
        """A choice ended, before or after its last tokens were given to on_tokens."""
        self.success[reason] += 1
        num_tokens = len(choice.sequence.output_ids)
        params, seen = choice.params, self.histograms
        scheduled = choice.scheduled_at or now
        first = choice.first_token_at or now
        seen["vllm:e2e_request_latency_seconds"].observe(now - choice.arrived)
        seen["vllm:request_queue_time_seconds"].observe(scheduled - choice.arrived)
        seen["vllm:request_inference_time_seconds"].observe(now - scheduled)
        seen["vllm:request_prefill_time_seconds"].observe(first - scheduled)
        seen["vllm:request_decode_time_seconds"].observe(now - first)
        seen["vllm:request_prompt_tokens"].observe(len(choice.sequence.prompt_ids))
        seen["vllm:request_generation_tokens"].observe(num_tokens)
        if params.max_tokens is not None:
            seen["vllm:request_params_max_tokens"].observe(params.max_tokens)
        if num_tokens > 1:
            seen["vllm:request_time_per_output_token_seconds"].observe((now - first) / (num_tokens - 1))
        siblings = self._siblings.setdefault(choice.key, [params.n, 0])
        siblings[0] -= 1
        siblings[1] = max(siblings[1], num_tokens)
        if siblings[0] <= 0:
            del self._siblings[choice.key]
            seen["vllm:request_max_num_generation_tokens"].observe(siblings[1])
            seen["vllm:request_params_n"].observe(params.n)

    def on_step(
        self, engine: Any, plan: Any, *, host_s: float, wall_s: float, num_padding: int = 0, bucket: Any = None
    ) -> None:
        """One step was dispatched, and the one before it read.

        Args:
            engine: asked for its gauges when somebody looks.
            plan: a StepPlan, perhaps empty.
            host_s: planning and dispatching; wall_s: with the wait for the step before.
            num_padding: tokens the bucket is larger than the plan.
            bucket: the compiled size that the step ran in.
        """
        self._engine = engine
        self.counters["vllm:num_preemptions"] += len(plan.preempted)
        if plan.is_empty:
            return
        self.histograms["runtime:step_host_seconds"].observe(host_s)
        self.histograms["runtime:step_seconds"].observe(wall_s)
        self.counters["runtime:step_tokens"] += plan.num_tokens
        self.counters["runtime:step_padding_tokens"] += num_padding
        if bucket is not None:
            name = str(bucket)
            self.steps[name] = self.steps.get(name, 0) + 1
        for sequence in plan.admitted:
            if not sequence.num_preemptions:
                self.counters["vllm:prefix_cache_queries"] += len(sequence.prompt_ids)
                self.counters["vllm:prefix_cache_hits"] += sequence.num_cached_tokens

    def on_drafts(self, num_drafts: int, num_draft_tokens: int, accepted_per_position: Sequence[int]) -> None:
        """One step's speculation: how many rows drafted, how many tokens, and how many held at each position."""
        counters = self.counters
        for name, count in (
            ("vllm:spec_decode_num_drafts", num_drafts),
            ("vllm:spec_decode_num_draft_tokens", num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", sum(accepted_per_position)),
        ):
            counters[name] = counters.get(name, 0) + count
        for position, count in enumerate(accepted_per_position):
            key = ("vllm:spec_decode_num_accepted_tokens_per_pos", position)
            counters[key] = counters.get(key, 0) + count

    def on_media(self, num_asked: int, num_found: int) -> None:
        """Media looked up among those already processed."""
        self.counters["vllm:mm_cache_queries"] += num_asked
        self.counters["vllm:mm_cache_hits"] += num_found

    # ---- showing, on any thread -------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        labels = {"model_name": self.model_name, "engine": str(self.replica)}
        for key, value in list(self.counters.items()):
            name, extra = (key, {}) if isinstance(key, str) else (key[0], {"position": str(key[1])})
            yield _counter(name, COUNTERS.get(name, name), [(labels | extra, value)])
        engine = self._engine
        recompiles, before = (engine.num_recompiles, engine.num_compiles) if engine else (0, 0)
        yield _counter("runtime:recompiles", "Compilations since the server was ready.", [(labels, recompiles)])
        yield _gauge("runtime:compiles_at_start", "Compilations before the server was ready.", labels, before)
        steps = [(labels | {"bucket": bucket}, count) for bucket, count in sorted(self.steps.items())]
        yield _counter("runtime:steps", "Steps by the compiled size they ran in.", steps)
        reasons = [(labels | {"finished_reason": reason}, count) for reason, count in self.success.items()]
        yield _counter("vllm:request_success", "Finished requests.", reasons)
        for name, histogram in self.histograms.items():
            yield _histogram(name, HISTOGRAMS[name][0], labels, histogram)
        # The twin of inter_token_latency_seconds, under its old name.
        old = "vllm:time_per_output_token_seconds"
        yield _histogram(old, "Old name.", labels, self.histograms["vllm:inter_token_latency_seconds"])
        for name, (text, value) in self.gauges().items():
            yield _gauge(name, text, labels, value)
        info = {name: str(value) for name, value in self._cache_config().items()} | {"engine": str(self.replica)}
        yield _gauge("vllm:cache_config_info", "The cache.", info, 1)
        if self.shows_hidden:
            yield from self._hidden(labels)

    def _cache_config(self) -> dict[str, Any]:
        """Every field of vLLM's cache config; what there is none of here says so."""
        plan, wishes = self._plan, self._wishes
        return {
            "block_size": plan.page_size,
            "cache_dtype": plan.kv_dtype,
            "calculate_kv_scales": False,
            "cpu_kvcache_space_bytes": None,
            "cpu_offload_gb": 0,
            "enable_prefix_caching": plan.enable_prefix_caching,
            "gpu_memory_utilization": wishes.gpu_memory_utilization if wishes else None,
            "is_attention_free": False,
            "kv_cache_memory_bytes": wishes.kv_cache_memory_bytes if wishes else None,
            "kv_sharing_fast_prefill": False,
            "mamba_block_size": None,
            "mamba_cache_dtype": "auto",
            "mamba_page_size_padded": None,
            "mamba_ssm_cache_dtype": "auto",
            "num_cpu_blocks": 0,
            "num_gpu_blocks": plan.num_pages,
            "num_gpu_blocks_override": wishes.num_gpu_blocks_override if wishes else None,
            "prefix_caching_hash_algo": "blake2b",
            "sliding_window": None,
            "swap_space": 0,
        }

    def _hidden(self, labels) -> Iterable[Metric]:
        usage = self.gauges()["vllm:kv_cache_usage_perc"][1]
        yield _gauge("vllm:gpu_cache_usage_perc", "Old name of vllm:kv_cache_usage_perc.", labels, usage)
        for name in ("prefix_cache_queries", "prefix_cache_hits"):
            yield _counter(f"vllm:gpu_{name}", f"Old name of vllm:{name}.", [(labels, self.counters[f"vllm:{name}"])])

    def gauges(self) -> dict[str, tuple[str, float]]:
        """{name: (help, value)} of what is so now."""
        engine = self._engine
        scheduler = engine and engine.scheduler
        pool = scheduler and scheduler.pool
        return {
            "vllm:num_requests_running": ("Requests holding a row.", scheduler.num_running if scheduler else 0),
            "vllm:num_requests_waiting": ("Requests waiting.", scheduler.num_waiting if scheduler else 0),
            "vllm:kv_cache_usage_perc": ("Pages in use; 1 is all.", pool.used_share if pool else 0),
            "runtime:pages_free": ("Pages nobody holds.", pool.num_available if pool else self._plan.num_pages),
            "runtime:pages_cached": ("Free pages the prefix cache can revive.", pool.num_cached if pool else 0),
        }


COUNTERS = {
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens found there.",
    "vllm:mm_cache_queries": "Media looked up in the media cache.",
    "vllm:mm_cache_hits": "Media found there.",
    "vllm:num_preemptions": "Times a request's pages were taken back.",
    "vllm:prompt_tokens": "Prompt tokens computed or found.",
    "vllm:generation_tokens": "Tokens generated.",
    "runtime:step_tokens": "Query tokens given to the model.",
    "runtime:step_padding_tokens": "Padding tokens computed beside them.",
}

# name -> (help, bounds); None is the 1-2-5 series up to the model's length.
HISTOGRAMS: dict[str, tuple[str, Sequence[float] | None]] = {
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", None),
    "vllm:request_generation_tokens": ("Tokens generated for a request.", None),
    "vllm:request_max_num_generation_tokens": ("Tokens of a request's longest choice.", None),
    "vllm:request_params_max_tokens": ("max_tokens of a request.", None),
    "vllm:request_params_n": ("n of a request.", PARAMS_N),
    "vllm:iteration_tokens_total": ("Prompt and new tokens of a step.", STEP_TOKENS),
    "vllm:time_to_first_token_seconds": ("Arrival to first token.", TTFT_S),
    "vllm:inter_token_latency_seconds": ("Token to token.", PER_TOKEN_S),
    "vllm:request_time_per_output_token_seconds": ("Mean token to token of a request.", PER_TOKEN_S),
    "vllm:e2e_request_latency_seconds": ("Arrival to end.", REQUEST_S),
    "vllm:request_queue_time_seconds": ("Arrival to first step.", REQUEST_S),
    "vllm:request_inference_time_seconds": ("First step to end.", REQUEST_S),
    "vllm:request_prefill_time_seconds": ("First step to first token.", REQUEST_S),
    "vllm:request_decode_time_seconds": ("First token to end.", REQUEST_S),
    "runtime:step_host_seconds": ("Planning and dispatching a step.", STEP_S),
    "runtime:step_seconds": ("A step with the wait for the one before.", STEP_S),
}


class HttpMetrics:
    """HTTP requests by handler. Handlers are route templates, a closed set."""

    def __init__(self):
        self._requests: dict[tuple[str, str, str], int] = {}
        self._sizes: dict[str, list[float]] = {}  # handler -> [requests, request bytes, response bytes]
        self._durations: dict[tuple[str, str], Histogram] = {}
        self._fine = Histogram(HTTP_FINE_S)

    def on_response(
        self, method: str, handler: str, status: int, seconds: float, num_bytes_in: int, num_bytes_out: int
    ) -> None:
        key = (method, f"{status // 100}xx", handler)
        self._requests[key] = self._requests.get(key, 0) + 1
        sizes = self._sizes.setdefault(handler, [0, 0, 0])
        for i, amount in enumerate((1, num_bytes_in, num_bytes_out)):
            sizes[i] += amount
        self._durations.setdefault((method, handler), Histogram(HTTP_S)).observe(seconds)
        self._fine.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        samples = [
            ({"method": method, "status": status, "handler": handler}, count)
            for (method, status, handler), count in sorted(self._requests.items())
        ]
        yield _counter("http_requests", "HTTP requests.", samples)
        for i, name in ((1, "http_request_size_bytes"), (2, "http_response_size_bytes")):
            family = SummaryMetricFamily(name, "Bytes of bodies.", labels=["handler"])
            for handler, sizes in sorted(self._sizes.items()):
                family.add_metric([handler], count_value=int(sizes[0]), sum_value=sizes[i])
            yield family
        yield _histogram("http_request_duration_highr_seconds", "All HTTP requests.", {}, self._fine)
        family = HistogramMetricFamily("http_request_duration_seconds", "HTTP requests.", labels=["method", "handler"])
        for (method, handler), histogram in sorted(self._durations.items()):
            family.add_metric([method, handler], histogram.buckets(), histogram.sum)
        yield family


@dataclasses.dataclass(frozen=True)
class Exposition:
    """What /metrics answers with: these collectors, the process's memory, files and garbage collections."""

    registry: CollectorRegistry

    @classmethod
    def of(cls, *collectors: Any) -> "Exposition":
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        return cls(registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _counter(name, text, samples):
    labels = list(samples[0][0]) if samples else []
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in samples:
        family.add_metric([values[label] for label in labels], count)
    return family


def _gauge(name, text, labels, value):
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value if math.isfinite(value) else 0)
    return family


def _histogram(name, text, labels, histogram):
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), histogram.buckets(), histogram.sum)
    return family
