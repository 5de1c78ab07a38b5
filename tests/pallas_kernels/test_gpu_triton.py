"""The Triton kernel of ragged paged attention computes what the reference computes; errors planted in it are noticed.

It runs in Pallas's interpreter for any platform, which knows neither races nor copies: Triton's compiler makes those.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
import triton_interpreter
from kernel_batch import LONG, MIXED, SHARING, Shape
from planted_error import what_notices

from pallas_kernels.ragged_paged_attention import cache_shape, gpu, gpu_plan, gpu_triton, scales

SINKS = np.array((0.5, -1.0, 4.0, 0.0), np.float32)
SCALES = {"k_scale": np.float32(0.05), "v_scale": np.float32(0.03)}
BFLOAT16 = Shape(dtype="bfloat16", cache_dtype="bfloat16")
scaled_shape = functools.partial(cache_shape, platform="gpu", dtype="int8")
changed = dataclasses.replace
A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
# A window, a soft cap, sinks and another layer's pages.
EVERYTHING = dict(window=jnp.int32(9), soft_cap=3.0, sinks_N=SINKS)

# (shape, how pages are shaped, rows, options)
CASES = {
    "decodes, chunks, empty rows": (BFLOAT16, gpu.cache_shape, MIXED, {}),
    "nothing": (BFLOAT16, gpu.cache_shape, [], {}),
    "one short of a page, full, one past": (BFLOAT16, gpu.cache_shape, [(15, 1), (16, 1), (17, 1)], {}),
    "block boundaries": (BFLOAT16, gpu.cache_shape, [(63, 1), (64, 1), (65, 1)], {}),
    "shared prefix pages": (BFLOAT16, gpu.cache_shape, SHARING, {}),
    "float16, group 3, pages of 48, heads of 80": (
        Shape(dtype="float16", cache_dtype="float16", group=3, page_size=48, head_dim=80),
        gpu.cache_shape,
        MIXED,
        {},
    ),
    "float32, everything at once": (Shape(), gpu.cache_shape, MIXED, EVERYTHING),
    "heads of 256, many turns": (kernel_batch.long_shape("bfloat16", 256), gpu.cache_shape, LONG, {"max_q_len": 3}),
    "fp8": (changed(BFLOAT16, cache_dtype="float8_e4m3fn"), gpu.cache_shape, MIXED, SCALES | {"max_q_len": 31}),
    "fp8_e5m2, float16": (
        Shape(dtype="float16", cache_dtype="float8_e5m2"),
        gpu.cache_shape,
        MIXED,
        SCALES | {"max_q_len": 31},
    ),
    "int8 with scales": (changed(BFLOAT16, cache_dtype="int8"), scaled_shape, MIXED, {"max_q_len": 31}),
    "int8 with scales, float16": (
        Shape(dtype="float16", cache_dtype="int8", head_dim=64),
        scaled_shape,
        MIXED,
        {"max_q_len": 31},
    ),
    "int8, float32": (Shape(cache_dtype="int8", kv_heads=3), gpu.cache_shape, MIXED, SCALES | {"max_q_len": 31}),
}
STATIC = {"soft_cap", "max_q_len"}


@functools.cache
def compiled(static):
    return triton_interpreter.program(**dict(static))


@pytest.mark.parametrize("shape, pages, rows, options", CASES.values(), ids=CASES)
def test_matches_reference(shape, pages, rows, options):
    args = kernel_batch.batch(shape, rows, pages, share=2 if rows is SHARING else 0)
    options = dict(options)
    if "window" in options:
        args, options["page_offset"] = kernel_batch.with_another_layer(args)
    static = tuple(sorted((name, value) for name, value in options.items() if name in STATIC))
    arrays = {name: value for name, value in options.items() if name not in STATIC}
    got = compiled(static)(*args, **arrays)
    triton_interpreter.assert_same(got, args, soft_cap=options.get("soft_cap"), **arrays)


@pytest.mark.parametrize("seed", range(3))
def test_matches_reference_on_random_batches(seed):
    rows = kernel_batch.random_rows(BFLOAT16, seed)
    args = kernel_batch.batch(BFLOAT16, rows, gpu.cache_shape, seed=seed, share=seed)
    triton_interpreter.assert_same(compiled(())(*args), args)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_is_widened_to_its_value(dtype):
    every = np.arange(256, dtype=np.uint8)
    tile = gpu_triton.Tile(1, 1, None, 16, jnp.dtype(dtype), jnp.dtype("float16"), None)
    got = np.asarray(tile.widen(jnp.asarray(every)), np.float64)
    factor = gpu_triton.E4M3_FACTOR if dtype == "float8_e4m3fn" else 1
    expected = every.view(jnp.dtype(dtype)).astype(np.float64)
    is_number = np.isfinite(expected)
    np.testing.assert_array_equal(got[is_number] * factor, expected[is_number])


def lone(rows=MIXED, **changes):
    return kernel_batch.batch(changed(BFLOAT16, kv_heads=1, **changes), rows, gpu.cache_shape)


def everything():
    args, offset = kernel_batch.with_another_layer(lone())
    return args, EVERYTHING | {"sinks_N": SINKS[2:], "page_offset": offset, "max_q_len": 31}


BATCHES = {
    "bfloat16": lambda: (lone(), {"max_q_len": 31}),
    "everything": everything,
    "fp8": lambda: (lone(cache_dtype="float8_e4m3fn"), SCALES | {"max_q_len": 31}),
    "int8": lambda: (
        kernel_batch.batch(changed(BFLOAT16, cache_dtype="int8"), MIXED, scaled_shape),
        {"max_q_len": 31},
    ),
}
Tile = gpu_triton.Tile
seen, start, read, page_id, run_tiles = Tile.seen, Tile.start, Tile.read, gpu_triton.page_id, gpu._run_tiles


def sees(first=0, last=0):
    return lambda tile, token_U, first_R, last_R: seen(tile, token_U, first_R + first, last_R + last)


def reads(**changes):
    """Reads with scales of values in the place of those of keys, or what lies beyond the row's end."""

    def planted(tile, pages, cache, row, head, begin, end, token_U):
        k_UH, v_UH, *of = read(tile, pages, cache, row, head, begin, end + changes.get("beyond", 0), token_U)
        return k_UH, v_UH, *(of[::-1] if changes.get("swapped") else of)

    return planted


