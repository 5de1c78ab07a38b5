"""Int8 weights: close to the floats they came from, and the engine's promises hold with them."""

import numpy as np
import pytest
import tiny

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.params import SamplingParams
from runtime.quantise import to_int8
from runtime.request import Prompt

PROMPT = np.random.default_rng(0).integers(8, 90, 20).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


def test_each_output_is_rounded_by_its_largest_element():
    weights = tiny.Tiny("llama_tied").weights
    for name in ("embed.table", "layers.0.attn.qkv.kernel", "layers.1.mlp.gate_up.kernel"):
        exact = np.asarray(weights[name])
        values, scale = to_int8(exact.copy())
        assert values.dtype == np.int8 and scale.dtype == np.float32 and np.abs(values).max(-1).min() == 127
        assert (np.abs(values * scale[..., None] - exact) <= scale[..., None] * 0.5001).all()


def test_outputs_of_zeros_stay_zeros():
    values, scale = to_int8(np.zeros((2, 3), np.float32))
    assert not values.any() and (scale > 0).all()


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
    with pytest.raises(ConfigError, match="'int3' is not known; use int8"):
        EngineConfig(model="x", quantization="int3")
