"""Errors planted into the GPU's ways of ragged paged attention are noticed."""

import dataclasses
import itertools

import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_batch import LONG, MIXED, SHARING, Shape
from planted_error import what_notices

from pallas_kernels.ragged_paged_attention import gpu, gpu_gather, gpu_hopper, gpu_narrow

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this JAX has no interpreter for Mosaic GPU kernels", allow_module_level=True)

import gpu_interpreter

Tile = gpu_hopper.Tile
changed = dataclasses.replace
SCALES = {"k_scale": np.float32(0.05), "v_scale": np.float32(0.03)}


def sees(low=0, position=0):
    """Which keys are seen, with a window's first key or the last one moved."""
    seen = Tile.seen
    return lambda tile, block, last, first, end: seen(tile, block, last + position, first + low, end)


def meets_once_of_twice(meet=gpu_hopper.meet):
    turns = itertools.cycle([True, False])
    return lambda barrier: meet(barrier) if next(turns) else None


def with_scales(attend_pages=gpu_gather.attend_pages, **order):
    """Gathering with scales replaced: by that of this name, None for 1."""

    def planted(*args, k_scale, v_scale, **options):
        scales = {"k_scale": k_scale, "v_scale": v_scale, None: None}
        return attend_pages(*args, k_scale=scales[order["k"]], v_scale=scales[order["v"]], **options)

    return planted


def runs_with_swapped_scales(*args, k_scale, v_scale, **options):
    return run_tiles(*args, k_scale=v_scale, v_scale=k_scale, **options)


def write_all_tokens(*args, write=gpu.write):
    *args, live_T, offset = args
    return write(*args, jnp.ones_like(live_T), offset)


lone = lambda shape, rows=MIXED, share=0: kernel_batch.batch(shape, rows, gpu.cache_shape, share=share)
BFLOAT16 = Shape(dtype="bfloat16", cache_dtype="bfloat16", kv_heads=1)
WIDE = kernel_batch.long_shape("bfloat16", 256)

# One kernel, for rows of up to four queries each, and one copy a block.
FEW = Shape(
    num_tokens=8, num_rows=2, num_columns=2, num_pages=6, page_size=64, head_dim=128,
    dtype="bfloat16", cache_dtype="float8_e4m3fn",
)  # fmt: skip
FEW_ROWS = [(70, 1), (66, 3)]

ONE_KERNEL = {"max_q_len": 32}  # for decodes and chunks: half as much to compile


def everything():
    args, offset = kernel_batch.with_another_layer(lone(BFLOAT16))
    sinks = np.array((4.0, -1.0), np.float32)
    return args, {"window": jnp.int32(9), "soft_cap": 3.0, "sinks_N": sinks, "page_offset": offset} | ONE_KERNEL


