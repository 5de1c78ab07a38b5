"""The floors of a step's time, against the arithmetic by hand; and what is known of chips."""

import types

import jax
import jax.numpy as jnp
import pytest
from published import CONFIGS

from converters.families import family_of
from converters.fields import Fields
from models.interface import abstract
from runtime import chips
from runtime.errors import ConfigError
from runtime.preparation import Layout
from runtime.roofline import floor

LAYERS = 6_979_588_096  # parameters of Llama-3-8B's products; the head and the token table have 525,336,576 each
HEAD = 128_256 * 4096
KV_BYTES = 2 * 32 * 8 * 128 * 2  # a token's keys and values


@pytest.fixture(scope="module")
def llama():
    fields = Fields(CONFIGS["Llama-3-8B"])
    family = family_of(fields)
    _, shapes = abstract(family.model_class, family.config(fields), jnp.bfloat16, stacked=True)
    plan = types.SimpleNamespace(page_bytes=128 * KV_BYTES, page_size=128, quantization=None, dtype="bfloat16")
    layout = Layout(family.config(fields), jax.devices()[:1], None, {})
    return types.SimpleNamespace(plan=plan, layout=layout, shapes=shapes)


def test_a_decode_step_reads_all_weights_but_the_token_table_and_every_rows_past(llama):
    found = floor(llama, chips.CHIPS["v6e"], num_tokens=64, num_rows=64, context=1024)
    assert found.memory_s == pytest.approx((2 * (LAYERS + HEAD) + 64 * 1024 * KV_BYTES) / 1640e9, rel=1e-3)
    assert found.compute_s == pytest.approx(2 * 64 * (LAYERS + HEAD) / 918e12, rel=1e-3)
    assert found.bound == "memory" and found.seconds == found.memory_s


def test_a_chunk_multiplies_each_token_with_the_layers_and_one_with_the_head(llama):
    found = floor(llama, chips.CHIPS["v5e"], num_tokens=2048, num_rows=1, context=0)
    assert found.compute_s == pytest.approx(2 * (2048 * LAYERS + HEAD) / 197e12, rel=1e-3)
    assert found.bound == "compute" and found.seconds == found.compute_s


def test_few_tokens_read_few_experts_and_each_multiplies_its_own():
    fields = Fields(CONFIGS["Qwen3-30B-A3B"])
    family = family_of(fields)
    config = family.config(fields)
    _, shapes = abstract(family.model_class, config, jnp.bfloat16, stacked=True)
    plan = types.SimpleNamespace(page_bytes=0, page_size=128, quantization=None, dtype="bfloat16")
    prepared = types.SimpleNamespace(plan=plan, layout=Layout(config, jax.devices()[:1], None, {}), shapes=shapes)
    expert, others = 48 * 3 * 2048 * 768, 48 * (2048 * 128 + 2 * 2048 * (36 + 4) * 128) + 151_936 * 2048
    others -= 48 * 2048 * 8 * 128  # what o does not have of the 32 + 2 * 4 heads
    one = floor(prepared, chips.CHIPS["v6e"], num_tokens=1, num_rows=1, context=0)
    assert one.memory_s == pytest.approx(2 * (8 * expert + others) / 1640e9, rel=1e-3)
    assert one.compute_s == pytest.approx(2 * (8 * expert + others) / 918e12, rel=1e-3)
    many = floor(prepared, chips.CHIPS["v6e"], num_tokens=64, num_rows=64, context=0)
    assert many.memory_s == pytest.approx(2 * (128 * (1 - (15 / 16) ** 64) * expert + others) / 1640e9, rel=1e-3)


def test_targets_count_what_google_counts():
    assert chips.named("v6e-8") == (chips.CHIPS["v6e"], 8)
    assert chips.named("v5litepod-4")[0].name == "v5e" and chips.named("V6E-1")[1] == 1
    assert chips.named("v5p-8")[0].counts[8] == "2x2x1"  # of TensorCores, two a chip
    assert chips.of_kind("TPU v6 lite").name == "v6e" and chips.of_kind("cpu") is None
    with pytest.raises(ConfigError, match="did you mean h100-8"):
        chips.named("h100-16")
