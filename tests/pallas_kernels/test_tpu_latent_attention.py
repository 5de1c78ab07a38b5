"""The TPU kernel of latent attention computes what the reference does, in the Pallas TPU interpreter."""

import dataclasses
import functools
import types

import exact_attention
import jax
import jax.numpy as jnp
import kernel_batch
import numpy as np
import pytest
import tpu_interpreter
from kernel_batch import MIXED, Shape
from planted_error import what_notices
from quick_compile import quick_jit
from tpu_interpreter import INTERPRET, SCALE

from pallas_kernels import latent_attention as door
from pallas_kernels.latent_attention import cache_shape, reference, tpu, tpu_plan
from pallas_kernels.ragged_paged_attention import tpu_walk
from pallas_kernels.ragged_paged_attention.tpu_plan import Blocks

R, H, N = 128, 64, 4
SHAPES = {dtype: Shape(kv_heads=1, group=N, head_dim=R + H, dtype=dtype, cache_dtype=dtype) for dtype in
          ("float32", "bfloat16")}  # fmt: skip
in_both_dtypes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
SMALL = dict(decode_blocks=Blocks(1, 32, 16), chunk_blocks=Blocks(16, 32, 16))


@pytest.fixture(autouse=True)
def few_granules(monkeypatch):
    """Fewer are on their way at a time than a batch has."""
    monkeypatch.setattr(tpu, "IN_FLIGHT", 4)


def batch(rows, shape, seed=0):
    """The door's arrays, out of a batch of one kv head whose key is a whole entry."""
    paged = lambda P, B, K, width: (P, B, K, cache_shape(P, B, R, H, "tpu")[2])
    q, k, _, cache, *rest = kernel_batch.batch(shape, rows, paged, seed=seed)
    return q[..., :R], q[..., R:], k[:, 0, :R], k[:, 0, R:], cache[:, :, 0], *rest


def program(**static):
    return quick_jit(functools.partial(tpu.attend, scale=SCALE, interpret=INTERPRET, **(SMALL | static)))


compiled = functools.cache(program)
compiled_reference = quick_jit(functools.partial(reference.attend, scale=SCALE))


