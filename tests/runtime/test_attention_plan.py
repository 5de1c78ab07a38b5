"""What an accelerator's attention cannot take is refused when the engine is planned, with a choice that works."""

import re
import types

import numpy as np
import pytest
import tiny

from converters.families import family_of
from converters.fields import Fields
from pallas_kernels.ragged_paged_attention import planning, tpu_plan
from runtime import preparation
from runtime.config import EngineConfig, Memory, settle
from runtime.errors import ConfigError
from runtime.machine import Machine
from runtime.preparation import prepare

GIB = 2**30
KINDS = {"tpu": "TPU v6 lite", "gpu": "NVIDIA H100 80GB HBM3"}


def planned(platform, hf=None, **wishes):
    """Prepares a tiny Llama for an accelerator that neither is here nor can be compiled for."""
    fields = Fields(tiny.FAMILIES["llama"] | {"max_position_embeddings": 2**20} | (hf or {}))
    family = family_of(fields)
    checkpoint = types.SimpleNamespace(model_class=family.model_class, config=family.config(fields), dtype="bfloat16")
    device = types.SimpleNamespace(platform=platform, device_kind=KINDS[platform], process_index=0)
    machine = Machine(platform, (device,), Memory(32 * GIB, 32 * GIB), is_here=False)
    return prepare(EngineConfig(model="", **({"max_model_len": 1024} | wishes)), checkpoint, machine)  # type: ignore


@pytest.mark.parametrize(
    "platform, hf, wishes, says",
    [
        ("tpu", {}, {"block_size": 48}, r"page size 48 is not one of .*; use 32"),
        ("tpu", {}, {"block_size": 48, "kv_cache_dtype": "int8"}, r"page size 48 is not one of .*; use 32"),
        ("gpu", {}, {"block_size": 8}, r"page size 8 is not one of .*; use 16"),
        ("tpu", {"head_dim": 320}, {}, r"head_dim 320 is over the TPU kernel's 256, .* use a GPU or a CPU"),
        ("tpu", {}, {"kv_cache_dtype": "float16"}, r"pages of float16 .* use bfloat16"),
        (
            "tpu",
            {},
            {"max_model_len": 131072, "max_num_seqs": 256},
            r"256 rows x 1024 pages .* at most 240 rows or 990",
        ),
    ],
)
def test_refused_with_a_choice_that_works(platform, hf, wishes, says):
    with pytest.raises(ConfigError, match=f"attention on {KINDS[platform]}: .*{says}"):
        planned(platform, hf, **wishes)


# A byte an element; of int8 and float32 scales for 128 tokens as much as 4 tokens; heads of 16 are padded to 128.
@pytest.mark.parametrize(
    "kv_cache_dtype, kv_heads, wishes, page_bytes",
    [
        ("fp8", 2, {}, 128 * 4 * 128),
        ("int8", 2, {}, 132 * 4 * 128),
        ("int8", 3, {}, 132 * 8 * 128),
        ("int8", 2, {"block_size": 16}, 20 * 4 * 128),
        ("int8", 2, {"block_size": 256}, 264 * 4 * 128),
        ("int8", 1, {}, 132 * 4 * 128),  # four of 8 bits share a word
    ],
)
def test_a_tpu_plans_for_scales_in_pages(monkeypatch, kv_cache_dtype, kv_heads, wishes, page_bytes):
    monkeypatch.setattr(preparation, "programs_for", lambda *args: {})  # which would want a real device
    hf = {"num_attention_heads": 6, "num_key_value_heads": kv_heads, "head_dim": 16}
    prepared = planned("tpu", hf, kv_cache_dtype=kv_cache_dtype, **wishes)
    layers = prepared.checkpoint.config.num_layers
    assert prepared.plan.page_bytes == layers * page_bytes
    (pages,) = prepared.caches
    assert np.prod(pages.shape) == prepared.plan.num_pages * prepared.plan.page_bytes
    attends = {name: why for name, _, why in prepared.plan.reasons}["attention"]
    assert ("as much as of bfloat16" in attends) == (kv_heads == 1)


