"""The engine's whole steps compile for TPUs and for a GPU, with the attention kernel in them, and copy nothing large.

A step reads each weight once and keeps its pages where they are: pages are donated and come back aliased, and neither
a layer's pages nor one of its matrices is brought to another place in memory first.
"""

import absent_gpu
import absent_tpu
import jax
import jax.numpy as jnp
import pytest
import whole_step

from converters.families import FAMILIES
from runtime import executables, formats
from runtime.buckets import Bucket

MISSING = {"tpu": absent_tpu.prepare(), "gpu": absent_gpu.prepare()}
MARKS = {"tpu": pytest.mark.tpu, "gpu": pytest.mark.gpu}
CHIPS = ("v5e-1", "v6e-1", "h100-1")
SMALL = dict(max_num_seqs=8, max_num_batched_tokens=64, num_gpu_blocks_override=256, max_model_len=512)
LARGE = dict(max_num_seqs=32, max_num_batched_tokens=512)
MIB = 2**20


def on(target, *values):
    """A case that runs where the target's compiler is."""
    platform = "gpu" if target.startswith("h100") else "tpu"
    marks = [MARKS[platform], pytest.mark.skipif(bool(MISSING[platform]), reason=str(MISSING[platform]))]
    return pytest.param(target, *values, marks=marks, id="-".join([target, *(v for v in values if isinstance(v, str))]))


def assert_lean(step, num_kernels):
    assert step.num_kernels == num_kernels
    assert step.aliased_bytes >= step.page_bytes
    assert step.large_copies == []


@pytest.mark.parametrize(
    "target, family",
    [on(target, row.name) for row in FAMILIES.values() for target in CHIPS],
)
def test_steps_of_every_family(target, family):
    """A window of decode steps, which is also the one decode step, and a step with prompts."""
    hf = whole_step.family(family)
    layers = hf["num_hidden_layers"]
    steps = whole_step.compile_steps(hf, target, **SMALL)
    assert sorted(step.bucket.is_decode for step in steps) == [False, True]
    of_experts = 2 if "num_experts_per_tok" in hf else 0
    for step in steps:
        # A TPU has one of attention, in the one layer that is scanned. A GPU needs a second for rows of any length.
        of_attention = 1 if target != "h100-1" or step.bucket.is_decode else 2
        assert_lean(step, (of_attention + of_experts) * (layers if target == "h100-1" else 1))
        assert step.temp_bytes < 8 * MIB <= step.page_bytes // layers


@pytest.mark.parametrize(
    "target, family, quantization",
    [
        on("v5e-1", "mixtral", "int8"),
        on("v6e-1", "qwen3_moe", "int8"),
        on("h100-1", "qwen3_moe", "int8"),
        on("v5e-1", "qwen3_moe", "int4"),
        on("v6e-1", "mixtral", "int4"),
    ],
)
def test_steps_of_rounded_experts(target, family, quantization):
    """As of those that are not rounded: none is written anywhere else, nor widened, before it is multiplied."""
    hf = whole_step.family(family, hidden_size=1024, moe_intermediate_size=512, vocab_size=512)
    for step in whole_step.compile_steps(hf, target, quantization=quantization, **SMALL):
        of_attention = 1 if target != "h100-1" or step.bucket.is_decode else 2
        others = 2 if quantization == "int4" else 0  # qkv and o
        assert_lean(step, (of_attention + 2 + others) * (hf["num_hidden_layers"] if target == "h100-1" else 1))
        assert step.temp_bytes < 8 * MIB


@pytest.mark.parametrize(
    "target, bucket, wishes",
    [
        on("v6e-1", "decode 32x32", {}),
        on("v6e-1", "mixed 512x32", {}),
        on("v6e-1", "mixed 2048x32", {"max_num_batched_tokens": 2048}),
        on("v5e-1", "decode 32x32", {"quantization": "int8", "max_model_len": 4096}),
        on("v5e-1", "decode 32x32", {"quantization": "int8", "max_model_len": 4096, "kv_cache_dtype": "int8"}),
        on("v6e-1", "mixed 512x32", {"kv_cache_dtype": "int8"}),
        on("v5e-4", "decode 32x32", {"tensor_parallel_size": 4}),
        on("v5e-4", "decode 32x32", {"tensor_parallel_size": 4, "kv_cache_dtype": "int8"}),
        on("h100-1", "decode 32x32", {}),
        on("h100-1", "mixed 2048x32", {"max_num_batched_tokens": 2048}),
        on("h100-1", "decode 32x32", {"kv_cache_dtype": "fp8"}),
        on("h100-1", "mixed 2048x32", {"max_num_batched_tokens": 2048, "kv_cache_dtype": "fp8"}),
        on("h100-1", "decode 32x32", {"kv_cache_dtype": "int8"}),
    ],
)
def test_steps_of_llama_3_8b(target, bucket, wishes):
    """All 32 layers and as many pages as the chip has room for; bfloat16 weights are 15 GiB, too much for one v5e.

    A decode's temporaries are the scores, float32[rows, vocabulary], and what sampling a few rows of them keeps.
    With -s it prints the table of pallas_kernels/README.md.
    """
    (step,) = whole_step.compile_steps(whole_step.LLAMA_3_8B, target, only=bucket, **LARGE | wishes)
    print(
        f"\n{target} {bucket} {wishes}: compiled in {step.seconds:.0f} s, pages {step.page_bytes / MIB:,.0f} MiB, "
        f"temporaries {step.temp_bytes / MIB:.1f} MiB"
    )
    assert_lean(step, 1 if target != "h100-1" else 32 if step.bucket.is_decode else 64)
    assert step.temp_bytes < (64 if step.bucket.is_decode else 256) * 10**6


@pytest.mark.parametrize(
    "target, quantization, is_usual",
    [on("v5e-1", "int4", False), on("v6e-1", "int8", True), on("h100-1", "int4", True)],
)
def test_all_steps_want_weights_to_lie_as_the_decode_step_does(target, quantization, is_usual):
    """And then none brings a matrix to another order first; nor is any compiled twice, since each chooses alike."""
    prepared = whole_step.prepare(whole_step.family("llama"), target, quantization=quantization, **SMALL)
    num_compiled = executables.CompileCounter()
    choice = formats.Choice()
    devices = prepared.layout.devices
    built = executables.build(prepared.programs, prepared.facts, prepared.machine, devices, None, choice=choice)
    assert num_compiled.count == len(built.table)
    layouts = choice.result()
    assert layouts.keys() == prepared.shapes.keys()
    for key, executable in built.table.items():
        if isinstance(key, Bucket):
            assert formats.read_back(executable) == layouts
            assert whole_step.step_of(prepared, key, executable).large_copies == []
    weights = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in prepared.shapes.items()}
    usual = jax.jit(lambda weights: weights, in_shardings=(prepared.layout.shardings(weights),))
    assert (formats.read_back(usual.lower(weights).compile()) == layouts) == is_usual


@pytest.mark.parametrize("target", [on("v5e-1"), on("h100-1")])
def test_a_copy_is_noticed(target):
    """What the tests above look for is there when a program does copy an array."""
    x = jax.ShapeDtypeStruct((2048, 4096), jnp.float32)
    is_gpu = target == "h100-1"

    def sizes(function):
        compiled = (
            absent_gpu.compile_for_h100(function, [x]) if is_gpu else absent_tpu.compile_for("v5e", function, [x])
        )
        return [copy.arrays[0].num_bytes for copy in whole_step.large_copies(compiled[0].as_text(), 2**20)]

    assert sizes(lambda x: x.T) == [2048 * 4096 * 4]
    assert sizes(lambda x: x + 1) == []
