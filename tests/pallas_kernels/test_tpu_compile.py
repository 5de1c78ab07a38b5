"""The TPU kernels compile for real chips, keep their pages in place and stay within the chip's memory."""

import functools

import absent_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_step

from pallas_kernels import latent_attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear import linear
from pallas_kernels.ragged_paged_attention import cache_shape, ragged_paged_attention, tpu_plan
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan import tpu as scan_kernel

pytestmark = pytest.mark.tpu
reason = absent_tpu.prepare()
if reason:
    pytest.skip(reason, allow_module_level=True)

LLAMA_3_8B = dict(N=32, K=8, H=128, B=128, dtype="bfloat16")
CASES = {
    "Llama-3-8B decode": dict(LLAMA_3_8B, T=64),
    "Llama-3-8B chunk": dict(LLAMA_3_8B, T=512),
    "heads of 64": dict(LLAMA_3_8B, H=64, T=64),
    "heads of 256": dict(N=8, K=4, H=256, B=128, dtype="bfloat16", T=64),
    "one of eight chips": dict(N=4, K=1, H=128, B=128, dtype="bfloat16", T=64),
    "odd heads, small pages": dict(N=9, K=3, H=64, B=16, dtype="bfloat16", T=64),
    "int8 pages": dict(LLAMA_3_8B, dtype="int8", T=64),
    "int8 pages, odd heads": dict(N=9, K=3, H=64, B=16, dtype="int8", T=64),
    "int8 pages, large": dict(N=8, K=4, H=256, B=256, dtype="int8", T=512),
    "fp8 pages, one of eight chips": dict(N=4, K=1, H=128, B=128, dtype="float8_e4m3fn", T=64),
    "fp8 pages": dict(LLAMA_3_8B, dtype="float8_e4m3fn", T=64),
    "window, soft cap, sinks, large pages": dict(LLAMA_3_8B, B=256, T=512),
}
OPTIONS = {
    "window, soft cap, sinks, large pages": dict(window=1000, soft_cap=30.0, sinks_N=np.zeros(32, np.float32)),
}


def shapes(N, K, H, B, dtype, T, P=256, S=64, M=32):
    array = jax.ShapeDtypeStruct
    return [
        *(array((T, heads, H), jnp.bfloat16) for heads in (N, K, K)),
        array(cache_shape(P, B, K, H, "tpu", dtype), jnp.dtype(dtype)),
        *(array(shape, jnp.int32) for shape in [(S,), (S, M), (S + 1,), (2,)]),
    ]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", CASES)
def test_attention_compiles_and_writes_pages_in_place(chip, name):
    case = CASES[name]
    arrays = shapes(**case)
    step = functools.partial(ragged_paged_attention, scale=0.1, **OPTIONS.get(name, {}))
    executable, _ = absent_tpu.compile_for(chip, step, arrays, donate=(3,))
    pages_bytes = int(np.prod(arrays[3].shape)) * arrays[3].dtype.itemsize
    memory = executable.memory_analysis()
    assert "tpu_custom_call" in executable.as_text()
    assert memory.alias_size_in_bytes >= pages_bytes
    assert whole_step.large_copies(executable.as_text(), pages_bytes) == []
    assert memory.temp_size_in_bytes < 2**20 + 4 * case["T"] * 32 * 256


@pytest.mark.parametrize("chip, kv_heads", [("v5e", 96), ("v5p", 48), ("v6e", 96), ("tpu7x", 48)])
@pytest.mark.parametrize("T", [64, 512], ids=["decode", "chunk"])
def test_the_most_heads_that_are_taken_fit_vector_memory(chip, kv_heads, T):
    arrays = shapes(N=kv_heads, K=kv_heads, H=256, B=128, dtype="bfloat16", T=T)
    absent_tpu.compile_for(chip, functools.partial(ragged_paged_attention, scale=0.1), arrays, donate=(3,))


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("columns", [1024, 8192])
def test_the_longest_page_table_that_is_taken_fits_scalar_memory(chip, columns):
    rows = tpu_plan.most_rows(columns)
    arrays = shapes(**CASES["Llama-3-8B decode"] | dict(T=rows, S=rows, M=columns))
    absent_tpu.compile_for(chip, functools.partial(ragged_paged_attention, scale=0.1), arrays, donate=(3,))


