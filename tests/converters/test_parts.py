"""Any part of a parameter is what the whole has there, and no more is read for it than it needs."""

import random

import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_gguf

from converters import parts
from converters.checkpoint import open_checkpoint
from converters.parts import boxes, convert, empty, fill
from converters.rules import ConversionError, Rule, heads, kv_heads, match_tensors
from models import interface


class Counted:
    """A source that counts the elements it is asked for."""

    def __init__(self, source):
        self.source, self.tensors, self.num_read = source, source.tensors, 0

    def read(self, name, rows=None):
        found = self.source.read(name, rows)
        self.num_read += found.size
        return found


def every_part(checkpoint, stacked, monkeypatch, block_bytes=256):
    """{name: (the whole, [(box, that part)])} with boxes at random, read in small blocks."""
    monkeypatch.setattr(parts, "BLOCK_BYTES", block_bytes)
    chance = random.Random(0)
    _, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, "float32", stacked)
    pieces = match_tensors(checkpoint.source.tensors, checkpoint.rules, shapes)
    for name, whole in convert(checkpoint.source, checkpoint.rules, shapes):
        for _ in range(4):
            box = []
            for size in whole.shape:
                start = chance.randrange(size)
                box.append(slice(start, chance.randint(start + 1, size)))
            part = np.full([side.stop - side.start for side in box], np.nan, np.float32)
            fill(part, checkpoint.source, pieces[name], tuple(box))
            np.testing.assert_array_equal(part, whole[tuple(box)], err_msg=f"{name} {box}")


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", ["llama_biased", "qwen2", "gemma3", "qwen3_moe"])
def test_a_part_is_what_the_whole_has_there(family, stacked, tmp_path, monkeypatch):
    every_part(open_checkpoint(tiny.make_checkpoint(family, tmp_path, shards=2)), stacked, monkeypatch)


@pytest.mark.parametrize("family, kind", [("llama", "F32"), ("gemma3", "F32"), ("qwen3", "Q8_0")])
def test_a_part_of_a_gguf_too(family, kind, tmp_path, monkeypatch):
    """Where heads are permuted, scales are off by one, or rows are blocks."""
    changes = dict(hidden_size=64, intermediate_size=64) if kind == "Q8_0" else {}
    path = tiny_gguf.make_gguf(family, tmp_path / "a.gguf", kind=kind, **changes)
    every_part(open_checkpoint(path), False, monkeypatch)


NUM_HEADS, WIDTH = 8, 64
RULES = [
    Rule("q", "qkv", heads(2, 16), part=np.s_[:, :4]),
    Rule("k", "qkv", kv_heads(16), part=np.s_[:, 4]),
    Rule("v", "qkv", kv_heads(16), part=np.s_[:, 5]),
    Rule("o", "o"),
]


def fused():
    rng = np.random.default_rng(0)
    arrays = {"q": (128, WIDTH), "k": (32, WIDTH), "v": (32, WIDTH), "o": (WIDTH, 128)}
    source = Counted(tiny.Arrays({name: rng.normal(size=shape) for name, shape in arrays.items()}))
    return source, {"qkv": np.empty((2, 6, 16, WIDTH)), "o": np.empty((WIDTH, 128))}


def read_part(name, box, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_BYTES", 4096)
    source, shapes = fused()
    part = np.empty([side.stop - side.start for side in box])
    fill(part, source, match_tensors(source.tensors, RULES, shapes)[name], box)
    return source, part


def test_a_split_by_outputs_reads_its_rows_only(monkeypatch):
    """A kv head with its queries is a run of rows of three tensors."""
    source, part = read_part("qkv", (slice(1, 2), slice(0, 6), slice(0, 16), slice(0, WIDTH)), monkeypatch)
    assert source.num_read == part.size
    one_query, _ = read_part("qkv", (slice(0, 1), slice(2, 3), slice(0, 16), slice(0, WIDTH)), monkeypatch)
    assert one_query.num_read == 16 * WIDTH


def test_a_split_by_inputs_reads_each_row_once(monkeypatch):
    source, part = read_part("o", (slice(0, WIDTH), slice(32, 64)), monkeypatch)
    assert source.num_read == WIDTH * 128 and part.shape == (WIDTH, 32)


def test_no_read_is_larger_than_a_block(monkeypatch):
    sizes = []

    def read(self, *key):
        found = self.source.read(*key)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(Counted, "read", read)
    read_part("o", (slice(0, WIDTH), slice(0, 128)), monkeypatch)
    read_part("qkv", tuple(slice(0, size) for size in (2, 6, 16, WIDTH)), monkeypatch)
    assert max(sizes) <= 4096 and sum(sizes) == 8 * (WIDTH * 128 + 192 * WIDTH)


def test_a_change_that_is_no_view_is_done_to_the_whole_tensor():
    rules = [Rule("w", "w", lambda w: np.ascontiguousarray(w.T))]
    source = Counted(tiny.Arrays({"w": np.arange(12.0).reshape(3, 4)}))
    part = np.empty((2, 2))
    fill(part, source, match_tensors(source.tensors, rules, {"w": np.empty((4, 3))})["w"], (slice(2, 4), slice(0, 2)))
    np.testing.assert_array_equal(part, [[2, 6], [3, 7]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(dtype, bad):
    values = np.ones((3, 4), dtype)
    values[2, 1] = bad
    with pytest.raises(ConversionError, match="tensor 'w' holds values that are infinite or no numbers"):
        dict(convert(tiny.Arrays({"w": values}), [Rule("w", "w")], {"w": np.empty((3, 4), np.float32)}))


def test_the_largest_numbers_are_numbers():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        values = np.full((2,), ml_dtypes.finfo(dtype).max, dtype)
        ((_, found),) = convert(tiny.Arrays({"w": values}), [Rule("w", "w")], {"w": np.empty((2,), dtype)})
        np.testing.assert_array_equal(found, values)


def test_boxes_cover_all_once_and_are_small():
    box = (slice(3, 10), slice(0, 4), slice(5, 6))
    seen = np.zeros((10, 4, 6), int)
    for part in boxes(box, lambda sizes: np.prod(sizes) <= 3):
        seen[part] += 1
        assert seen[part].size <= 3
    assert (seen[box] == 1).all() and seen.sum() == seen[box].size


def test_arrays_are_where_a_device_of_the_host_takes_them_over():
    for shape in [(3,), (5, 7), ()]:
        assert empty(shape, np.int8).ctypes.data % parts.ALIGNMENT == 0 and empty(shape, np.float32).shape == shape
