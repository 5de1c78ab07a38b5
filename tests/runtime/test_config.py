"""Wishes become numbers that fit, or an error that has the numbers."""

import re

import pytest

from runtime.config import SPREAD_BYTES, EngineConfig, Memory, settle
from runtime.errors import ConfigError

GIB = 2**30
SMALL = {
    "memory": Memory(8 * GIB, 6 * GIB), "vocab_size": 1000, "model_max_len": 4096, "weight_bytes": GIB // 4,
    "token_bytes": 20_000, "dtype": "bfloat16",
}  # fmt: skip


def plan(platform="cpu", changes=None, **wishes):
    return settle(EngineConfig(model="m", **wishes), platform=platform, **{**SMALL, **(changes or {})})


def test_a_cpu_takes_a_quarter_of_free_memory_and_spreads_over_a_part():
    settled = plan()
    assert settled.page_size == 16 and settled.page_bytes == 320_000
    assert settled.num_pages == (6 * GIB - GIB // 4) // 4 // 320_000  # a quarter of what is free
    assert settled.num_spread_pages == SPREAD_BYTES // 320_000
    assert settled.page_columns == 256 and not settled.stacked and settled.max_decode_steps == 1


def test_an_accelerator_gets_what_weights_and_a_step_leave():
    settled = plan("tpu", {"memory": Memory(16 * GIB, 16 * GIB)})
    scores = 2 * 256 * 1000 * 4  # twice float32[rows, vocabulary]
    pages = (int(16 * GIB * 0.9) - GIB // 4 - GIB // 4 - scores) // (20_000 * 128)
    assert (settled.page_size, settled.num_pages, settled.num_spread_pages) == (128, pages, None)
    assert settled.stacked and settled.max_decode_steps == 8 and settled.paces_windows


def test_a_cpu_drafts_for_a_request_that_is_alone():
    assert (plan().speculation.num_drafts, plan().speculation.max_rows) == (4, 1)
    assert plan(speculative_config={"num_speculative_tokens": 0}).speculation.num_drafts == 0
    assert plan("tpu", {"memory": Memory(16 * GIB, 16 * GIB)}).speculation.num_drafts == 0


def test_what_was_asked_is_taken():
    settled = plan(max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64, block_size=32,
                   num_gpu_blocks_override=99, max_decode_chunk=7)  # fmt: skip
    assert (settled.max_model_len, settled.max_num_seqs, settled.max_num_batched_tokens) == (512, 4, 64)
    assert (settled.page_size, settled.num_pages, settled.max_decode_chunk) == (32, 99, 7)
    asked = {name for name, _, why in settled.reasons if why == "asked"}
    assert {"max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "max_decode_chunk"} <= asked


@pytest.mark.parametrize(
    "wishes, field, expected",
    [
        ({}, "num_logprobs", 20),
        ({"max_logprobs": 5}, "num_logprobs", 5),
        ({"max_logprobs": 0}, "max_logprobs", 0),
        ({"max_logprobs": -1}, "num_logprobs", 1000),  # the whole vocabulary
        ({"kv_cache_dtype": "float32"}, "kv_dtype", "float32"),
        ({"kv_cache_dtype": "int8"}, "kv_dtype", "int8"),
        ({"kv_cache_dtype": "fp8"}, "kv_dtype", "float8_e4m3fn"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_dtype", "float8_e4m3fn"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_dtype", "float8_e5m2"),
        ({"kv_cache_memory_bytes": 320_000 * 300}, "num_pages", 300),
        ({"enable_prefix_caching": False}, "enable_prefix_caching", False),
        ({"scheduling_policy": "priority"}, "scheduling_policy", "priority"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode", "raw_logits"),
        ({"max_decode_steps": 4}, "max_decode_steps", 4),
        ({"max_queued": 9}, "max_queued", 9),
    ],
)
def test_each_wish_reaches_the_plan(wishes, field, expected):
    assert getattr(plan(**wishes), field) == expected


def test_an_accelerators_share_of_memory_is_the_one_asked_for():
    memory = {"memory": Memory(16 * GIB, 16 * GIB)}
    half, all_of_it = (plan("tpu", memory, gpu_memory_utilization=share).num_pages for share in (0.5, 1.0))
    assert all_of_it - half == pytest.approx(8 * GIB / (20_000 * 128), abs=2)


@pytest.mark.parametrize(
    ("changes", "wishes", "message"),
    [
        ({}, {"max_model_len": 5000}, "max_model_len 5,000 is above the 4,096 positions"),
        ({}, {"max_num_batched_tokens": 64}, "max_num_batched_tokens 64 is below max_num_seqs 128"),
        ({"weight_bytes": 9 * GIB}, {}, "weights take 9,216 MiB and 7,373 MiB may be used"),
        (
            {},
            {"num_gpu_blocks_override": 3},
            "3 pages of 16 tokens fit (1 MiB), and one request of max_model_len 4,096",
        ),
        ({}, {"kv_cache_memory_bytes": 6 * GIB}, "do not fit the 6,144 MiB of memory that are free"),
        ({}, {"dtype": "int3"}, "dtype 'int3' is not known; choose one of auto"),
        ({}, {"quantization": "int3"}, "quantization 'int3' is not known; use int8 or int4, or leave it out"),
        ({}, {"kv_cache_dtype": "fp4"}, "kv_cache_dtype 'fp4' is not known; choose one of auto, bfloat16, float16"),
        ({}, {"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; it must be in (0, 1]"),
        ({}, {"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({}, {"scheduling_policy": "lifo"}, "scheduling_policy 'lifo' is not known"),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(changes, wishes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(changes=changes, **wishes)


def test_a_longer_length_than_the_checkpoint_can_be_insisted_on(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert plan(max_model_len=5000).max_model_len == 5000
