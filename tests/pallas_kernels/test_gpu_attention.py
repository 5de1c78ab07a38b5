"""The Hopper kernel of ragged paged attention, and its fallback in plain XLA, compute what the reference computes.

The kernel runs in Mosaic's GPU interpreter, which keeps clocks for copies and threads and reports races.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_batch import MIXED, Shape

from pallas_kernels.ragged_paged_attention import gpu, gpu_narrow, gpu_plan

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this JAX has no interpreter for Mosaic GPU kernels", allow_module_level=True)

from gpu_interpreter import SCALE, assert_same, compiled, scaled_shape

BFLOAT16, FLOAT16 = (functools.partial(Shape, dtype=dtype, cache_dtype=dtype) for dtype in ("bfloat16", "float16"))
SHAPES = {"bfloat16": BFLOAT16(), "float16": FLOAT16(kv_heads=1, group=4)}
in_both_dtypes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
SINKS = np.array((0.5, -1.0, 4.0, 0.0), np.float32)
# (tokens in the cache, of which new), decodes first
ROWS = {
    "nothing": [],
    "single token": [(1, 1)],
    "one short of a page, full, one past": [(15, 1), (16, 1), (17, 1)],
    "block boundaries": [(63, 1), (64, 1), (65, 1)],
    "whole prompts": [(16, 16), (17, 17)],
    "later chunks": [(40, 20), (70, 13)],
    "decodes, chunks, empty rows": MIXED,
}


@in_both_dtypes
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_matches_reference(shape, rows):
    args = kernel_batch.batch(shape, rows, gpu.cache_shape)
    assert_same(compiled()(*args), args)


@in_both_dtypes
def test_matches_reference_on_random_batches(shape, subtests):
    for seed in range(4):
        with subtests.test(seed=seed):
            args = kernel_batch.batch(shape, kernel_batch.random_rows(shape, seed), gpu.cache_shape, seed=seed)
            assert_same(compiled()(*args), args)


@in_both_dtypes
def test_matches_reference_on_random_batches_with_everything_at_once(shape, subtests):
    """Windows, a soft cap, sinks, shared prefixes and pages of another layer; numbers that differ between layers."""
    for seed, window in enumerate([1, 9, 17, 64]):
        with subtests.test(seed=seed):
            rows = kernel_batch.random_rows(shape, seed)
            args = kernel_batch.batch(shape, rows, gpu.cache_shape, seed=seed, share=seed % 3)
            args, offset = kernel_batch.with_another_layer(args)
            options = dict(window=jnp.int32(window), sinks_N=SINKS, page_offset=offset)
            assert_same(compiled(soft_cap=3.0)(*args, **options), args, soft_cap=3.0, **options)


@in_both_dtypes
def test_rows_share_prefix_pages(shape):
    args = kernel_batch.batch(shape, kernel_batch.SHARING, gpu.cache_shape, share=2)
    assert args[5][0, 1] == args[5][3, 1]
    assert_same(compiled()(*args), args)


@in_both_dtypes
def test_rows_past_the_count_are_left_alone(shape):
    args = kernel_batch.with_fewer_rows(kernel_batch.batch(shape, MIXED, gpu.cache_shape), 3)
    assert_same(compiled()(*args), args)


CONFIGS = {
    "float16, group 3, heads of 64, page 32": (FLOAT16(group=3, head_dim=64, page_size=32, num_columns=3), {}),
    "group 3, heads of 80": (BFLOAT16(group=3, head_dim=80), {}),
    "heads of 96": (BFLOAT16(head_dim=96), {}),
    "one kv head of 256, page 64, window": (
        BFLOAT16(group=4, kv_heads=1, head_dim=256, page_size=64, num_columns=2),
        {"window": 20},
    ),
}


@pytest.mark.parametrize("shape, options", CONFIGS.values(), ids=CONFIGS)
def test_matches_reference_in_every_flavour(shape, options):
    args = kernel_batch.batch(shape, MIXED, gpu.cache_shape)
    assert_same(compiled()(*args, **options), args, **options)


# Several turns of the ring in each split: one warpgroup, and two.
@pytest.mark.parametrize("dtype, head_dim", [("float16", 128), ("bfloat16", 256)])
def test_long_rows_turn_the_ring(dtype, head_dim):
    shape = kernel_batch.long_shape(dtype, head_dim)
    args = kernel_batch.batch(shape, kernel_batch.LONG, gpu.cache_shape)
    assert_same(compiled()(*args), args)


# Pages over the 64 tokens of a block of keys, each fetched by parts: (page size, rows).
LARGE_PAGES = {
    128: [(127, 1), (128, 1), (129, 1), (300, 1), (0, 0), (140, 20)],
    256: [(256, 1), (257, 1), (0, 0), (300, 12), (270, 20)],
}


@pytest.mark.parametrize("page_size, rows", LARGE_PAGES.items(), ids=LARGE_PAGES)
def test_large_pages(page_size, rows):
    shape = BFLOAT16(page_size=page_size, num_columns=3, num_pages=12, kv_heads=1)
    args = kernel_batch.batch(shape, rows, gpu.cache_shape)
    assert_same(compiled()(*args, window=140), args, window=140)


SCALES = {"k_scale": np.float32(0.05), "v_scale": np.float32(0.03)}
FEW = Shape(num_tokens=24, num_rows=2, num_columns=5, num_pages=12, page_size=64, kv_heads=1, group=4)
# Two kernels and one; pages of bfloat16 models are in test_gpu_planted_errors.py.
NARROW = {
    "fp8_e5m2, float16, heads of 80, everything at once": (
        dataclasses.replace(FEW, dtype="float16", cache_dtype="float8_e5m2", head_dim=80),
        gpu.cache_shape,
        [(50, 1), (30, 18)],
        dict(soft_cap=3.0),
        dict(window=9, sinks_N=SINKS, **SCALES),
    ),
    "int8 with scales in the pages, two warpgroups": (
        dataclasses.replace(FEW, dtype="bfloat16", cache_dtype="int8", head_dim=256),
        scaled_shape,
        [(300, 1), (130, 3)],
        dict(max_q_len=3),
        {},
    ),
}


@pytest.mark.parametrize("shape, pages, rows, static, options", NARROW.values(), ids=NARROW)
def test_narrow_pages_match_reference(shape, pages, rows, static, options):
    """Those of 8 bits, read by the kernel as they are."""
    args = kernel_batch.batch(shape, rows, pages)
    assert_same(compiled(**static)(*args, **options), args, soft_cap=static.get("soft_cap"), **options)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_queries_of_any_size_meet_fp8_keys(size):
    """A float16 holds neither; and a query of another row changes nothing."""
    q_IKRH = np.random.default_rng(0).normal(size=(1, 1, 8, 64)).astype(np.float32)
    q_IKRH[0, 0, 0] *= size
    q_IKRH[0, 0, 1] = 0
    q_IKRH = jnp.asarray(q_IKRH, jnp.bfloat16)
    narrowed_IKRH, factor_IKR = gpu_narrow.queries(q_IKRH, jnp.float16)
    assert narrowed_IKRH.dtype == jnp.float16 and factor_IKR.shape == (1, 1, gpu_plan.TILE)
    got = np.asarray(narrowed_IKRH, np.float64) * np.asarray(factor_IKR, np.float64)[:, :, :8, None]
    expected = np.asarray(q_IKRH, np.float64)
    largest = abs(expected).max(-1, keepdims=True)
    assert (abs(got - expected) <= largest * 2.0**-38).all() and (got[0, 0, 2:] == expected[0, 0, 2:]).mean() > 0.99


GATHERED = {
    "int8 pages": (Shape(cache_dtype="int8"), SCALES),
    "int8 pages, bfloat16": (Shape(dtype="bfloat16", cache_dtype="int8"), SCALES),
    "fp8 pages, window, soft cap": (
        Shape(cache_dtype="float8_e4m3fn", head_dim=96, group=3),
        {"window": 9, "soft_cap": 3.0} | SCALES,
    ),
    "float32 pages, sinks": (Shape(), {"sinks_N": SINKS}),
}


@pytest.mark.parametrize("shape, options", GATHERED.values(), ids=GATHERED)
def test_gathered_pages_match_reference(monkeypatch, shape, options, subtests):
    monkeypatch.setattr(gpu.gpu_gather, "KEYS", 32)
    monkeypatch.setattr(gpu.gpu_gather, "QUERIES", 16)
    gathered = jax.jit(functools.partial(gpu.attend, scale=SCALE, kernel="gather", soft_cap=options.get("soft_cap")))
    arrays = {name: value for name, value in options.items() if name != "soft_cap"}
    for seed, rows in enumerate([MIXED, *(kernel_batch.random_rows(shape, seed) for seed in range(3))]):
        with subtests.test(rows=rows):
            args = kernel_batch.batch(shape, rows, gpu.cache_shape, seed=seed)
            # XLA adds up in an order of its own.
            assert_same(gathered(*args, **arrays), args, times=4, **options)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(page_size=48), "use 32"),
        (dict(cache_dtype="float32"), "use bfloat16"),
        (dict(cache_dtype="int8"), "take queries of bfloat16"),
        (dict(cache_dtype="float8_e4m3fn"), "take queries of bfloat16 or float16"),
        (dict(group=65), "65 query heads"),
        (dict(head_dim=320), "over the kernel's 256"),
    ],
)
def test_refusals_give_numbers_and_a_way_out(change, says):
    shape = Shape(**{"cache_dtype": "bfloat16"} | change)
    q, k, _, cache, *_ = kernel_batch.batch(shape, [(1, 1)], gpu.cache_shape)
    assert says in gpu_plan.hopper_refusal(q, k, cache, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 192, 256])
def test_pages_as_the_platform_shapes_them_are_taken(head_dim):
    q, k, _, cache, *_ = kernel_batch.batch(Shape(head_dim=head_dim, cache_dtype="bfloat16"), [(1, 1)], gpu.cache_shape)
    assert gpu_plan.hopper_refusal(q, k, cache, "NVIDIA H100 80GB HBM3") is None
