"""Wishes become numbers: EngineConfig (what a user asked, None = decide for me) -> settle() -> EnginePlan.

The plan is printed once at start and never changed afterwards.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import ConfigError, DoesNotFit
from runtime.speculation import ON_CPU as speculation_on_cpu
from runtime.speculation import Speculation

DTYPES = ("auto", "bfloat16", "float16", "float32")
# As users know it -> the array's dtype.
KV_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
QUANTIZATIONS = ("int8", "int4")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
MIB = 2**20
STEP_BYTES = 256 * MIB  # of a device's memory that a step needs beside weights, pages and scores
SCORES = 2  # arrays of scores, float32[rows, vocabulary], that it may have at once
KV_NOTES = {
    "int8": ", with a scale for each key and value",
    "float8_e4m3fn": ", no scales",
    "float8_e5m2": ", no scales",
}
SPREAD_BYTES = 256 * MIB  # of a host's memory that cached prefixes may take while nobody needs it


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the user asks of an engine. Flags of `python -m runtime.serve` carry the same names.

    Attributes:
        model: a Hugging Face folder or a .gguf file, already on this disk.
        tokenizer: a folder or .gguf file on this disk whose tokenizer is used in place of the model's.
        dtype: "auto" takes the checkpoint's; float16 checkpoints run in bfloat16 on TPU.
        max_model_len: prompt and output together, tokens.
        max_num_seqs: rows that may run at once.
        max_num_batched_tokens: tokens in one step.
        max_decode_chunk: prompt tokens that may join a step in which other requests decode; None for as many as keep
            the gap between their tokens short, going by how long steps take. See runtime.pacing.
        max_decode_steps: steps that one dispatch may run while every request decodes and none waits; None for as many
            as take 30 ms, where dispatches are worth saving.
        speculative_config: how tokens are drafted ahead, or {"num_speculative_tokens": 0} for not at all. See
            runtime.speculation.
        block_size: tokens in a page.
        num_gpu_blocks_override: pages, when the caller knows better.
        kv_cache_memory_bytes: bytes for pages, all devices together.
        kv_cache_dtype: a name in KV_DTYPES. "int8" has a scale for each key and value; fp8 has none: what it cannot
            hold saturates.
        gpu_memory_utilization: share of an accelerator's memory the engine may take.
        cache_dir: where converted weights and compiled steps are kept; "" keeps nothing.
        seed: requests without a seed of their own get one that follows from this and their prompt. See runtime.seeds.
        hf_overrides: laid over the model's config.json, field by field.
        quantization: "int8" rounds weights when they are loaded, and tokens where they meet them; "int4" rounds the
            layers' weights alone, in groups, and the token table and the scores as int8 does. See runtime.quantise.
        tensor_parallel_size: devices that each layer is split over.
        enable_expert_parallel: of a mixture of experts each of these devices has whole experts, not a part of each.
        data_parallel_size: replicas of the model, each on so many devices; a request is served by one of them.
        stacked: scan over stacked layers; None = on TPU.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_decode_chunk: int | None = None
    max_decode_steps: int | None = None
    speculative_config: dict[str, Any] | None = None
    block_size: int | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    seed: int = 0
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    quantization: str | None = None
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hf_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_queued: int = 256
    cache_dir: str | None = None
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    data_parallel_size: int = 1
    stacked: bool | None = None

    def __post_init__(self):
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        if self.quantization not in (None, *QUANTIZATIONS):
            known = " or ".join(QUANTIZATIONS)
            raise ConfigError(f"quantization {self.quantization!r} is not known; use {known}, or leave it out")
        _one_of("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
        _one_of("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_decode_chunk",
            "max_decode_steps",
            "block_size",
            "num_gpu_blocks_override",
            "kv_cache_memory_bytes",
            "max_queued",
            "tensor_parallel_size",
            "data_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        Speculation.read(self.speculative_config, usual_max_rows=1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be in (0, 1]")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be a 64-bit integer")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs is {self.max_logprobs}; use -1 for no cap, or 0 and above")


def _one_of(name, value, choices):
    if value not in choices:
        raise ConfigError(f"{name} {value!r} is not known; choose one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """The settled numbers of one engine. Bytes are bytes, lengths are tokens.

    Attributes:
        paces_windows: whether a window has fewer than max_decode_steps steps where a step takes long.
        page_columns: columns of the page table, ceil(max_model_len / page_size).
        num_spread_pages: see runtime.pages.PagePool.
        max_logprobs: the most that a request may ask for.
        num_logprobs: static width of the top-logprobs arrays of a step; at least 1.
        reasons: (name, value, why) rows, for the table printed at start.
    """

    platform: str
    dtype: str
    kv_dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_decode_chunk: int | None
    max_decode_steps: int
    paces_windows: bool = False
    speculation: Speculation = Speculation()
    page_size: int
    num_pages: int
    page_columns: int
    num_spread_pages: int | None = None
    max_logprobs: int
    num_logprobs: int
    logprobs_mode: str
    tensor_parallel_size: int = 1
    stacked: bool
    quantization: str | None
    weight_bytes: int
    page_bytes: int
    enable_prefix_caching: bool
    scheduling_policy: str
    seed: int
    max_queued: int
    reasons: tuple[tuple[str, str, str], ...]

    @property
    def num_slots(self) -> int:
        """Slots on the device: one a running request, and a last one that padding rows write to."""
        return self.max_num_seqs + 1

    @property
    def compiled_fields(self) -> dict[str, str]:
        """{name: value, as text} of the numbers that compiled steps depend on."""
        return {f.name: str(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in OF_THE_HOST}


# Fields of EnginePlan that only the scheduler, the admission of requests and messages read.
OF_THE_HOST = {"max_decode_chunk", "paces_windows", "num_spread_pages", "max_logprobs", "weight_bytes", "page_bytes"}
OF_THE_HOST |= {"enable_prefix_caching", "scheduling_policy", "seed", "max_queued", "reasons"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a platform offers: in all, and free now."""

    total: int
    free: int


