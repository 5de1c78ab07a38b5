"""Engines whose weights, or keys and values, are rounded: the engine's promises hold, and little is lost."""

import dataclasses

import numpy as np
import pytest
import tiny

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.params import SamplingParams
from runtime.request import Prompt

pytestmark = pytest.mark.usefixtures("fully_compiled")

# Scales beside keys and none; layers in a list and stacked; groups of 32 inputs and of 16.
KINDS = {
    "float": {},
    "int4, int8 kv": {"quantization": "int4", "kv_cache_dtype": "int8"},
    "fp8 kv, stacked": {"kv_cache_dtype": "fp8", "stacked": True},
}
ROUNDED = [kind for kind in KINDS if kind != "float"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
SEEDED = SamplingParams(temperature=1.0, seed=11, top_p=0.9, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = str(tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model"), head_dim=32))
    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "block_size": 4, "num_gpu_blocks_override": 512}
    sizes["speculative_config"] = {"num_speculative_tokens": 0}
    loaded = {}

    def load(kind):
        if kind not in loaded:
            loaded[kind] = Engine.load(
                EngineConfig(model=folder, dtype="float32", cache_dir="", **sizes, **KINDS[kind])
            )
        loaded[kind].reset_prefix_cache()
        return loaded[kind]

    return load


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(8, 300, length).tolist()


def run(engine, requests):
    """The tokens of each request, and the log probabilities of the first one's."""
    for i, (ids, params) in enumerate(requests):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    tokens, logprobs = {}, []
    while engine.has_work:
        for gain in engine.step():
            if gain.error:
                raise gain.error
            tokens.setdefault(int(gain.choice.key), []).extend(gain.token_ids)
            logprobs += [entry.logprob for entry in gain.logprobs if gain.choice.key == "0"]
    return tokens, logprobs


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", ROUNDED)
def test_tokens_are_the_same_alone_batched_cut_found_and_preempted(engines, kind, params):
    engine = engines(kind)
    alone = run(engine, [(prompt(60), params)])[0][0]
    assert run(engine, [(prompt(60), params)])[0][0] == alone, "the prefix cache"
    others = [(prompt(n, seed=n), params) for n in range(3, 40, 6)]
    engine.reset_prefix_cache()
    assert run(engine, [(prompt(60), params), *others])[0][0] == alone, "a batch"
    engine.reset_prefix_cache()
    engine.scheduler.max_num_batched_tokens = 23
    try:
        assert run(engine, [(prompt(60), params)])[0][0] == alone, "chunks"
    finally:
        engine.scheduler.max_num_batched_tokens = 64
    requests = [(prompt(30, seed), dataclasses.replace(params, seed=seed)) for seed in range(6)]
    engine.reset_prefix_cache()
    roomy, _ = run(engine, requests)
    engine.reset_prefix_cache()
    pool = engine.scheduler.pool
    hidden = pool.take(pool.num_available - 45)
    before = engine.scheduler.num_preemptions
    tight, _ = run(engine, requests)
    pool.release(hidden)
    assert engine.scheduler.num_preemptions > before and tight == roomy, "preemption"
    assert engine.num_recompiles == 0


@pytest.mark.parametrize("kind, most", [("fp8 kv, stacked", 0.15), ("int4, int8 kv", 0.5)], ids=str)
def test_log_probabilities_stay_near_the_floats(engines, kind, most):
    (_, exact), (_, rounded) = (run(engines(name), [(prompt(60), GREEDY)]) for name in ("float", kind))
    assert 0 < abs(exact[0] - rounded[0]) < most


def test_what_is_rounded_takes_less_memory(engines):
    plans = {kind: engines(kind).plan for kind in KINDS}
    exact, vectors = plans["float"].page_bytes, 2 * 2
    assert plans["int4, int8 kv"].page_bytes == exact * (vectors + 1) // vectors // 4  # a vector holds the scales
    assert plans["fp8 kv, stacked"].page_bytes == exact // 4
    # The vocabulary's two tables are a byte an element, and groups of 16 have a scale and an offset for 8 bytes.
    assert plans["int4, int8 kv"].weight_bytes < 0.24 * plans["float"].weight_bytes
    weights = engines("int4, int8 kv").loaded.weights
    held = sum(array.addressable_shards[0].data.on_device_size_in_bytes() for array in weights.values())
    assert held == pytest.approx(plans["int4, int8 kv"].weight_bytes, rel=0.01)
    assert weights["layers.0.mlp.down.kernel"].dtype == "int4" and weights["lm_head.kernel"].dtype == "int8"
