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
from kernel_batch import Shape

from pallas_kernels.ragged_paged_attention import gpu, gpu_plan, reference

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this JAX has no interpreter for Mosaic GPU kernels", allow_module_level=True)

INTERPRET = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
PLAIN = Shape(dtype="bfloat16", cache_dtype="bfloat16")
MIXED = [(7, 1), (50, 1), (30, 12), (0, 0), (31, 31)]
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
LONG_ROWS = [(397, 1), (512, 1), (290, 3)]  # several turns of the ring in each split
LONG = Shape(
    num_tokens=16,
    num_rows=4,
    num_columns=8,
    num_pages=24,
    page_size=64,
    kv_heads=1,
    dtype="bfloat16",
    cache_dtype="bfloat16",
)
WIDE = dataclasses.replace(LONG, head_dim=256)
ROOMY = Shape(num_pages=24, num_columns=5, dtype="bfloat16", cache_dtype="bfloat16")


@functools.cache
def compiled(implementation, splits=None):
    if implementation is reference:
        return jax.jit(functools.partial(reference.attend, scale=0.2))
    return jax.jit(functools.partial(gpu.attend, scale=0.2, splits=splits, interpret=INTERPRET))


def assert_same(got, expected, args, atol=0.02):
    """Answers of real tokens agree, those of padding are finite, and the caches are equal bit for bit."""
    num_tokens = int(args[6][-1])
    (out, cache), (expected_out, expected_cache) = jax.tree.map(kernel_batch.float32, (got, expected))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:num_tokens], expected_out[:num_tokens], atol=atol, rtol=atol)
    np.testing.assert_array_equal(cache, expected_cache)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_matches_reference(rows):
    args = kernel_batch.batch(ROOMY, rows, gpu.cache_shape)
    assert_same(compiled(gpu, 2)(*args), compiled(reference)(*args), args)


@pytest.mark.parametrize("seed", range(3))
def test_matches_reference_on_random_batches(seed):
    args = kernel_batch.batch(ROOMY, kernel_batch.random_rows(ROOMY, seed), gpu.cache_shape, seed=seed)
    assert_same(compiled(gpu, 2)(*args), compiled(reference)(*args), args)


def test_rows_share_prefix_pages():
    rows = [(40, 1), (49, 1), (60, 20), (48, 16)]
    args = kernel_batch.batch(ROOMY, rows, gpu.cache_shape, share=2)
    assert args[5][0, 1] == args[5][3, 1]
    assert_same(compiled(gpu, 2)(*args), compiled(reference)(*args), args)


CONFIGS = {
    "window, soft cap, sinks": (PLAIN, {"window": 9, "soft_cap": 3.0, "sinks_N": (0.5, -1.0, 4.0, 0.0)}),
    "float16, group 3, heads of 64, page 32": (
        Shape(group=3, head_dim=64, page_size=32, num_columns=3, dtype="float16", cache_dtype="float16"),
        {},
    ),
    "group 3, heads of 80": (dataclasses.replace(PLAIN, group=3, head_dim=80), {}),
    "heads of 96": (dataclasses.replace(PLAIN, head_dim=96), {}),
    "one kv head of 256, page 64, window": (
        Shape(group=4, kv_heads=1, head_dim=256, page_size=64, num_columns=2, dtype="bfloat16", cache_dtype="bfloat16"),
        {"window": 20},
    ),
}


@pytest.mark.parametrize("shape, options", CONFIGS.values(), ids=CONFIGS)
def test_matches_reference_in_every_flavour(shape, options):
    assert_flavour(shape, options, functools.partial(gpu.attend, interpret=INTERPRET, splits=2))


@pytest.mark.parametrize("shape", [LONG, WIDE], ids=["one warpgroup", "two"])
def test_long_rows_turn_the_ring(shape):
    args = kernel_batch.batch(shape, LONG_ROWS, gpu.cache_shape)
    assert_same(compiled(gpu, 2)(*args), compiled(reference)(*args), args)


# Pages over the 64 tokens of a block of keys, each fetched by parts: (page size, rows).
LARGE_PAGES = {
    128: [(127, 1), (128, 1), (129, 1), (300, 1), (0, 0), (140, 20)],
    256: [(256, 1), (257, 1), (0, 0), (300, 12), (270, 20)],
}


@pytest.mark.parametrize("page_size, rows", LARGE_PAGES.items(), ids=LARGE_PAGES)
def test_large_pages(page_size, rows):
    shape = dataclasses.replace(PLAIN, page_size=page_size, num_columns=3, num_pages=12, kv_heads=1)
    args = kernel_batch.batch(shape, rows, gpu.cache_shape)
    got = jax.jit(functools.partial(gpu.attend, scale=0.2, window=140, splits=2, interpret=INTERPRET))(*args)
    expected = jax.jit(functools.partial(reference.attend, scale=0.2, window=140))(*args)
    assert_same(got, expected, args)


