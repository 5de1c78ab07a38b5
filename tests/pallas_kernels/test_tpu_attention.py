"""The TPU kernel of ragged paged attention computes what the reference computes, in the Pallas TPU interpreter.

The interpreter detects races, fills fresh memory with NaN and runs a copy only when somebody waits for it, so that a
forgotten wait gives NaN here instead of the right answer by luck.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
import ragged_batch
from jax.experimental.pallas import tpu as pltpu
from kernel_batch import Shape

from pallas_kernels.ragged_paged_attention import reference, tpu, tpu_plan

INTERPRET = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
SMALL = dict(decode_blocks=tpu_plan.Blocks(1, 32, 16), chunk_blocks=tpu_plan.Blocks(16, 32, 16))
PLAIN = Shape()

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


@functools.cache
def compiled(implementation, options):
    return jax.jit(functools.partial(implementation, scale=0.2, **{k: v for k, v in options}))


def both(args, **options):
    options = tuple(sorted(options.items()))
    kernel = compiled(interpreted, options)(*args)
    return kernel, compiled(reference.attend, options)(*args)


def interpreted(*args, **options):
    return tpu.attend(*args, **options, **SMALL, interpret=INTERPRET)


def assert_same(got, expected, args, page_offset=0, **options):
    """Answers of real tokens agree, those of padding are finite, and the caches are equal bit for bit.

    In float32 both are held to float64, as closely as any order of their sums can be, and the kernel to no more than
    twice what the reference is off; else to each other.
    """
    (out, cache), (expected_out, expected_cache) = got, expected
    num_tokens = int(args[6][-1])
    is_exact = out.dtype == cache.dtype == jnp.float32
    out, expected_out = kernel_batch.float32(out), kernel_batch.float32(expected_out)
    assert np.isfinite(out).all()
    out, expected_out = out[:num_tokens], expected_out[:num_tokens]
    if is_exact and num_tokens:
        rows = ragged_batch.rows_of(*args, page_offset=page_offset)
        exact, bound = ragged_batch.dense_and_bound(*rows, scale=0.2, **options)
        error, expected_error = abs(out - exact), abs(expected_out - exact)
        assert (expected_error <= bound).all()
        assert (error <= bound).all(), f"off by {(error / bound).max():.1f} times the bound"
        assert error.max() <= 2 * expected_error.max(), (
            f"{error.max():.1e}, and the reference {expected_error.max():.1e}"
        )
    else:
        np.testing.assert_allclose(out, expected_out, atol=0.02, rtol=0.02)
    np.testing.assert_array_equal(kernel_batch.float32(cache), kernel_batch.float32(expected_cache))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_matches_reference(rows):
    args = kernel_batch.batch(PLAIN, rows, tpu.cache_shape)
    assert_same(*both(args), args)


@pytest.mark.parametrize("seed", range(6))
def test_matches_reference_on_random_batches(seed):
    args = kernel_batch.batch(PLAIN, kernel_batch.random_rows(PLAIN, seed), tpu.cache_shape, seed=seed)
    assert_same(*both(args), args)


def test_rows_share_prefix_pages():
    rows = [(40, 1), (49, 1), (60, 20), (48, 16)]
    args = kernel_batch.batch(PLAIN, rows, tpu.cache_shape, share=2)
    assert args[5][0, 1] == args[5][3, 1]
    assert_same(*both(args), args)


MIXED = [(7, 1), (50, 1), (30, 12), (0, 0), (31, 31)]
CONFIGS = {
    "window, soft cap, sinks": (PLAIN, {"window": 9, "soft_cap": 3.0, "sinks_N": (0.5, -1.0, 4.0, 0.0)}),
    "bfloat16, group 3, 3 kv heads of 64": (
        Shape(group=3, kv_heads=3, head_dim=64, dtype="bfloat16", cache_dtype="bfloat16"),
        {},
    ),
    "bfloat16, one kv head of 256, window": (
        Shape(group=4, kv_heads=1, head_dim=256, dtype="bfloat16", cache_dtype="bfloat16"),
        {"window": 20},
    ),
    "float32, no sharing, heads of 80, page 32": (Shape(group=1, head_dim=80, page_size=32, num_columns=3), {}),
    "int8 pages": (Shape(dtype="bfloat16", cache_dtype="int8"), {"k_scale": 0.05, "v_scale": 0.03}),
    "fp8 pages, heads of 96": (
        Shape(dtype="bfloat16", cache_dtype="float8_e4m3fn", head_dim=96, group=7, kv_heads=1),
        {"k_scale": 0.05, "v_scale": 0.03, "sinks_N": (0.5, -1.0, 4.0, 0.0, 1.0, 2.0, 3.0)},
    ),
}


# A page a fetch, folded by halves or more: (page size, rows).
LARGE_PAGES = {
    128: [(127, 1), (128, 1), (129, 1), (300, 1), (0, 0), (140, 20)],
    256: [(256, 1), (257, 1), (0, 0), (300, 12), (270, 20)],
}


@pytest.mark.parametrize("page_size, rows", LARGE_PAGES.items(), ids=LARGE_PAGES)
def test_large_pages(page_size, rows):
    shape = Shape(page_size=page_size, num_columns=3, num_pages=12, kv_heads=1)
    args = kernel_batch.batch(shape, rows, tpu.cache_shape)
    sizes = {f"{case}_blocks": tpu_plan.Blocks(query, page_size, 64) for case, query in [("decode", 1), ("chunk", 16)]}
    got = jax.jit(functools.partial(tpu.attend, scale=0.2, window=140, **sizes, interpret=INTERPRET))(*args)
    expected = jax.jit(functools.partial(reference.attend, scale=0.2, window=140))(*args)
    assert_same(got, expected, args, window=140)


@pytest.mark.parametrize("shape, options", CONFIGS.values(), ids=CONFIGS)
def test_matches_reference_in_every_flavour(shape, options):
    args = kernel_batch.batch(shape, MIXED, tpu.cache_shape)
    options = {k: jnp.asarray(v) if k == "sinks_N" else v for k, v in options.items()}
    got = jax.jit(functools.partial(interpreted, scale=0.2, **options))(*args)
    expected = jax.jit(functools.partial(reference.attend, scale=0.2, **options))(*args)
    assert_same(got, expected, args, **options)


def test_window_and_offset_may_be_arrays():
    """Layers that share one program differ in both; pages of other layers stay as they were."""
    q, k, v, cache, *rest = kernel_batch.batch(PLAIN, MIXED, tpu.cache_shape)
    stacked = jnp.concatenate([jnp.full_like(cache, jnp.nan), cache])

    def layer(implementation, window, offset):
        return implementation(q, k, v, stacked, *rest, scale=0.2, window=window, page_offset=offset)

    numbers = jnp.int32(17), jnp.int32(len(cache))
    got = jax.jit(functools.partial(layer, interpreted))(*numbers)
    expected = jax.jit(functools.partial(layer, reference.attend))(*numbers)
    assert_same(got, expected, (q, k, v, stacked, *rest), page_offset=len(cache), window=17)


@pytest.mark.parametrize("name, low, high", [("exp", -87, 0), ("tanh", -9, 9)])
def test_functions_are_as_exact_as_the_bound_takes_them(name, low, high):
    x = np.linspace(low, high, 1_000_003, dtype=np.float32)
    exact = getattr(np, name)(x.astype(np.float64))
    off = abs(np.asarray(jax.jit(getattr(jnp, name))(x)) - exact) / np.maximum(abs(exact), 2.0**-126)
    assert off.max() <= ragged_batch.FUNCTION * 2.0**-24


def test_weights_rounded_to_bfloat16_are_out_of_bounds(monkeypatch):
    args = kernel_batch.batch(PLAIN, MIXED, tpu.cache_shape)
    expected, softmax = compiled(reference.attend, ())(*args), reference._softmax
    rounded = lambda *args: softmax(*args).astype(jnp.bfloat16).astype(jnp.float32)
    monkeypatch.setattr(reference, "_softmax", rounded)
    got = jax.jit(functools.partial(reference.attend, scale=0.2))(*args)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_same(got, expected, args)


def test_blocks_by_formula_give_the_same_answers():
    """The sizes that a TPU would run with: compute blocks of whole lanes, one fetch for a short row."""
    args = kernel_batch.batch(PLAIN, MIXED, tpu.cache_shape)
    got = jax.jit(functools.partial(tpu.attend, scale=0.2, interpret=INTERPRET))(*args)
    assert_same(got, compiled(reference.attend, ())(*args), args)


# ---- planted errors: each is a way to be wrong that the tests above must notice ----


def _one_short(first_position, num_queries, kv_len):
    return jnp.minimum(first_position + num_queries, kv_len) - 1


def _sees_one_ahead(walk, first_position, position):
    return SEES(walk, first_position + 1, position)


def _next_page(walk, s, p):
    return PAGE(walk, s, jnp.where(p > 0, p - 1, p))


def _no_wait(*args):
    pass


SEES, PAGE = tpu._Walk.hidden, tpu.page_id
FAULTS = {
    "a length is one short": (tpu, "kv_end", _one_short, "differs"),
    "a query sees the key after it": (tpu._Walk, "hidden", _sees_one_ahead, "differs"),
    "the wrong page is read": (tpu, "page_id", _next_page, "differs or races"),
    "nobody waits for keys": (tpu, "wait_keys", _no_wait, "differs or races"),
    "nobody waits for page writes": (tpu._Walk, "wait_writes", _no_wait, "differs or races"),
    "nobody waits for answers": (tpu._Walk, "wait_answers", _no_wait, "differs or races"),
    "a stale tail is not blanked": (tpu, "is_whole", lambda begin, end, size: end == end, "differs"),
}


@pytest.mark.parametrize("owner, name, fault, noticed", FAULTS.values(), ids=FAULTS)
def test_planted_error_is_noticed(monkeypatch, owner, name, fault, noticed):
    args = kernel_batch.batch(PLAIN, MIXED, tpu.cache_shape)
    monkeypatch.setattr(owner, name, fault)
    assert what_notices(args) in noticed


def what_notices(args):
    try:
        got = jax.block_until_ready(jax.jit(functools.partial(interpreted, scale=0.2))(*args))
    except jax.errors.JaxRuntimeError as error:
        pltpu.reset_tpu_interpret_mode_state()
        assert "RACE DETECTED" in str(error)
        return "races"
    try:
        assert_same(got, compiled(reference.attend, ())(*args), args)
    except AssertionError:
        return "differs"
    return "nothing"


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
    q, k, v, cache, lens, _, cu, counts = kernel_batch.batch(PLAIN, [(1, 1)], tpu.cache_shape)
    table = jax.ShapeDtypeStruct((256, 2048), jnp.int32)
    assert "at most 120 rows or 990 pages a row, 15,840 tokens or page size 64" in tpu.refusal(q, k, cache, table)


@pytest.mark.parametrize("kv_heads, width", [(1, 2), (3, 8), (8, 16), (10, 32), (20, 48)])
def test_cache_shape_keeps_tokens_end_to_end(kv_heads, width):
    assert tpu.cache_shape(7, 16, kv_heads, 80) == (7, 16, width, 128)


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
    assert tpu_plan.vmem_bytes(blocks, q, k, cache) < tpu_plan.VMEM_BYTES
