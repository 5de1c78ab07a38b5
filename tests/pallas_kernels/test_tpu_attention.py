"""The TPU kernel of ragged paged attention computes what the reference computes, in the Pallas TPU interpreter."""

import functools

import exact_attention
import jax
import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
from kernel_batch import MIXED, Shape
from quick_compile import OPTIONS, quick_jit
from tpu_interpreter import assert_same, compiled

from pallas_kernels.ragged_paged_attention import reference, tpu, tpu_plan

scaled_shape = functools.partial(tpu.cache_shape, dtype="int8")  # of pages with a scale for each key and value
SHAPES = {dtype: Shape(dtype=dtype, cache_dtype=dtype) for dtype in ("float32", "bfloat16")}
in_both_dtypes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
SINKS = np.array((0.5, -1.0, 4.0, 0.0), np.float32)

# (tokens in the cache, of which new), decodes first
ROWS = {
    "nothing": [],
    "single token": [(1, 1)],
    "one short of a page, full, one past": [(15, 1), (16, 1), (17, 1)],
    "block boundaries": [(32, 1), (33, 1), (64, 1), (65, 1)],
    "whole prompts": [(16, 16), (17, 17)],
    "later chunks": [(40, 20), (35, 3)],
    "decodes and chunks": [(7, 1), (50, 1), (30, 12), (31, 31)],
    "empty rows between": [(9, 1), (20, 0), (18, 18), (4, 0), (33, 7)],
    "last rows empty": [(9, 1), (20, 4), (4, 0), (0, 0)],
    "one token in a chunk row": [(20, 4), (33, 1)],
}


@in_both_dtypes
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_matches_reference(shape, rows):
    args = kernel_batch.batch(shape, rows, tpu.cache_shape)
    assert_same(compiled()(*args), args)


@in_both_dtypes
def test_matches_reference_on_random_batches(shape, subtests):
    for seed in range(6):
        with subtests.test(seed=seed):
            args = kernel_batch.batch(shape, kernel_batch.random_rows(shape, seed), tpu.cache_shape, seed=seed)
            assert_same(compiled()(*args), args)


@in_both_dtypes
def test_matches_reference_on_random_batches_with_everything_at_once(shape, subtests):
    """Windows, a soft cap, sinks, shared prefixes and pages of another layer; numbers that differ between layers."""
    for seed, window in enumerate([1, 9, 16, 17, 33, 64]):
        with subtests.test(seed=seed):
            rows = kernel_batch.random_rows(shape, seed)
            args = kernel_batch.batch(shape, rows, tpu.cache_shape, seed=seed, share=seed % 3)
            args, offset = kernel_batch.with_another_layer(args)
            options = dict(window=jnp.int32(window), sinks_N=SINKS, page_offset=offset)
            assert_same(compiled(soft_cap=3.0)(*args, **options), args, soft_cap=3.0, **options)


@in_both_dtypes
def test_rows_share_prefix_pages(shape):
    args = kernel_batch.batch(shape, kernel_batch.SHARING, tpu.cache_shape, share=2)
    assert args[5][0, 1] == args[5][3, 1]
    assert_same(compiled()(*args), args)


@in_both_dtypes
def test_rows_past_the_count_are_left_alone(shape):
    args = kernel_batch.with_fewer_rows(kernel_batch.batch(shape, MIXED, tpu.cache_shape), 3)
    assert_same(compiled()(*args), args)


SCALES = {"k_scale": np.float32(0.05), "v_scale": np.float32(0.03)}
CONFIGS = {
    "bfloat16, group 3, 3 kv heads of 64": (
        Shape(group=3, kv_heads=3, head_dim=64, dtype="bfloat16", cache_dtype="bfloat16"),
        {},
    ),
    "bfloat16, one kv head of 256, window": (
        Shape(group=4, kv_heads=1, head_dim=256, dtype="bfloat16", cache_dtype="bfloat16"),
        {"window": 20},
    ),
    "float32, no sharing, heads of 80, page 32": (Shape(group=1, head_dim=80, page_size=32, num_columns=3), {}),
    "int8 pages": (Shape(dtype="bfloat16", cache_dtype="int8"), SCALES),
    "fp8 pages, heads of 96": (
        Shape(dtype="bfloat16", cache_dtype="float8_e4m3fn", head_dim=96, group=7, kv_heads=1),
        {"sinks_N": np.array((0.5, -1.0, 4.0, 0.0, 1.0, 2.0, 3.0), np.float32)} | SCALES,
    ),
}