GATHERED = {
    "int8 pages": (Shape(cache_dtype="int8"), {"k_scale": 0.05, "v_scale": 0.03}),
    "fp8 pages, window, soft cap": (
        Shape(cache_dtype="float8_e4m3fn", head_dim=96, group=3),
        {"k_scale": 0.05, "v_scale": 0.03, "window": 9, "soft_cap": 3.0},
    ),
    "float32 pages, sinks": (Shape(), {"sinks_N": (0.5, -1.0, 4.0, 0.0)}),
}


@pytest.mark.parametrize("shape, options", GATHERED.values(), ids=GATHERED)
def test_gathered_pages_match_reference(monkeypatch, shape, options):
    monkeypatch.setattr(gpu.gpu_gather, "KEYS", 32)
    monkeypatch.setattr(gpu.gpu_gather, "QUERIES", 16)
    assert_flavour(shape, options, gpu.attend, atol=1e-5)


def assert_flavour(shape, options, implementation, atol=0.02):
    args = kernel_batch.batch(shape, MIXED, gpu.cache_shape)
    options = {k: jnp.asarray(v) if k == "sinks_N" else v for k, v in options.items()}
    got = jax.jit(functools.partial(implementation, scale=0.2, **options))(*args)
    expected = jax.jit(functools.partial(reference.attend, scale=0.2, **options))(*args)
    assert_same(got, expected, args, atol=atol)


# ---- planted errors: each is a way to be wrong that the tests above must notice ----

SEEN, PAGE = gpu._Tile.seen, gpu.page_id
FAULTS = {
    "a length is one short": (gpu._Tile, "seen", lambda t, b, pos, low, end: SEEN(t, b, pos - 1, low, end)),
    "a query sees the key after it": (gpu._Tile, "seen", lambda t, b, pos, low, end: SEEN(t, b, pos + 1, low, end)),
    "the wrong page is read": (gpu, "page_id", lambda pages, row, p: PAGE(pages, row, jnp.maximum(p - 1, 0))),
    "nobody waits for keys": (gpu, "wait", lambda barriers, slot: None),
    "a stale tail is not blanked": (gpu, "blank", lambda v_smem, begin, end: None),
    "warpgroups do not meet": (gpu, "meet", lambda barrier: None),
}


@pytest.mark.parametrize("owner, name, fault", FAULTS.values(), ids=FAULTS)
def test_planted_error_is_noticed(monkeypatch, request, owner, name, fault):
    batch = (WIDE, LONG_ROWS) if name == "meet" else (PLAIN, MIXED)
    args = kernel_batch.batch(*batch, gpu.cache_shape)
    monkeypatch.setattr(owner, name, fault)
    gpu._run_tiles.clear_cache()
    request.addfinalizer(gpu._run_tiles.clear_cache)
    try:
        got = jax.block_until_ready(
            jax.jit(functools.partial(gpu.attend, scale=0.2, splits=2, interpret=INTERPRET))(*args)
        )
    except jax.errors.JaxRuntimeError as error:
        assert "RACE DETECTED" in str(error)
        reset_interpreter()
        return
    with pytest.raises(AssertionError):
        assert_same(got, compiled(reference)(*args), args)


def reset_interpreter():
    """A kernel that raised leaves the interpreter's memory behind; no public name clears it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(page_size=48), "use 32"),
        (dict(cache_dtype="int8"), "use bfloat16"),
        (dict(group=65), "65 query heads"),
        (dict(head_dim=320), "over the kernel's 256"),
    ],
)
def test_refusals_give_numbers_and_a_way_out(change, says):
    shape = Shape(**{"cache_dtype": "bfloat16"} | change)
    q, k, _, cache, *_ = kernel_batch.batch(shape, [(1, 1)], gpu.cache_shape)
    assert says in gpu_plan.kernel_refusal(q, k, cache, "NVIDIA H100 80GB HBM3")


def test_other_gpus_gather_pages():
    q, k, _, cache, *_ = kernel_batch.batch(PLAIN, [(1, 1)], gpu.cache_shape)
    assert "Hopper" in gpu_plan.kernel_refusal(q, k, cache, "NVIDIA A100-SXM4-80GB")
    assert gpu_plan.kernel_refusal(q, k, cache, "NVIDIA H100 80GB HBM3") is None


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 192, 256])
def test_pages_as_the_platform_shapes_them_are_taken(head_dim):
    q, k, _, cache, *_ = kernel_batch.batch(Shape(head_dim=head_dim, cache_dtype="bfloat16"), [(1, 1)], gpu.cache_shape)
    assert gpu_plan.kernel_refusal(q, k, cache, "NVIDIA H100 80GB HBM3") is None