# error: (batch, where it is planted, what is planted)
ERRORS = {
    "a length is one short": ("bfloat16", Tile, "seen", sees(last=-1)),
    "a query sees the key after it": ("bfloat16", Tile, "seen", sees(last=1)),
    "a window is a key too wide": ("everything", Tile, "seen", sees(first=-1)),
    "a window is a key too narrow": ("everything", Tile, "seen", sees(first=1)),
    "the page before is read": (
        "bfloat16",
        gpu_triton,
        "page_id",
        lambda pages, row, p: page_id(pages, row, jnp.maximum(p - 1, 0)),
    ),
    "a stale tail is read": ("bfloat16", Tile, "read", reads(beyond=16)),
    "a sink counts in every part of the keys": ("everything", Tile, "start", lambda tile, _, *of: start(tile, 0, *of)),
    "sinks are dropped": ("everything", Tile, "start", lambda tile, _, *of: start(tile, 1, *of)),
    "fp8 is taken for smaller than it is": ("fp8", gpu_triton, "E4M3_FACTOR", 1.0),
    "scales of keys and values are swapped": ("int8", Tile, "read", reads(swapped=True)),
    "a scale is of the head beside": ("int8", scales, "BYTES", 8),
}


@pytest.mark.parametrize("batch, owner, name, fault", ERRORS.values(), ids=ERRORS)
def test_planted_error_is_noticed(monkeypatch, request, batch, owner, name, fault):
    args, options = BATCHES[batch]()
    if owner is scales:  # the kernel's own view of them alone
        owner = gpu_triton
        name, fault = "scales", type("Planted", (), {"BYTES": fault, "are_in": staticmethod(scales.are_in)})
    monkeypatch.setattr(owner, name, fault)
    run_tiles.clear_cache()
    request.addfinalizer(run_tiles.clear_cache)
    assert what_notices(triton_interpreter, args, **options) == "differs"


@pytest.mark.parametrize("batch", BATCHES)
def test_nothing_is_noticed_where_nothing_is_planted(batch):
    args, options = BATCHES[batch]()
    assert what_notices(triton_interpreter, args, **options) == "nothing"


@pytest.mark.parametrize(
    "kind, change, says",
    [
        (H100, {}, "hopper"),
        (A100, {}, "triton"),
        ("NVIDIA L4", {"cache_dtype": "float8_e4m3fn"}, "triton"),
        ("NVIDIA B200", {"page_size": 48}, "triton"),
        (H100, {"cache_dtype": "float32", "dtype": "float32"}, "triton"),
        (H100, {"cache_dtype": "int8", "dtype": "float16"}, "triton"),
        (A100, {"head_dim": 320}, "gather"),
        (A100, {"group": 65}, "gather"),
        ("Tesla V100-SXM2-16GB", {}, "gather"),
    ],
)
def test_each_gpu_has_its_kernel(kind, change, says):
    q, k, _, cache, *_ = kernel_batch.batch(changed(BFLOAT16, **change), [(1, 1)], gpu.cache_shape)
    assert gpu_plan.kernel(q, k, cache, kind) == says


def test_bytes_past_the_reach_of_tritons_offsets_are_gathered():
    """Up to 4 GiB its offsets are int32."""
    array = jax.ShapeDtypeStruct
    q, k = array((1, 8, 128), jnp.bfloat16), array((1, 4, 128), jnp.bfloat16)
    kernels = [
        gpu_plan.kernel(q, k, array((pages, 16, 8, 128), jnp.float8_e5m2), A100)
        for pages in (2**17, 2**17 + 1, 2**18 + 1)
    ]
    assert kernels == ["triton", "gather", "triton"]
