"""The weight map: every tensor and every element is accounted for, before anything is read."""

import jax
import numpy as np
import pytest
import tiny

from converters.parts import convert
from converters.rules import ConversionError, Rule, heads, kv_heads

SHAPES = {"table": (6, 4), "layers.0.qkv": (2, 4, 3, 5), "layers.0.pair": (2, 7, 5)}
RULES = [
    Rule("embed", "table"),
    Rule("l.{i}.q", "layers.{i}.qkv", heads(2, 3), part=np.s_[:, :2]),
    Rule("l.{i}.k", "layers.{i}.qkv", kv_heads(3), part=np.s_[:, 2]),
    Rule("l.{i}.v", "layers.{i}.qkv", kv_heads(3), part=np.s_[:, 3]),
    Rule("l.{i}.gate", "layers.{i}.pair", part=(0,)),
    Rule("l.{i}.up", "layers.{i}.pair", part=(1,)),
    Rule("l.{i}.unused", None),
]
TENSORS = {"embed": (6, 4), "l.0.q": (12, 5), "l.0.k": (6, 5), "l.0.v": (6, 5), "l.0.gate": (7, 5), "l.0.up": (7, 5)}


def numbered(tensors):
    """Arrays in which each element is another number."""
    start, arrays = 0, {}
    for name, shape in tensors.items():
        arrays[name] = np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)
        start += 1000
    return arrays


def converted(tensors, shapes=SHAPES, rules=RULES, dtype=np.float32):
    structs = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
    return dict(convert(tiny.Arrays(numbered(tensors) if not callable(tensors) else tensors()), rules, structs))


def test_fused_parts_land_in_their_places():
    arrays, got = numbered(TENSORS), converted(TENSORS | {"l.0.unused": (3,)})
    np.testing.assert_array_equal(got["layers.0.qkv"][1, 0], arrays["l.0.q"][6:9])  # kv head 1, its first query head
    np.testing.assert_array_equal(got["layers.0.qkv"][1, 1], arrays["l.0.q"][9:12])
    np.testing.assert_array_equal(got["layers.0.qkv"][1, 2], arrays["l.0.k"][3:6])
    np.testing.assert_array_equal(got["layers.0.qkv"][1, 3], arrays["l.0.v"][3:6])
    np.testing.assert_array_equal(got["layers.0.pair"], np.stack([arrays["l.0.gate"], arrays["l.0.up"]]))


def test_layers_and_experts_become_first_axes():
    rules = [Rule("l.{i}.e.{e}.w", "layers.{i}.experts")]
    tensors = {f"l.{i}.e.{e}.w": (2, 3) for i in range(2) for e in range(3)}
    arrays = numbered(tensors)
    stacked = converted(tensors, {"layers.experts": (2, 3, 2, 3)}, rules)["layers.experts"]
    np.testing.assert_array_equal(stacked[1, 2], arrays["l.1.e.2.w"])
    unstacked = converted(tensors, {f"layers.{i}.experts": (3, 2, 3) for i in range(2)}, rules)
    np.testing.assert_array_equal(unstacked["layers.1.experts"], stacked[1])


WRONG = {
    "no rule": (TENSORS | {"l.0.strange": (3,)}, "no rule for tensor 'l.0.strange'"),
    "missing tensor": ({k: v for k, v in TENSORS.items() if k != "embed"}, "'table'"),
    "missing part": ({k: v for k, v in TENSORS.items() if k != "l.0.up"}, r"'layers.0.pair' got no tensor for \(1"),
    "wrong shape": (TENSORS | {"embed": (4, 6)}, r"'embed' \(4, 6\) gives \(4, 6\), but 'table' is \(6, 4\)"),
    "wrong part": (TENSORS | {"l.0.k": (5, 5)}, "'l.0.k' is .* cannot fill a part of 'layers.0.qkv'"),
    "transposed part": (TENSORS | {"l.0.up": (5, 7)}, "'l.0.up'"),
    "no such layer": (TENSORS | {"l.1.up": (7, 5)}, "'layers.1.pair', which the model lacks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case):
    tensors, says = WRONG[case]
    with pytest.raises(ConversionError, match=says):
        converted(tensors)


def test_a_part_filled_twice_is_refused():
    with pytest.raises(ConversionError, match="filled more than once, by 'embed', 'wte'"):
        converted(TENSORS | {"wte": (6, 4)}, rules=[*RULES, Rule("wte", "table")])


def test_a_layer_beyond_the_stack_is_refused():
    rules = [Rule("l.{i}.w", "layers.{i}.w")]
    with pytest.raises(ConversionError, match="'l.2.w' is number"):
        converted({f"l.{i}.w": (3,) for i in range(3)}, {"layers.w": (2, 3)}, rules)


def test_nothing_is_read_before_all_is_checked():
    class Unread(tiny.Arrays):
        def read(self, name):
            raise AssertionError("read")

    structs = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    with pytest.raises(ConversionError):
        next(convert(Unread(numbered(TENSORS | {"l.0.q": (3, 5)})), RULES, structs))


def test_values_beyond_float16_are_refused():
    huge = lambda: {"embed": np.full((6, 4), 1e6, np.float32)}
    with pytest.raises(ConversionError, match="'embed' has values beyond float16"):
        converted(huge, {"table": (6, 4)}, RULES, np.float16)
    assert converted(huge, {"table": (6, 4)}, RULES)["table"].max() == 1e6
