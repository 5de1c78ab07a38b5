"""Mixtures of experts with rounded weights stay as near to Hugging Face's numbers as dense models do."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from converters.checkpoint import open_checkpoint
from converters.load import load_weights
from models import interface
from runtime.quantise import ROUNDINGS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Of the golden llama and qwen3, which are as small, it is 0.030 and 0.044 with int8, 0.32 and 0.30 with int4.
MOST = {"int8": 0.045, "int4": 0.35}


# The golden qwen3_moe has experts of 24 units, no whole groups for int4.
@pytest.mark.parametrize("name, method", [("mixtral", "int8"), ("qwen3_moe", "int8"), ("mixtral", "int4")])
def test_rounded_experts_stay_near_transformers(name, method):
    """By each token's error beside its logits, the median: a token whose experts score alike may go to another one."""
    prompt = json.loads((GOLDEN / name / "expected.json").read_text())["prompt"]
    expected_TV = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    checkpoint = open_checkpoint(GOLDEN / name)
    graph, shapes = interface.abstract(checkpoint.model_class, checkpoint.config, jnp.float32, quantization=method)
    held = {shapes[f"layers.0.mlp.{layer}.kernel"].dtype for layer in ("gate_up", "down")}
    assert held == {jnp.dtype(method)} and shapes["layers.0.mlp.router.kernel"].dtype == jnp.float32
    weights = load_weights(checkpoint, shapes, roundings=ROUNDINGS)
    caches = tiny.empty_caches(interface.bind(graph, shapes).cache_specs())
    logits_TV = np.asarray(tiny.run(graph, weights, tiny.one_prompt(prompt), caches)[0])[: len(prompt)]
    size = lambda of_TV: np.sqrt(np.square(of_TV).mean(-1))
    error = np.median(size(logits_TV - expected_TV) / size(expected_TV))
    assert 0 < error < MOST[method]
