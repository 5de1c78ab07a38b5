"""Windows of a stacked model compile for a real TPU and copy neither pages nor weights."""

import absent_tpu
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from runtime import executables, machine, preparation
from runtime.config import EngineConfig, Memory, settle

pytestmark = pytest.mark.tpu
reason = absent_tpu.prepare()
if reason:
    pytest.skip(reason, allow_module_level=True)

VOCAB, GIB = 1024, 2**30


@pytest.mark.parametrize("speculation", [None, {"num_speculative_tokens": 3}], ids=["plain", "drafting"])
def test_a_window_copies_neither_pages_nor_weights(speculation):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "vocab_size": VOCAB}
    model = tiny.Tiny("llama", dtype=jnp.bfloat16, stacked=True, **sizes)
    wishes = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 64, "max_model_len": 512}
    plan = settle(
        EngineConfig(model="", speculative_config=speculation, **wishes),
        platform="tpu",
        memory=Memory(GIB, GIB),
        vocab_size=VOCAB,
        model_max_len=512,
        weight_bytes=1,
        token_bytes=1,
        dtype="bfloat16",
    )
    assert plan.max_decode_steps == 8
    target = machine.absent("v5e-1")
    layout = preparation.Layout(model.config, list(target.devices), None, {})
    caches = preparation.cache_shapes(model.cache_specs, plan)
    programs = preparation.programs_for(model.graph, model.weights, plan, caches, layout)
    (program,) = (p for key, p in programs.items() if str(key).startswith("decode"))
    executable = executables.compiled(program, target, layout.devices)
    memory = executable.memory_analysis()
    (pages,) = caches
    page_bytes = int(np.prod(pages.shape)) * pages.dtype.itemsize
    weight_bytes = sum(array.nbytes for array in model.weights.values())
    assert memory.alias_size_in_bytes >= page_bytes
    assert memory.temp_size_in_bytes < 8 * 2**20 < min(page_bytes, weight_bytes)