BATCHES = {
    "bfloat16": lambda: (lone(BFLOAT16), ONE_KERNEL),
    "shared": lambda: (lone(BFLOAT16, SHARING, share=2), ONE_KERNEL),
    "fewer rows": lambda: (kernel_batch.with_fewer_rows(lone(BFLOAT16), 3), {}),
    "two warpgroups": lambda: (lone(WIDE, LONG), {"max_q_len": 4}),
    "everything": everything,
    "gathered": lambda: (lone(Shape(cache_dtype="int8")), SCALES),
    "fp8": lambda: (lone(FEW, FEW_ROWS), SCALES | {"max_q_len": 4}),
    "int8": lambda: (
        kernel_batch.batch(changed(FEW, cache_dtype="int8"), FEW_ROWS, gpu_interpreter.scaled_shape),
        {"max_q_len": 4},
    ),
}
page_id, run_tiles, start, fold = gpu_hopper.page_id, gpu._run_tiles, Tile.start, Tile.fold
put_together = gpu_narrow.put_together
DIFFERS, RACES = {"differs"}, {"differs", "races"}
# error: (batch, where it is planted, what is planted, what notices)
ERRORS = {
    "a length is one short": ("bfloat16", Tile, "seen", sees(position=-1), DIFFERS),
    "a query sees the key after it": ("bfloat16", Tile, "seen", sees(position=1), DIFFERS),
    "the page before is read": (
        "bfloat16",
        gpu_hopper,
        "page_id",
        lambda pages, row, p: page_id(pages, row, jnp.maximum(p - 1, 0)),
        RACES,
    ),
    "a row goes on in another's page behind the shared ones": (
        "shared",
        gpu_hopper,
        "page_id",
        lambda pages, row, p: page_id(pages, jnp.where(p == 2, 0, row), p),
        RACES,
    ),
    "another layer's pages are read": (
        "everything",
        gpu_hopper,
        "page_id",
        lambda pages, row, p: page_id(pages, row, p) % BFLOAT16.num_pages,
        DIFFERS,
    ),
    "nobody waits for keys": ("bfloat16", gpu_hopper, "wait", lambda barriers, slot: None, RACES),
    "a stale tail is not blanked": ("bfloat16", gpu_hopper, "blank", lambda v_smem, begin, end: None, DIFFERS),
    "a window is a key too wide": ("everything", Tile, "seen", sees(low=-1), DIFFERS),
    "a window is a key too narrow": ("everything", Tile, "seen", sees(low=1), DIFFERS),
    "the soft cap is dropped": (
        "everything",
        Tile,
        "fold",
        lambda tile, *args, **refs: fold(changed(tile, soft_cap=None), *args, **refs),
        DIFFERS,
    ),
    "sinks are dropped": ("everything", Tile, "start", lambda tile, split, row: start(tile, 1, row), DIFFERS),
    "a sink counts in every part of the keys": (
        "everything",
        Tile,
        "start",
        lambda tile, split, row: start(tile, 0, row),
        DIFFERS,
    ),
    "a sink goes to another head": (
        "everything",
        gpu,
        "_run_tiles",
        lambda q, cache, pages, sinks, *args, **static: run_tiles(q, cache, pages, jnp.roll(sinks, 1), *args, **static),
        DIFFERS,
    ),
    "padding tokens are written": ("fewer rows", gpu, "write", write_all_tokens, DIFFERS),
    "warpgroups do not meet": ("two warpgroups", gpu_hopper, "meet", lambda barrier: None, RACES),
    "warpgroups meet once a block": ("two warpgroups", gpu_hopper, "meet", meets_once_of_twice(), RACES),
    "a warpgroup keeps its logits": (
        "two warpgroups",
        Tile,
        "sum_shares",
        lambda tile, logits, *refs: logits,
        DIFFERS,
    ),
    "gathered keys are not scaled": (
        "gathered",
        gpu_gather,
        "attend_pages",
        with_scales(k=None, v="v_scale"),
        DIFFERS,
    ),
    "gathered values are not scaled": (
        "gathered",
        gpu_gather,
        "attend_pages",
        with_scales(k="k_scale", v=None),
        DIFFERS,
    ),
    "scales of gathered pages are swapped": (
        "gathered",
        gpu_gather,
        "attend_pages",
        with_scales(k="v_scale", v="k_scale"),
        DIFFERS,
    ),
    "fp8: a length is one short": ("fp8", Tile, "seen", sees(position=-1), DIFFERS),
    "fp8: the page before is read": (
        "fp8",
        gpu_hopper,
        "page_id",
        lambda pages, row, p: page_id(pages, row, jnp.maximum(p - 1, 0)),
        RACES,
    ),
    "fp8: nobody waits for keys": ("fp8", gpu_hopper, "wait", lambda barriers, slot: None, RACES),
    "fp8: scales are swapped": ("fp8", gpu, "_run_tiles", runs_with_swapped_scales, DIFFERS),
    "int8: scales are of the head beside": (
        "int8",
        gpu_narrow,
        "put_together",
        lambda bytes_smem, number, *ends: put_together(bytes_smem, (number + 2) % 4, *ends),
        DIFFERS,
    ),
    "int8: a stale scale is not blanked": (
        "int8",
        gpu_narrow,
        "put_together",
        lambda bytes_smem, number, *ends: put_together(bytes_smem, number, -(2**30), 2**30),
        DIFFERS,
    ),
}


# Stale numbers may be infinite; whether NumPy, which the interpreter multiplies by, warns of that depends on the CPU.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("batch, owner, name, fault, noticed", ERRORS.values(), ids=ERRORS)
def test_planted_error_is_noticed(monkeypatch, request, batch, owner, name, fault, noticed):
    args, options = BATCHES[batch]()
    monkeypatch.setattr(owner, name, fault)
    run_tiles.clear_cache()
    request.addfinalizer(run_tiles.clear_cache)
    assert what_notices(gpu_interpreter, args, **options) in noticed


@pytest.mark.parametrize("batch", BATCHES)
def test_nothing_is_noticed_where_nothing_is_planted(batch):
    args, options = BATCHES[batch]()
    assert what_notices(gpu_interpreter, args, **options) == "nothing"
