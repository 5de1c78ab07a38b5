"""Errors planted into the TPU kernel of ragged paged attention are noticed."""

import dataclasses
import functools

import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
import tpu_interpreter
from kernel_batch import MIXED, SHARING, Shape
from planted_error import what_notices

from pallas_kernels.ragged_paged_attention import tpu, tpu_walk

_Walk, _ScaleWriter = tpu._Walk, tpu._ScaleWriter
changed = dataclasses.replace


def as_if(walk, **methods):
    """The walk with other methods."""
    fields = {field.name: getattr(walk, field.name) for field in dataclasses.fields(walk)}
    return type("_AsIf", (_Walk,), methods)(**fields)


def sees_ahead(walk, first_position, position, hidden=_Walk.hidden):
    return hidden(walk, first_position + 1, position)


def no_wait(*args):
    pass


def window_off_by(by):
    def hidden(walk, first_position, position, hidden=_Walk.hidden):
        return hidden(changed(walk, settings=[walk.settings[0] + by]), first_position, position)

    return hidden


def visible_from_the_next_page(walk, s, qb, visible=_Walk.visible):
    begin, end = visible(walk, s, qb)
    return jnp.minimum(begin + walk.page_size, (end - 1) // walk.page_size * walk.page_size), end


class AHeadFurther:
    """Sinks as they lie, read one head too far."""

    def __init__(self, sinks):
        self.sinks = sinks

    def __getitem__(self, heads):
        return jnp.roll(self.sinks[...], -1, axis=0)[heads]


def with_scales(method, order):
    """The method with scales replaced: by those at these places, None for 1."""

    def planted(walk, *args):
        scales = [jnp.float32(1) if i is None else walk.numbers[i] for i in order]
        return method(changed(walk, numbers=scales), *args)

    return planted


def write_past_the_end(walk, s, write=_Walk.write_pages):
    lens = walk.kv_lens
    longer = type("Longer", (), {"__getitem__": lambda _, s: lens[s] + 1, "shape": lens.shape})()
    write(as_if(changed(walk, kv_lens=longer), q_len=lambda walk, s: _Walk.q_len(walk, s) + 1), s)


def send_past_the_end(walk, s, qb, slot, send=_Walk.send_answers):
    send(as_if(walk, q_len=lambda walk, s: jnp.int32(2**20)), s, qb, slot)


def walk_all_rows(blocks, first, last, walk_case=tpu._walk_case, **kwargs):
    is_chunk = blocks.query > 1
    walk_case(blocks, first, jnp.int32(kwargs["kv_lens"].shape[0]) if is_chunk else last, **kwargs)


def scaled_from(by):
    """Scales of kv heads that are so many heads further."""
    return lambda walk, k, scales=_Walk.scales: scales(walk, (k + by) % walk.K)


def forget_scales(walk, s, g, slot, change=_ScaleWriter.change):
    walk.granules[slot] = jnp.zeros_like(walk.granules[slot])
    change(walk, s, g, slot)


FLOAT32 = Shape()
BFLOAT16, FP8 = (Shape(dtype="bfloat16", cache_dtype=dtype, kv_heads=1) for dtype in ("bfloat16", "float8_e4m3fn"))
INT8 = Shape(dtype="bfloat16", cache_dtype="int8")
SCALES = {"k_scale": np.float32(0.05), "v_scale": np.float32(0.03)}


def lone(shape, rows=MIXED, share=0):
    cache_shape = functools.partial(tpu.cache_shape, dtype=shape.cache_dtype)
    return kernel_batch.batch(shape, rows, cache_shape, share=share)


def everything():
    args, offset = kernel_batch.with_another_layer(lone(BFLOAT16))
    sinks = np.array((4.0, -1.0), np.float32)
    return args, {"window": jnp.int32(9), "soft_cap": 3.0, "sinks_N": sinks, "page_offset": offset}


BATCHES = {
    "float32": lambda: (lone(FLOAT32), {}),
    "bfloat16": lambda: (lone(BFLOAT16), {}),
    "shared": lambda: (lone(BFLOAT16, SHARING, share=2), {}),
    "fewer rows": lambda: (kernel_batch.with_fewer_rows(lone(BFLOAT16), 3), {}),
    "fp8": lambda: (lone(FP8), SCALES),
    "int8": lambda: (lone(INT8, SHARING, share=2), {}),
    "everything": everything,
}


kv_end, page_id = tpu_walk.kv_end, tpu.page_id
DIFFERS, RACES = {"differs"}, {"differs", "races"}
# error: (batch, where it is planted, what is planted, what notices)
ERRORS = {
    "a length is one short": ("float32", tpu_walk, "kv_end", lambda *args: kv_end(*args) - 1, DIFFERS),
    "a length is one short, bfloat16": ("bfloat16", tpu_walk, "kv_end", lambda *args: kv_end(*args) - 1, DIFFERS),
    "a query sees the key after it": ("float32", _Walk, "hidden", sees_ahead, DIFFERS),
    "a query sees the key after it, bfloat16": ("bfloat16", _Walk, "hidden", sees_ahead, DIFFERS),
    "the page before is read": (
        "float32",
        tpu,
        "page_id",
        lambda walk, s, p: page_id(walk, s, jnp.maximum(p - 1, 0)),
        RACES,
    ),
    "a row goes on in another's page behind the shared ones": (
        "shared",
        tpu,
        "page_id",
        lambda walk, s, p: page_id(walk, jnp.where(p == 2, 0, s), p),
        RACES,
    ),
    "another layer's pages are read": (
        "everything",
        tpu,
        "page_id",
        lambda walk, s, p: walk.table[s * walk.M + p],
        DIFFERS,
    ),
    "nobody waits for keys": ("float32", tpu_walk, "wait_keys", no_wait, RACES),
    "nobody waits for page writes": ("float32", _Walk, "wait_writes", no_wait, RACES),
    "nobody waits for answers": ("float32", _Walk, "wait_answers", no_wait, RACES),
    "a stale tail is not blanked": ("float32", tpu, "is_whole", lambda begin, end, size: end == end, DIFFERS),
    "a window is a key too wide": ("everything", _Walk, "hidden", window_off_by(1), DIFFERS),
    "a window is a key too narrow": ("everything", _Walk, "hidden", window_off_by(-1), DIFFERS),
    "a window's first page is skipped": ("everything", _Walk, "visible", visible_from_the_next_page, DIFFERS),
    "the soft cap is dropped": (
        "everything",
        _Walk,
        "fold_head",
        lambda walk, *args, fold=_Walk.fold_head: fold(changed(walk, soft_cap=None), *args),
        DIFFERS,
    ),
    "sinks are dropped": (
        "everything",
        _Walk,
        "lay_out_queries",
        lambda walk, slot, lay_out=_Walk.lay_out_queries: lay_out(changed(walk, sinks=None), slot),
        DIFFERS,
    ),
    "a sink goes to another head": (
        "everything",
        _Walk,
        "lay_out_queries",
        lambda walk, slot, lay_out=_Walk.lay_out_queries: lay_out(changed(walk, sinks=AHeadFurther(walk.sinks)), slot),
        DIFFERS,
    ),
    "keys are not scaled": ("fp8", _Walk, "fold_head", with_scales(_Walk.fold_head, [None, 1]), DIFFERS),
    "values are not scaled": (
        "fp8",
        _Walk,
        "lay_out_answers",
        with_scales(_Walk.lay_out_answers, [0, None]),
        DIFFERS,
    ),
    "scales are swapped": ("fp8", _Walk, "run", with_scales(_Walk.run, [1, 0]), DIFFERS),
    "scales are of the head beside": ("int8", _Walk, "scales", scaled_from(1), DIFFERS),
    "a stale scale is not blanked": (
        "int8",
        _Walk,
        "lay_out_scales",
        lambda walk, slot, offset, begin, end, lay_out=_Walk.lay_out_scales: lay_out(
            walk, slot, offset, 0, walk.blocks.compute
        ),
        DIFFERS,
    ),
    "scales are of the token beside": (
        "int8",
        _ScaleWriter,
        "first_token",
        lambda walk, s, g, first=_ScaleWriter.first_token: first(walk, s, g) + 1,
        DIFFERS,
    ),
    "what scales a page held is lost": ("int8", _ScaleWriter, "change", forget_scales, DIFFERS),
    "nobody waits for scales on their way out": (
        "int8",
        _ScaleWriter,
        "wait",
        lambda walk, sems, slot, wait=_ScaleWriter.wait: None if sems is walk.out_sems else wait(walk, sems, slot),
        RACES,
    ),
    "nobody waits for scales of pages": (
        "int8",
        _Walk,
        "fetched",
        lambda walk, *args, fetched=_Walk.fetched: fetched(walk, *args)[:1],
        RACES,
    ),
    "a row's page is written past its end": ("bfloat16", _Walk, "write_pages", write_past_the_end, RACES),
    "padding is answered": ("bfloat16", _Walk, "send_answers", send_past_the_end, RACES),
    "rows past the count are written": ("fewer rows", tpu, "_walk_case", walk_all_rows, DIFFERS),
}


@pytest.fixture(autouse=True)
def one_walk(monkeypatch):
    """Decodes are walked as chunks: half as much to compile. Those that plant another walk have both."""

    def walk_case(blocks, first, last, *, walk_case=tpu._walk_case, **kwargs):
        if blocks.query > 1:
            walk_case(blocks, 0, last, **kwargs)

    monkeypatch.setattr(tpu, "_walk_case", walk_case)


@pytest.mark.parametrize("batch, owner, name, fault, noticed", ERRORS.values(), ids=ERRORS)
def test_planted_error_is_noticed(monkeypatch, batch, owner, name, fault, noticed):
    args, options = BATCHES[batch]()
    monkeypatch.setattr(owner, name, fault)
    assert what_notices(tpu_interpreter, args, **options) in noticed


@pytest.mark.parametrize("batch", BATCHES)
def test_nothing_is_noticed_where_nothing_is_planted(batch):
    args, options = BATCHES[batch]()
    assert what_notices(tpu_interpreter, args, **options) == "nothing"