def assert_same(got, args, page_offset=0):
    """Answers and cache are right; a padding token keeps its query."""
    (out, cache), (expected_out, expected_cache) = got, compiled_reference(*args, page_offset=page_offset)
    out, cache, expected_out, expected_cache = (
        np.asarray(x, np.float32) for x in (out, cache, expected_out, expected_cache)
    )
    np.testing.assert_array_equal(cache, expected_cache)
    q_latent, q_rope, *_, lens, table, cu, counts = (np.asarray(x) for x in args)
    num_tokens = cu[counts[1]]
    np.testing.assert_array_equal(out[num_tokens:], np.asarray(q_latent, np.float32)[num_tokens:])
    if num_tokens:
        histories, queries = [], []
        for s in range(counts[1]):
            pages = table[s, : -(-lens[s] // cache.shape[1])] + page_offset
            entries = cache[pages].reshape(-1, 1, cache.shape[2])[: lens[s], :, : R + H]
            histories.append((entries, entries[..., :R]))
            queries.append(np.concatenate([q_latent, q_rope], axis=2)[cu[s] : cu[s + 1]])
        dtype = args[4].dtype
        rounded = exact_attention.Rounded(weights=dtype, answers=dtype)
        exact_attention.assert_answers(
            out[:num_tokens], expected_out[:num_tokens], (histories, queries), rounded=rounded, scale=SCALE
        )


# (tokens in the cache, of which new), decodes first
ROWS = {
    "nothing": [],
    "granule and block boundaries": [(1, 1), (16, 1), (17, 1), (32, 1), (33, 1), (65, 1)],
    "decodes, chunks and an empty row": MIXED,
    "empty rows between": [(9, 1), (20, 0), (18, 18), (4, 0), (33, 7)],
}


@in_both_dtypes
def test_matches_reference(shape, subtests):
    """Its pages lie behind those of another layer, which nobody may read."""
    batches = {name: batch(rows, shape) for name, rows in ROWS.items()}
    batches["random"] = batch(kernel_batch.random_rows(shape, 0), shape)
    batches["rows past the count"] = kernel_batch.with_fewer_rows(batch(MIXED, shape), 4)
    for name, args in batches.items():
        with subtests.test(name):
            args, offset = with_another_layer(args)
            assert_same(compiled()(*args, page_offset=offset), args, offset)


def with_another_layer(args):
    cache = jnp.concatenate([jnp.full_like(args[4], jnp.nan), args[4]])
    return (*args[:4], cache, *args[5:]), jnp.int32(len(args[4]))


DECODES = [(7, 1), (50, 1), (4, 0), (16, 1)]


def test_where_all_rows_decode_no_part_for_chunks_is_needed():
    """An empty row does not hide the one behind it."""
    args = batch(DECODES, SHAPES["bfloat16"])
    assert args[-1][0] == 2
    assert_same(compiled(max_q_len=1)(*args), args)


def test_heads_in_groups_and_blocks_by_formula(monkeypatch):
    monkeypatch.setattr(tpu_plan, "MOST_GROUP", 3)
    assert tpu_plan.heads_of_group(N, "chunk") == 2
    args = batch(MIXED, SHAPES["bfloat16"])
    assert_same(program(decode_blocks=None, chunk_blocks=None)(*args), args)


# ---- planted errors ----

_Walk, _Writer = tpu._Walk, tpu._Writer
kv_end, page_id = tpu_walk.kv_end, tpu.page_id
changed = dataclasses.replace


class Shifted:
    """Numbers as they lie, all of them one more."""

    def __init__(self, numbers):
        self.numbers, self.shape = numbers, numbers.shape

    def __getitem__(self, i):
        return self.numbers[i] + 1


def another_page(kind, change):
    """Which page is meant, changed for walks or for the writer."""
    return lambda walk, s, p: page_id(walk, s, change(p) if isinstance(walk, kind) else p)


def without_wait(which, wait=_Writer.wait):
    return lambda walk, sems, slot: None if sems is getattr(walk, which) else wait(walk, sems, slot)


def forget(walk, s, g, slot, change=_Writer.change):
    walk.granules[slot] = jnp.zeros_like(walk.granules[slot])
    change(walk, s, g, slot)


class OneLonger(_Writer):
    """A writer that takes one token more of each row; where its past ends stays what it was."""

    def past_len(self, s):
        return super().past_len(s) - 1


def write_past_the_end(walk, s, g, slot, change=_Writer.change):
    fields = {field.name: getattr(walk, field.name) for field in dataclasses.fields(walk)}
    change(OneLonger(**fields | {"kv_lens": Shifted(walk.kv_lens)}), s, g, slot)


def send_past_the_end(walk, s, qb, slot, send=_Walk.send_answers):
    fields = {field.name: getattr(walk, field.name) for field in dataclasses.fields(walk)}
    send(type("_Longer", (_Walk,), {"q_len": lambda walk, s: jnp.int32(2**20)})(**fields), s, qb, slot)


def write_all_rows(new, rows, num_rows, write=tpu.write_pages):
    write(new, rows, jnp.int32(rows["kv_lens"].shape[0]))


def no_wait(*args):
    pass


BATCHES = {
    "float32": lambda: (batch(MIXED, SHAPES["float32"]), {}),
    "decodes": lambda: (batch(DECODES, SHAPES["bfloat16"]), {"max_q_len": 1}),
    "fewer rows": lambda: (
        kernel_batch.with_fewer_rows(batch(DECODES, SHAPES["bfloat16"]), 2),
        {"max_q_len": 1},
    ),
}
INTERPRETED = types.SimpleNamespace(
    program=lambda max_q_len, soft_cap: program(max_q_len=max_q_len),
    assert_same=lambda got, args, soft_cap: assert_same(got, args),
    reset=tpu_interpreter.reset,
)
DIFFERS, RACES = {"differs"}, {"differs", "races"}
slow = pytest.mark.slow
# error: (batch, where it is planted, what is planted, what notices)
ERRORS = {
    "a length is one short": ("decodes", tpu_walk, "kv_end", lambda *args: kv_end(*args) - 1, DIFFERS),
    "a query sees the key after it": (
        "float32",
        _Walk,
        "hidden",
        lambda walk, first, position, hidden=_Walk.hidden: hidden(walk, first + 1, position),
        DIFFERS,
    ),
    "the page before is read": (
        "decodes",
        tpu,
        "page_id",
        another_page(_Walk, lambda p: jnp.maximum(p - 1, 0)),
        RACES,
    ),
    "the page before is written": (
        "decodes",
        tpu,
        "page_id",
        another_page(_Writer, lambda p: jnp.maximum(p - 1, 0)),
        RACES,
    ),
    "nobody waits for pages": ("decodes", tpu_walk, "wait_keys", no_wait, RACES),
    "nobody waits for answers": ("decodes", _Walk, "wait_answers", no_wait, RACES),
    "nobody waits for granules": ("decodes", _Writer, "wait", without_wait("in_sems"), RACES),
    "nobody waits for page writes": ("decodes", _Writer, "wait", without_wait("out_sems"), RACES),
    "a stale tail is not blanked": ("decodes", tpu, "is_whole", lambda end, size: end == end, DIFFERS),
    "what a granule held is lost": ("decodes", _Writer, "change", forget, DIFFERS),
    "a granule takes the tokens after its own": (
        "float32",
        _Writer,
        "change",
        lambda walk, *args, change=_Writer.change: change(changed(walk, cu_q_lens=Shifted(walk.cu_q_lens)), *args),
        DIFFERS,
    ),
    "a row's page is written past its end": ("decodes", _Writer, "change", write_past_the_end, DIFFERS),
    "padding is answered": ("float32", _Walk, "send_answers", send_past_the_end, RACES),
    "rows past the count are written": ("fewer rows", tpu, "write_pages", write_all_rows, DIFFERS),
    "values are the end of an entry": (
        "decodes",
        _Walk,
        "head",
        lambda walk, *args, head=_Walk.head: (head(walk, *args)[0], head(walk, *args)[0][:, -R:]),
        DIFFERS,
    ),
    "rotary queries are left out": (
        "decodes",
        _Walk,
        "query_copies",
        lambda walk, *args, copies=_Walk.query_copies: copies(walk, *args)[:1],
        RACES,
    ),
}
AMONG_THE_FAST = {"nobody waits for page writes"}


@pytest.mark.parametrize(
    "batch, owner, name, fault, noticed",
    [pytest.param(*case, id=error, marks=[] if error in AMONG_THE_FAST else slow) for error, case in ERRORS.items()],
)
def test_planted_error_is_noticed(monkeypatch, batch, owner, name, fault, noticed):
    args, options = BATCHES[batch]()
    monkeypatch.setattr(owner, name, fault)
    assert what_notices(INTERPRETED, args, **options) in noticed


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_nothing_is_noticed_where_nothing_is_planted(batch):
    args, options = BATCHES[batch]()
    assert what_notices(INTERPRETED, args, **options) == "nothing"


# ---- refusals and sizes ----


def shapes(N=16, R=512, H=64, B=128, T=64, S=64, M=32, dtype="bfloat16", cache_dtype="bfloat16"):
    array = jax.ShapeDtypeStruct
    cache = array(cache_shape(8, B, R, H, "tpu"), jnp.dtype(cache_dtype))
    return array((T, N, R), jnp.dtype(dtype)), array((T, N, H), jnp.dtype(dtype)), cache, array((S, M), jnp.int32)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(R=192), "pad them to 256"),
        (dict(B=48), "use 32"),
        (dict(cache_dtype="float8_e4m3fn"), "use bfloat16"),
        (dict(dtype="float16", cache_dtype="float16"), "use bfloat16"),
        (dict(S=4096, M=2048), "scalar memory"),
        (dict(N=128, T=65536), "use fewer tokens a step"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(monkeypatch, change, says):
    arrays = shapes(**change)
    assert says in tpu_plan.refusal(*arrays, "TPU v5 lite")
    monkeypatch.setattr(door, "current_platform", lambda: "tpu")
    monkeypatch.setattr(door, "current_device_kind", lambda: "TPU v5 lite")
    assert door._fastest(*arrays) == "reference" and door._fastest(*shapes()) == "tpu"


def test_refuses_a_cache_of_another_width():
    q_latent, q_rope, cache, table = shapes()
    narrow = jax.ShapeDtypeStruct((*cache.shape[:2], 576), cache.dtype)
    assert "allocate it by cache_shape" in tpu_plan.refusal(q_latent, q_rope, narrow, table, "TPU v5 lite")


@pytest.mark.parametrize("num_heads", [1, 16, 24, 128])
@pytest.mark.parametrize("page_size, columns", [(16, 4), (128, 64), (256, 1)])
def test_blocks_divide_each_other_and_fit_the_chip(num_heads, page_size, columns):
    q_latent, _, cache, _ = shapes(N=num_heads, B=page_size, T=2048)
    for case in ("decode", "chunk"):
        blocks = tpu_plan.blocks(q_latent, cache, columns, case)
        assert blocks.fetch % blocks.compute == 0 and blocks.fetch % page_size == 0
        assert blocks.query == 1 if case == "decode" else blocks.query % tpu_walk.QUERY_GROUP == 0
    assert tpu_plan.vmem_bytes(q_latent, cache, columns) < tpu_plan.vmem_limit("TPU v6 lite")
