"""Rounded weights: close to the floats they came from, and the engine's promises hold with int8."""

import numpy as np
import pytest
import tiny

from pallas_kernels.rotation import rotate_rows
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.params import SamplingParams
from runtime.quantise import to_int4, to_int8
from runtime.request import Prompt

PROMPT = np.random.default_rng(0).integers(8, 90, 20).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


def test_each_output_is_rounded_by_its_largest_element():
    weights = tiny.Tiny("llama_tied").weights
    for name in ("embed.table", "layers.0.attn.qkv.kernel", "layers.1.mlp.gate_up.kernel"):
        exact = rotate_rows(np.asarray(weights[name]))
        values, scale = to_int8(np.asarray(weights[name]))
        assert values.dtype == np.int8 and scale.dtype == np.float32 and np.abs(values).max(-1).min() == 127
        assert (np.abs(values * scale[..., None] - exact) <= scale[..., None] * 0.5001).all()


def test_outputs_of_zeros_stay_zeros():
    values, scale = to_int8(np.zeros((2, 3), np.float32))
    assert not values.any() and (scale > 0).all()


def as_floats(values, scales, offsets):
    """What int4 values in groups stand for."""
    groups = values.astype(np.float32).reshape(*scales.shape, -1)
    scales, offsets = (x.astype(np.float32)[..., None] for x in (scales, offsets))
    return (groups * scales + offsets).reshape(values.shape)


@pytest.mark.parametrize("num_in, groups", [(576, 18), (96, 3), (48, 3)])
def test_int4_leaves_less_error_than_the_usual_scale_in_every_group(num_in, groups):
    rows = np.random.default_rng(0).standard_t(4, (3, 50, num_in)).astype(np.float32)
    values, scales, offsets = to_int4(rows.copy())
    assert values.dtype == "int4" and values.shape == rows.shape
    for of_groups in (scales, offsets):
        assert of_groups.dtype == "bfloat16" and of_groups.shape == (3, 50, groups)
    exact = rows.reshape(3, 50, groups, -1)
    low = exact.min(-1, keepdims=True)
    usual = (exact.max(-1, keepdims=True) - low) / 15
    usual_error = np.square(np.rint((exact - low) / usual) * usual + low - exact).sum(-1)
    error = np.square(as_floats(values, scales, offsets).reshape(exact.shape) - exact).sum(-1)
    assert (error <= 1.01 * usual_error).all() and error.sum() < 0.92 * usual_error.sum()


def test_int4_holds_exactly_what_lies_on_its_steps():
    steps = np.random.default_rng(0).integers(-8, 8, (20, 64)).astype(np.float32)
    steps[:, ::32], steps[:, 1::32] = -8, 7
    rows = (steps + 3) * np.float32(2.0) ** np.arange(-10, 10)[:, None]
    np.testing.assert_array_equal(as_floats(*to_int4(rows.copy())), rows)


@pytest.mark.parametrize("value", [0.0, 1e-39, -3.0])
def test_int4_rows_of_one_value_stay_so(value):
    rows = np.full((2, 64), value, np.float32)
    np.testing.assert_allclose(as_floats(*to_int4(rows.copy())), rows, rtol=1e-6, atol=1e-38)


def test_a_layer_without_whole_groups_is_refused():
    with pytest.raises(ValueError, match="40 inputs has no whole groups of 16; use int8"):
        to_int4(np.zeros((2, 40), np.float32))


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = str(tiny.make_checkpoint("llama_tied", tmp_path_factory.mktemp("model")))
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4, "num_gpu_blocks_override": 256}
    kept = str(tmp_path_factory.mktemp("kept"))
    load = lambda **more: Engine.load(EngineConfig(model=folder, dtype="float32", **sizes, **more))
    return {
        "float": load(cache_dir=""),
        "int8": load(cache_dir=kept, quantization="int8"),
        "int8 kept": load(cache_dir=kept, quantization="int8"),
    }


def run(engine, num_others=0):
    for i in range(1 + num_others):
        engine.add(engine.prepare(str(i), Prompt(PROMPT if i == 0 else PROMPT[: 3 + i]), GREEDY))
    found = []
    while engine.has_work:
        found += [entry for gain in engine.step() if gain.choice.key == "0" for entry in gain.logprobs]
    return found


def test_int8_is_near_the_floats_and_smaller(engines):
    exact, rounded = run(engines["float"]), run(engines["int8"])
    assert abs(exact[0].logprob - rounded[0].logprob) < 0.2
    assert engines["int8"].plan.weight_bytes < 0.45 * engines["float"].plan.weight_bytes


def test_int8_tokens_do_not_depend_on_neighbours_or_restarts(engines):
    alone = [entry.token_id for entry in run(engines["int8"])]
    assert [entry.token_id for entry in run(engines["int8"], num_others=3)] == alone
    assert [entry.token_id for entry in run(engines["int8 kept"])] == alone


def test_an_unknown_quantisation_is_refused():
    with pytest.raises(ConfigError, match="'int3' is not known; use int8 or int4"):
        EngineConfig(model="x", quantization="int3")