def test_layers_scanned_over_one_array_copy_no_pages():
    """The layout of the engine's step: stacked layers, one pool, the layer folded into the page number."""
    layers = 4
    q, k, v, cache, *rest = shapes(**CASES["Llama-3-8B decode"])

    def step(q, k, v, cache, *rest):
        def layer(carry, i):
            x, cache = carry
            out, cache = ragged_paged_attention(x, k, v, cache, *rest, scale=0.1, page_offset=i * (256 // layers))
            return (x + out, cache), None

        return jax.lax.scan(layer, (q, cache), jnp.arange(layers))[0]

    executable, _ = absent_tpu.compile_for("v5e", step, [q, k, v, cache, *rest], donate=(3,))
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= int(np.prod(cache.shape)) * 2
    assert memory.temp_size_in_bytes < 4 * 2**20


def test_a_block_too_large_for_the_chip_is_the_compilers_error():
    """The compiler's own limit is real: what passes above was checked against it."""
    arrays = shapes(**CASES["Llama-3-8B decode"])
    huge = tpu_plan.Blocks(1, 32768, 256)

    def step(*args):
        from pallas_kernels.ragged_paged_attention import tpu

        return tpu.attend(*args, scale=0.1, decode_blocks=huge)

    with pytest.raises(Exception, match="(?i)vmem|memory"):
        absent_tpu.compile_for("v5e", step, arrays, donate=(3,))


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("T", [16, 64, 512])
def test_no_int4_weight_is_written_as_floats(chip, T):
    """A gate and up of Llama-3-8B: 235 MB as bfloat16."""
    array = jax.ShapeDtypeStruct
    O, I = 14336, 4096
    groups = array((2, O, I // 32), jnp.bfloat16)
    run = lambda x, kernel, scale, offset: linear(
        x, kernel, kernel_scale=scale, kernel_offset=offset, activation="silu", implementation="tpu"
    )
    shapes = (array((T, I), jnp.bfloat16), array((2, O, I), jnp.int4), groups, groups)
    executable, _ = absent_tpu.compile_for(chip, run, shapes)
    assert executable.memory_analysis().temp_size_in_bytes < 64e6
    assert "int4_matmul" in executable.as_text()


def num_bytes(array):
    return int(np.prod(array.shape)) * array.dtype.itemsize


# experts, experts a token goes to, width, an expert's hidden width
EXPERTS = {"Mixtral-8x7B": (8, 2, 4096, 14336), "DeepSeek-V2-Lite": (64, 6, 2048, 1408)}


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("num_tokens", [64, 512])
@pytest.mark.parametrize("E, top, I, O", EXPERTS.values(), ids=EXPERTS)
def test_experts_are_multiplied_where_they_lie(chip, num_tokens, E, top, I, O):
    """The three products of a layer's experts, by megablox."""
    array = jax.ShapeDtypeStruct

    def layer(x_TI, gate_EOI, up_EOI, down_EIO, sizes_E):
        hidden = jax.nn.silu(grouped_matmul(x_TI, gate_EOI, sizes_E)) * grouped_matmul(x_TI, up_EOI, sizes_E)
        return grouped_matmul(hidden.astype(x_TI.dtype), down_EIO, sizes_E)

    arrays = [array(shape, jnp.bfloat16) for shape in [(num_tokens * top, I), (E, O, I), (E, O, I), (E, I, O)]]
    executable, _ = absent_tpu.compile_for(chip, layer, [*arrays, array((E,), jnp.int32)])
    assert executable.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert whole_step.large_copies(executable.as_text(), num_bytes(arrays[1]) // E) == []
    # Two hidden layers and one answer, in float32.
    assert executable.memory_analysis().temp_size_in_bytes < 4 * num_tokens * top * (2 * O + I) + 2**20


@pytest.mark.parametrize("chip, num_tokens", [("v5e", 64), ("v6e", 2048)])
def test_int8_experts_are_multiplied_where_they_lie(chip, num_tokens):
    """Gate and up of Qwen3-30B-A3B, among those of two layers."""
    array = jax.ShapeDtypeStruct
    E, I, F, rows = 128, 2048, 768, 8 * num_tokens

    def gate_up(x_TI, kernel, token_R, sizes_E, scale):
        options = {"token_R": token_R, "first": jnp.int32(E), "out_dtype": jnp.bfloat16}
        return grouped_matmul(x_TI, kernel, sizes_E, kernel_scale=scale, **options)

    shapes = [array((num_tokens, I), jnp.bfloat16), array((2 * E, 2, F, I), jnp.int8)]
    shapes += [array((rows,), jnp.int32), array((E,), jnp.int32), array((E, 2, F), jnp.float32)]
    executable, _ = absent_tpu.compile_for(chip, gate_up, shapes)
    assert "grouped_int8" in executable.as_text()
    assert whole_step.large_copies(executable.as_text(), F * I) == []
    # Rows as they are multiplied, what a step of each is worth in whole lanes, and answers before padding is cleared.
    assert executable.memory_analysis().temp_size_in_bytes < rows * (I + 512 + 4 * F) + 2**24


def latents(num_tokens, N=16, pages=256):
    """A step of DeepSeek-V2-Lite, or with 128 heads of DeepSeek-V3."""
    array = jax.ShapeDtypeStruct
    R, H, B, S, M = 512, 64, 128, 64, 32
    floats = [array((num_tokens, *width), jnp.bfloat16) for width in [(N, R), (N, H), (R,), (H,)]]
    cache = array(latent_attention.cache_shape(pages, B, R, H, "tpu"), jnp.bfloat16)
    return [*floats, cache, *(array(shape, jnp.int32) for shape in [(S,), (S, M), (S + 1,), (2,)])]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("num_tokens", [64, 512])
def test_latent_attention_writes_pages_in_place(chip, num_tokens):
    """Layers scanned over one array."""
    P, layers = 256, 4
    q_latent, q_rope, latent, rope, cache, *integers = latents(num_tokens, pages=P * layers)

    def step(q_latent, q_rope, latent, rope, cache, *rest):
        def layer(carry, i):
            x, cache = carry
            out, cache = latent_attention.latent_attention(
                x, q_rope, latent, rope, cache, *rest, scale=0.1, page_offset=i * P
            )
            return (x + out, cache), None

        return jax.lax.scan(layer, (q_latent, cache), jnp.arange(layers))[0]

    arrays = [q_latent, q_rope, latent, rope, cache, *integers]
    executable, _ = absent_tpu.compile_for(chip, step, arrays, donate=(4,))
    (name,) = absent_tpu.pallas_names(executable.as_text())
    assert name.startswith("latent_attention")
    assert executable.memory_analysis().alias_size_in_bytes >= num_bytes(cache)
    assert whole_step.large_copies(executable.as_text(), num_bytes(cache) // layers) == []


@pytest.mark.parametrize("chip", ["v5e", "v5p", "tpu7x"])
@pytest.mark.parametrize("num_tokens, max_q_len", [(64, 1), (4096, None)], ids=["decode", "chunk"])
def test_latent_attention_of_many_heads_fits_vector_memory(chip, num_tokens, max_q_len):
    arrays = latents(num_tokens, N=128)
    step = functools.partial(latent_attention.latent_attention, scale=0.1, max_q_len=max_q_len)
    executable, _ = absent_tpu.compile_for(chip, step, arrays, donate=(4,))
    assert len(absent_tpu.pallas_names(executable.as_text())) == 1


# channels of a layer, numbers of a channel's state
STATES = {"Mamba-2.8B": (5120, 16), "Jamba": (8192, 16)}


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("num_tokens, max_q_len", [(64, 1), (512, None)], ids=["decode", "chunk"])
@pytest.mark.parametrize("C, N", STATES.values(), ids=STATES)
def test_selective_scan_updates_states_in_place(chip, num_tokens, max_q_len, C, N):
    S = 64
    array = jax.ShapeDtypeStruct
    tokens = [array((num_tokens, width), jnp.bfloat16) for width in (C, C, N, N)]
    x, dt, b, c = tokens
    state = array((S, N, C), jnp.float32)
    arrays = [x, dt, array((N, C), jnp.float32), b, c, array((C,), jnp.float32), state]
    arrays += [array((S + 1,), jnp.int32), array((), jnp.int32)]
    step = functools.partial(selective_scan, max_q_len=max_q_len)
    executable, _ = absent_tpu.compile_for(chip, step, arrays, donate=(6,))
    memory = executable.memory_analysis()
    assert len(absent_tpu.pallas_names(executable.as_text())) == (max_q_len is None)
    assert memory.alias_size_in_bytes >= num_bytes(state)
    assert whole_step.large_copies(executable.as_text(), 2**20) == []
    assert memory.temp_size_in_bytes < 2 * 2**20  # a state of one row is half a megabyte at most, all are 20 and more


@pytest.mark.parametrize("chip, S", [("v5e", 352), ("v5p", 176)])
def test_the_most_states_that_are_taken_fit_vector_memory(chip, S):
    array = jax.ShapeDtypeStruct
    T, C, N = 512, 5120, 16
    x, state = array((T, C), jnp.bfloat16), array((S, N, C), jnp.float32)
    limit = tpu_plan.vmem_limit("TPU v5" if chip == "v5p" else "")
    assert 0.9 * limit < scan_kernel.vmem_bytes(x, x, state) < limit
    b = array((T, N), jnp.bfloat16)
    arrays = [x, x, array((N, C), jnp.float32), b, b, array((C,), jnp.float32), state]
    arrays += [array((S + 1,), jnp.int32), array((), jnp.int32)]
    executable, _ = absent_tpu.compile_for(chip, selective_scan, arrays, donate=(6,))
    assert len(absent_tpu.pallas_names(executable.as_text())) == 1