@pytest.mark.parametrize(
    "rows, max_model_len, page_size", [(240, 131072, 128), (256, 990 * 128, 128), (256, 131072, 256)]
)
def test_the_choices_named_do_work(rows, max_model_len, page_size):
    columns = -(-max_model_len // page_size)
    model = dict(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", cache_dtype="bfloat16")
    reason, attends = planning.check(
        "tpu", KINDS["tpu"], page_size=page_size, num_rows=rows, num_columns=columns, **model
    )
    assert reason is None and "Pallas" in attends


@pytest.mark.parametrize(
    "num_heads, dtype, cache_dtype, says",
    [
        (128, "bfloat16", "bfloat16", "134,217,728 bytes of 100,663,296 .* use at most 96 kv heads a chip$"),
        (96, "bfloat16", "bfloat16", None),
        (64, "float32", "float32", "use at most 56 kv heads a chip or pages of bfloat16$"),
        (56, "float32", "float32", None),
        (64, "float32", "bfloat16", None),
    ],
)
def test_heads_that_overfill_vector_memory_are_refused(num_heads, dtype, cache_dtype, says):
    heads = dict(num_heads=num_heads, num_kv_heads=num_heads, head_dim=256)
    where = dict(page_size=128, num_rows=64, num_columns=32)
    reason, _ = planning.check("tpu", KINDS["tpu"], dtype=dtype, cache_dtype=cache_dtype, **heads, **where)
    assert reason is None if says is None else re.search(says, reason)


@pytest.mark.parametrize(
    "kind, most", [("TPU v4", 5), ("TPU v5 lite", 96), ("TPU v5", 48), ("TPU v6 lite", 96), ("TPU7x", 48)]
)
def test_vector_memory_is_the_chips_own(kind, most):
    usual = dict(head_dim=256, page_size=128, num_rows=64, num_columns=32, dtype="bfloat16", cache_dtype="bfloat16")
    check = lambda heads: planning.check("tpu", kind, num_heads=heads, num_kv_heads=heads, **usual)[0]
    assert check(most) is None
    assert re.search(f"use at most {most} kv heads a chip$", check(128))


def test_rows_follow_from_the_length_of_page_tables_unless_asked():
    numbers = dict(memory=Memory(64 * GIB, 64 * GIB), vocab_size=1000, weight_bytes=1, token_bytes=1000)
    plan = lambda length, **wishes: settle(
        EngineConfig(model="", **wishes), platform="tpu", model_max_len=length, dtype="bfloat16", **numbers
    )
    assert plan(8192).max_num_seqs == 256
    assert plan(131072).max_num_seqs == tpu_plan.most_rows(1024) == 240
    assert plan(131072, max_num_seqs=256).max_num_seqs == 256  # refused by what compiles it, with the numbers


@pytest.mark.parametrize(
    "kind, change, attends",
    [
        ("NVIDIA H100 80GB HBM3", {}, "Mosaic"),
        ("NVIDIA A100-SXM4-80GB", {}, "Triton .* not a Hopper"),
        ("NVIDIA H100 80GB HBM3", {"cache_dtype": "int8"}, "Mosaic"),
        ("NVIDIA H100 80GB HBM3", {"cache_dtype": "float8_e4m3fn", "dtype": "float16"}, "Mosaic"),
        ("NVIDIA H100 80GB HBM3", {"cache_dtype": "int8", "dtype": "float16"}, "Triton .* queries of bfloat16"),
        ("NVIDIA H100 80GB HBM3", {"cache_dtype": "float32"}, "Triton .* no pages of float32"),
        ("NVIDIA H100 80GB HBM3", {"head_dim": 320}, "gathered .* head_dim 320"),
        ("NVIDIA H100 80GB HBM3", {"num_heads": 80, "num_kv_heads": 1}, "gathered .* 80 query heads"),
    ],
)
def test_a_gpu_says_what_attends(kind, change, attends):
    usual = dict(num_heads=32, num_kv_heads=8, head_dim=128, page_size=32, dtype="bfloat16", cache_dtype="bfloat16")
    reason, words = planning.check("gpu", kind, num_rows=8, num_columns=8, **(usual | change))
    assert reason is None
    assert re.search(attends, words)