def host_memory() -> Memory:
    """Host memory, or the container's share of it where a cgroup limits it."""
    info = (
        dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        if os.path.exists("/proc/meminfo")
        else {}
    )
    kib = lambda name: int(info[name].split()[0]) * 1024
    if info:
        total, free = kib("MemTotal"), kib("MemAvailable")
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = total // 2
    for path, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),):
        try:
            limit = int(Path(path).read_text())
            current = int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        total, free = min(total, limit), min(free, limit - current)
    return Memory(total, free)


def settle(
    config: EngineConfig,
    *,
    platform: str,
    memory: Memory,
    vocab_size: int,
    model_max_len: int,
    weight_bytes: int,
    token_bytes: int,
    dtype: str,
) -> EnginePlan:
    """Turns wishes into numbers, each with its reason.

    Args:
        memory: of one device; of a CPU, what one replica may have of it.
        model_max_len: positions the checkpoint was made for.
        weight_bytes: all weights, all devices.
        token_bytes: keys and values of one token, all layers, in the cache's dtype, with their scales.

    Raises:
        ConfigError: the wishes contradict each other, or do not fit; the message has the numbers.
    """
    reasons: list[tuple[str, str, str]] = []
    on_cpu = platform == "cpu"
    num_devices = 1 if on_cpu else config.tensor_parallel_size  # devices of a CPU share its memory

    def choose(name, wish, default, why):
        reasons.append((name, f"{wish if wish is not None else default:,}", "asked" if wish is not None else why))
        return wish if wish is not None else default

    if config.tensor_parallel_size > 1:
        reasons.append(("devices", f"{config.tensor_parallel_size}", "asked: each layer is split over them"))
    if config.data_parallel_size > 1:
        why = "asked: each with its own devices, weights and pages; what follows is of one"
        reasons.append(("replicas", f"{config.data_parallel_size}", why))
    max_model_len = choose("max_model_len", config.max_model_len, model_max_len, "the checkpoint's positions")
    if max_model_len > model_max_len and not os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        raise ConfigError(
            f"max_model_len {max_model_len:,} is above the {model_max_len:,} positions of this checkpoint; "
            "lower it, or set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if you know that the model extrapolates"
        )
    page_size = choose("page_size", config.block_size, page_size_for(config, platform), platform)
    page_columns = math.ceil(max_model_len / page_size)
    usual_seqs, why = (128 if on_cpu else 256), platform
    if platform == "tpu":
        from pallas_kernels.ragged_paged_attention.tpu_plan import most_rows  # not above: it imports jax

        if (most := most_rows(page_columns)) < usual_seqs:
            usual_seqs, why = max(1, most), "rows whose page tables fit a TPU's scalar memory"
    max_num_seqs = choose("max_num_seqs", config.max_num_seqs, usual_seqs, why)
    budget = choose("max_num_batched_tokens", config.max_num_batched_tokens, 1024 if on_cpu else 2048, platform)
    if budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens {budget} is below max_num_seqs {max_num_seqs}; "
            "a step must have room for one token of every row"
        )
    wish = config.speculative_config
    usual = speculation_on_cpu if on_cpu and budget > speculation_on_cpu["num_speculative_tokens"] else None
    speculation = Speculation.read(usual if wish is None else wish, usual_max_rows=4 if on_cpu else 32)
    why = "asked" if wish is not None else "pays for a request that is alone" if usual else "not asked for"
    reasons.append(("speculation", str(speculation), why))
    drafting = min(max_num_seqs, speculation.max_rows) * (1 + speculation.num_drafts)
    if budget < drafting:
        raise ConfigError(
            f"max_num_batched_tokens {budget} is below the {drafting} tokens of {speculation.max_rows} rows with "
            f"{speculation.num_drafts} drafts each; raise it, or lower disable_by_batch_size"
        )
    shown = f"{config.max_decode_chunk:,}" if config.max_decode_chunk else "by the pace"
    why = "asked" if config.max_decode_chunk else "as timed: keeps the gap between tokens short while a prompt is read"
    reasons.append(("max_decode_chunk", shown, why))
    # Measured on two cores with 135M parameters: windows of 8 save 3% of a step's time with one row and 5% with four,
    # and whoever arrives meanwhile waits for them.
    decode_steps = choose(
        "max_decode_steps",
        config.max_decode_steps,
        1 if on_cpu else 8,
        "a dispatch costs little beside a step"
        if on_cpu
        else "one dispatch for several steps, as long as they take 30 ms together",
    )
    kv_dtype = kv_dtype_for(config, dtype)
    reasons.append(("kv cache", kv_dtype, f"{token_bytes:,} bytes a token{KV_NOTES.get(kv_dtype, '')}"))
    page_bytes = token_bytes * page_size

    limit = int(memory.total * config.gpu_memory_utilization) * num_devices
    if weight_bytes >= limit:
        raise DoesNotFit(
            f"weights take {weight_bytes / MIB:,.0f} MiB and {limit / MIB:,.0f} MiB may be used "
            f"({num_devices} x {memory.total / MIB:,.0f} MiB at {config.gpu_memory_utilization:.0%}); "
            "quantise, use more devices, or a smaller model"
        )
    if config.num_gpu_blocks_override:
        kv_bytes, why = config.num_gpu_blocks_override * page_bytes, "asked"
    elif config.kv_cache_memory_bytes:
        kv_bytes, why = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif on_cpu:
        most = max_num_seqs * page_columns * page_bytes
        kv_bytes = min(2**31, max(0, memory.free - weight_bytes) // 4, most)
        kv_bytes = max(kv_bytes, min(page_columns * page_bytes, max(0, memory.free - weight_bytes) // 2))
        why = f"2 GiB, or a quarter of free memory; taken as used, {SPREAD_BYTES // MIB} MiB by cached prefixes alone"
    else:
        step_bytes = STEP_BYTES + SCORES * 4 * max_num_seqs * vocab_size // num_devices
        kv_bytes = limit - weight_bytes - step_bytes * num_devices
        share = f"{config.gpu_memory_utilization:.0%}"
        why = f"{share} of memory less weights and {step_bytes / MIB:,.0f} MiB on each device for a step"
    if on_cpu and kv_bytes + weight_bytes > memory.free:
        raise DoesNotFit(
            f"weights ({weight_bytes / MIB:,.0f} MiB) and pages ({kv_bytes / MIB:,.0f} MiB) do not fit the "
            f"{memory.free / MIB:,.0f} MiB of memory that are free; lower kv_cache_memory_bytes or max_model_len"
        )
    num_pages = max(0, kv_bytes // page_bytes)
    if num_pages < page_columns:
        raise DoesNotFit(
            f"{num_pages} pages of {page_size} tokens fit ({kv_bytes / MIB:,.0f} MiB), and one request of "
            f"max_model_len {max_model_len:,} needs {page_columns} ({page_columns * page_bytes / MIB:,.0f} MiB); "
            f"{f'lower max_model_len to {num_pages * page_size:,} or ' if num_pages else ''}give the cache more memory"
        )
    reasons.append(
        ("num_pages", f"{num_pages:,}", f"{num_pages * page_size:,} tokens, {kv_bytes / MIB:,.0f} MiB: {why}")
    )
    stored = {"int8": f"int8, the rest {dtype}", "int4": f"int4 in layers, int8 of the vocabulary, the rest {dtype}"}
    reasons.append(("weights", f"{weight_bytes / MIB:,.0f} MiB", stored.get(config.quantization or "", dtype)))
    max_logprobs = vocab_size if config.max_logprobs < 0 else min(config.max_logprobs, vocab_size)
    return EnginePlan(
        platform=platform,
        dtype=dtype,
        kv_dtype=kv_dtype,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_decode_chunk=config.max_decode_chunk,
        max_decode_steps=decode_steps,
        paces_windows=config.max_decode_steps is None,
        speculation=speculation,
        page_size=page_size,
        num_pages=num_pages,
        page_columns=page_columns,
        num_spread_pages=SPREAD_BYTES // page_bytes if on_cpu else None,
        max_logprobs=max_logprobs,
        num_logprobs=max(1, max_logprobs),
        logprobs_mode=config.logprobs_mode,
        tensor_parallel_size=config.tensor_parallel_size,
        stacked=is_stacked(config, platform),
        quantization=config.quantization,
        weight_bytes=weight_bytes,
        page_bytes=page_bytes,
        enable_prefix_caching=config.enable_prefix_caching,
        scheduling_policy=config.scheduling_policy,
        seed=config.seed,
        max_queued=config.max_queued,
        reasons=tuple(reasons),
    )


def page_size_for(config: EngineConfig, platform: str) -> int:
    """Tokens of a page."""
    return config.block_size or {"cpu": 16, "tpu": 128}.get(platform, 32)


def kv_dtype_for(config: EngineConfig, dtype: str) -> str:
    """The dtype of keys and values in their pages."""
    return dtype if config.kv_cache_dtype == "auto" else KV_DTYPES[config.kv_cache_dtype]


def is_stacked(config: EngineConfig, platform: str) -> bool:
    """Whether layers are stacked and scanned: only TPUs read a layer's weights out of the stack without a copy."""
    return platform == "tpu" if config.stacked is None else config.stacked


def itemsize(dtype: str) -> int:
    """Bytes of one element, for "bfloat16" too."""
    import ml_dtypes  # registers the names with numpy

    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