@pytest.mark.parametrize("shape, options", CONFIGS.values(), ids=CONFIGS)
def test_matches_reference_in_every_flavour(shape, options, subtests):
    # int8 pages that are shaped by their dtype have scales of their own: see the test below.
    dtype = None if shape.cache_dtype == "int8" else shape.cache_dtype
    pages = functools.partial(tpu.cache_shape, dtype=dtype)
    for seed, rows in enumerate([MIXED, kernel_batch.random_rows(shape, 1)]):
        with subtests.test(rows=rows):
            args = kernel_batch.batch(shape, rows, pages, seed=seed)
            assert_same(compiled()(*args, **options), args, **options)


SCALED = Shape(dtype="bfloat16", cache_dtype="int8", kv_heads=3, group=3, head_dim=64)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything at once"])
def test_matches_reference_with_a_scale_for_each_key_and_value(everything, subtests):
    batches = [(MIXED, 0), (ROWS["empty rows between"], 0), (kernel_batch.SHARING, 2)]
    for seed, (rows, share) in enumerate([*batches, (kernel_batch.random_rows(SCALED, 1), 0)]):
        with subtests.test(rows=rows):
            args = kernel_batch.batch(SCALED, rows, scaled_shape, seed=seed, share=share)
            args, offset = kernel_batch.with_another_layer(args)
            options = dict(page_offset=offset)
            if everything:
                options |= dict(window=jnp.int32([33, 9, 16, 17][seed]), sinks_N=np.tile(SINKS, 3)[:9])
            soft_cap = 3.0 if everything else None
            assert_same(compiled(soft_cap=soft_cap)(*args, **options), args, soft_cap=soft_cap, **options)


# Rows of a page and more: two pages a fetch, and one whose scales fill two rows of lanes, folded by halves.
@pytest.mark.parametrize("page_size, head_dim", [(128, 128), (256, 256)])
def test_scales_of_large_pages(page_size, head_dim):
    shape = Shape(
        page_size=page_size, num_columns=2, num_pages=8, kv_heads=1, head_dim=head_dim, dtype="bfloat16",
        cache_dtype="int8", num_rows=4, num_tokens=176,
    )  # fmt: skip
    args = kernel_batch.batch(shape, [(257 - 128 * (page_size == 128), 1), (0, 0), (170, 150)], scaled_shape)
    sizes = {f"{case}_blocks": tpu_plan.Blocks(query, 256, 128) for case, query in [("decode", 1), ("chunk", 16)]}
    assert_same(compiled(**sizes)(*args), args)


# A page a fetch, folded by halves or more: (page size, dtype, rows).
LARGE_PAGES = [
    (128, "float32", [(127, 1), (128, 1), (129, 1), (300, 1), (0, 0), (140, 20)]),
    (256, "bfloat16", [(256, 1), (257, 1), (0, 0), (300, 12), (270, 20)]),
]


@pytest.mark.parametrize("page_size, dtype, rows", LARGE_PAGES)
def test_large_pages(page_size, dtype, rows):
    shape = Shape(page_size=page_size, num_columns=3, num_pages=12, kv_heads=1, dtype=dtype, cache_dtype=dtype)
    args = kernel_batch.batch(shape, rows, tpu.cache_shape)
    sizes = {f"{case}_blocks": tpu_plan.Blocks(query, page_size, 64) for case, query in [("decode", 1), ("chunk", 16)]}
    assert_same(compiled(**sizes)(*args, window=140), args, window=140)


def test_blocks_by_formula_give_the_same_answers():
    """The sizes that a TPU would run with: compute blocks of whole lanes, one fetch for a short row."""
    args = kernel_batch.batch(Shape(), MIXED, tpu.cache_shape)
    assert_same(compiled(decode_blocks=None, chunk_blocks=None)(*args), args)


# ---- the bounds that answers are held to ----


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["optimised", "as tests compile"])
@pytest.mark.parametrize("name, low, high", [("exp", -87, 0), ("tanh", -9, 9), ("log", 1, 4096)])
def test_functions_are_as_exact_as_the_bound_takes_them(name, low, high, options):
    x = np.linspace(low, high, 1_000_003, dtype=np.float32)
    exact = getattr(np, name)(x.astype(np.float64))
    got = np.asarray(jax.jit(getattr(jnp, name), compiler_options=options)(x))
    assert (abs(got - exact) / np.maximum(abs(exact), 2.0**-126)).max() <= exact_attention.FUNCTION * 2.0**-24


# Significant bits, of which one is not stored: (dtype, of logits, of softmax weights).
LOST = {
    "float32, weights of bfloat16": ("float32", 24, 8),
    "bfloat16, logits of bfloat16": ("bfloat16", 8, 24),
    "bfloat16, weights of a bit less": ("bfloat16", 24, 7),
}


@pytest.mark.parametrize("dtype, logit_bits, weight_bits", LOST.values(), ids=LOST)
def test_lost_digits_are_out_of_bounds(monkeypatch, dtype, logit_bits, weight_bits):
    args = kernel_batch.batch(SHAPES[dtype], MIXED, tpu.cache_shape)
    softmax, rounded = reference._softmax, lambda x, bits: jax.lax.reduce_precision(x, 8, bits - 1)
    monkeypatch.setattr(
        reference, "_softmax", lambda logits, sinks: rounded(softmax(rounded(logits, logit_bits), sinks), weight_bits)
    )
    out, cache = quick_jit(functools.partial(reference.attend, scale=0.2))(*args)
    num_tokens = args[6][-1]
    out = out.at[num_tokens:].set(args[0][num_tokens:])
    with pytest.raises(AssertionError, match="times the bound"):
        assert_same((out, cache), args)


# ---- refusals and sizes ----


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(page_size=48), "use 32"),
        (dict(page_size=512, num_pages=1), "use 256"),
        (dict(head_dim=320), "over the TPU kernel's 256"),
        (dict(cache_dtype="float16"), "use bfloat16"),
        (dict(dtype="float16"), "cast them to bfloat16"),
    ],
)
def test_refusals_give_numbers_and_a_way_out(change, says):
    args = kernel_batch.batch(Shape(**change), [(1, 1)], tpu.cache_shape)
    assert not tpu.supports(args[0], args[1], args[3])
    with pytest.raises(ValueError, match=says):
        tpu.attend(*args, scale=1)


def test_refuses_a_cache_of_another_platforms_shape():
    q, k, v, cache, *rest = kernel_batch.batch(Shape(head_dim=64), [(1, 1)], tpu.cache_shape)
    with pytest.raises(ValueError, match="allocate it by cache_shape"):
        tpu.attend(q, k, v, cache[..., :64], *rest, scale=1)


def test_refuses_a_page_table_over_scalar_memory():
    q, k, v, cache, lens, _, cu, counts = kernel_batch.batch(Shape(), [(1, 1)], tpu.cache_shape)
    table = jax.ShapeDtypeStruct((256, 2048), jnp.int32)
    assert "at most 120 rows or 990 pages a row, 15,840 tokens or page size 64" in tpu.refusal(q, k, cache, table)


@pytest.mark.parametrize("kv_heads, width", [(1, 2), (3, 8), (8, 16), (10, 32), (20, 48)])
def test_cache_shape_keeps_tokens_end_to_end(kv_heads, width):
    assert tpu.cache_shape(7, 16, kv_heads, 80) == (7, 16, width, 128)
    assert tpu.cache_shape(7, 16, kv_heads, 80, "float8_e5m2") == (7, 16, max(4, width), 128)
    assert tpu.cache_shape(7, 16, kv_heads, 80, "int8") == (7, 20, max(4, width), 128)


def test_tuned_blocks_override_the_formula():
    q, k, _, cache, *_ = kernel_batch.batch(
        Shape(kv_heads=8, group=4, page_size=128, cache_dtype="bfloat16"), [(1, 1)], tpu.cache_shape
    )
    assert tpu_plan.blocks(q, k, cache, 64, "decode", "TPU v6 lite") == tpu_plan.Blocks(1, 512, 512)
    assert tpu_plan.blocks(q, k, cache, 64, "decode", "TPU v5 lite") == tpu_plan.Blocks(1, 512, 256)


@pytest.mark.parametrize("head_dim, kv_heads, page_size", [(64, 1, 16), (128, 8, 128), (128, 32, 256), (256, 16, 64)])
@pytest.mark.parametrize("case", ["decode", "chunk"])
def test_blocks_divide_each_other_and_fit_the_chip(head_dim, kv_heads, page_size, case):
    array = jax.ShapeDtypeStruct
    q, k = (array((512, n, head_dim), jnp.bfloat16) for n in (kv_heads * 4, kv_heads))
    cache = array(tpu.cache_shape(64, page_size, kv_heads, head_dim), jnp.bfloat16)
    blocks = tpu_plan.blocks(q, k, cache, 64, case)
    assert blocks.fetch % blocks.compute == 0 and blocks.fetch % page_size == 0
    assert tpu_plan.vmem_bytes(blocks, q, k, cache) < tpu_plan.vmem_limit("TPU v6 lite")
