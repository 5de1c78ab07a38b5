"""Attention and experts compile for an H100 and an A100, fit shared memory and keep pages and weights in place."""

import functools

import absent_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.ragged_paged_attention import cache_shape, ragged_paged_attention, reference
from runtime.footprint import executed

pytestmark = pytest.mark.gpu
reason = absent_gpu.prepare()
if reason:
    pytest.skip(reason, allow_module_level=True)

# N, K, H, page size, dtype, tokens, whether the Mosaic kernel serves it
CASES = {
    "Llama-3-8B decode": (32, 8, 128, 16, "bfloat16", 64, True),
    "Llama-3-8B, few decodes, each split": (32, 8, 128, 16, "bfloat16", 8, True),
    "Llama-3-8B chunk, large pages": (32, 8, 128, 128, "bfloat16", 1024, True),
    "odd heads of 64": (9, 3, 64, 16, "bfloat16", 64, True),
    "heads of 256": (8, 4, 256, 32, "bfloat16", 64, True),
    "float16": (32, 8, 128, 32, "float16", 64, True),
    "fp8": (32, 8, 128, 16, "float8_e4m3fn", 64, True),
    "fp8, odd heads of 64": (9, 3, 64, 32, "float8_e4m3fn", 64, True),
    "fp8, heads of 80": (32, 8, 80, 32, "float8_e4m3fn", 64, True),
    "fp8, heads of 256": (8, 4, 256, 32, "float8_e4m3fn", 64, True),
    "int8 with scales": (32, 8, 128, 32, "int8", 64, True),
    "int8 with scales, heads of 64": (9, 3, 64, 32, "int8", 64, True),
    "int8 with scales, heads of 256": (8, 4, 256, 32, "int8", 64, True),
    "float32": (32, 8, 128, 16, "float32", 64, False),  # Triton
    "window, soft cap, sinks, large pages": (32, 8, 128, 256, "bfloat16", 1024, True),
}
OPTIONS = {
    "window, soft cap, sinks, large pages": dict(window=1000, soft_cap=30.0, sinks_N=np.zeros(32, np.float32)),
}


# Rows, kernels, experts, outputs, inputs: of Qwen3-30B-A3B and Mixtral-8x7B, decodes and chunks.
EXPERTS = {
    "64 tokens, gate and up": (512, 48 * 128, 128, 1536, 2048, "bfloat16"),
    "64 tokens, down": (512, 48 * 128, 128, 2048, 768, "bfloat16"),
    "2,048 tokens, down": (4096, 8, 8, 4096, 14336, "bfloat16"),
    "float32 answers": (4096, 8, 8, 4096, 14336, "float32"),
    "int8, 64 tokens, gate and up": (512, 48 * 128, 128, 1536, 2048, "bfloat16", "int8"),
    "int8, 2,048 tokens, down": (4096, 8, 8, 4096, 14336, "bfloat16", "int8"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_compile_and_are_not_copied(name, tmp_path):
    T, G, E, O, I, out_dtype, *rounded = EXPERTS[name]
    array = jax.ShapeDtypeStruct
    dtype = jnp.dtype(*rounded or ["bfloat16"])
    shapes = [array((T, I), jnp.bfloat16), array((G, O, I), dtype), array((E,), jnp.int32)]
    shapes += [array((E, O), jnp.float32)] if rounded else []

    def multiply(x_TI, kernel, sizes_E, scale=None):
        options = {"first": jnp.int32(0), "out_dtype": jnp.dtype(out_dtype)}
        return grouped_matmul(x_TI, kernel, sizes_E, kernel_scale=scale, **options)

    executable, _ = absent_gpu.compile_for_h100(multiply, shapes, dump=tmp_path)
    assert executable.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1
    # Rows in whole tiles, and their answers; of no expert more than that.
    assert executable.memory_analysis().temp_size_in_bytes < 3 * (T + 64 * E) * (2 * I + 4 * O)
    if absent_gpu.assembler() is None:
        return
    (kernel,) = absent_gpu.kernels(tmp_path)
    assert kernel.spilled_bytes == 0 and kernel.registers <= 128 and kernel.shared_bytes <= 227 * 1024


def attention_shapes(dtype, N, K, H, B, cache_dtype, T):
    """Of the door's arrays: 64 rows of up to 64 pages, of 256 that there are."""
    P, S, M = 256, 64, 64
    array = jax.ShapeDtypeStruct
    return [
        *(array((T, heads, H), jnp.dtype(dtype)) for heads in (N, K, K)),
        array(cache_shape(P, B, K, H, "gpu", cache_dtype), jnp.dtype(cache_dtype)),
        *(array(shape, jnp.int32) for shape in [(S,), (S, M), (S + 1,), (2,)]),
    ]


@pytest.mark.parametrize("name", CASES)
def test_attention_compiles_and_writes_pages_in_place(name, tmp_path):
    N, K, H, B, dtype, T, is_kernel = CASES[name]
    shapes = attention_shapes("bfloat16", N, K, H, B, dtype, T)
    step = functools.partial(ragged_paged_attention, scale=0.1, **OPTIONS.get(name, {}))
    executable, _ = absent_gpu.compile_for_h100(step, shapes, donate=(3,), dump=tmp_path)
    assert ("mosaic_gpu" in executable.as_text()) == is_kernel
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= int(np.prod(shapes[3].shape)) * shapes[3].dtype.itemsize
    assert memory.temp_size_in_bytes < 64 * 2**20
    if absent_gpu.assembler() is None:
        return
    kernels = absent_gpu.kernels(tmp_path)
    assert len(kernels) == (2 if is_kernel else 0)  # decodes, and rows of any length
    for kernel in kernels:
        assert kernel.spilled_bytes == 0
        assert kernel.shared_bytes <= (227 * 1024 if H == 256 else 227 * 1024 // 2)  # else two blocks a multiprocessor


# Queries' dtype, and as CASES.
ON_AN_A100 = {
    "Llama-3-8B decode": ("bfloat16", 32, 8, 128, 16, "bfloat16", 64),
    "Llama-3-8B chunk, large pages": ("bfloat16", 32, 8, 128, 128, "bfloat16", 1024),
    "odd heads of 80, pages of 48": ("float16", 9, 3, 80, 48, "float16", 64),
    "heads of 256": ("bfloat16", 8, 4, 256, 32, "bfloat16", 64),
    "float32": ("float32", 32, 8, 128, 16, "float32", 64),
    "fp8": ("bfloat16", 32, 8, 128, 16, "float8_e4m3fn", 64),
    "fp8_e5m2, float16, heads of 64": ("float16", 9, 3, 64, 32, "float8_e5m2", 64),
    "int8 with scales": ("bfloat16", 32, 8, 128, 32, "int8", 64),
    "int8 with scales, float16": ("float16", 32, 8, 128, 32, "int8", 64),
    "window, soft cap, sinks, large pages": ("bfloat16", 32, 8, 128, 256, "bfloat16", 1024),
}


@pytest.mark.parametrize("name", ON_AN_A100)
def test_attention_compiles_for_gpus_before_hopper(name, tmp_path):
    dtype, N, K, H, B, cache_dtype, T = ON_AN_A100[name]
    shapes = attention_shapes(dtype, N, K, H, B, cache_dtype, T)
    step = functools.partial(ragged_paged_attention, scale=0.1, **OPTIONS.get(name, {}))
    executable, _ = absent_gpu.compile_for(absent_gpu.A100, step, shapes, donate=(3,), dump=tmp_path)
    assert executable.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2  # decodes, rows of any length
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= int(np.prod(shapes[3].shape)) * shapes[3].dtype.itemsize
    assert memory.temp_size_in_bytes < 64 * 2**20
    if absent_gpu.assembler() is None:
        return
    for kernel in absent_gpu.triton_kernels(tmp_path, "ragged_paged_attention"):
        assert kernel.spilled_bytes <= (64 if cache_dtype == "float32" else 0)
        assert kernel.shared_bytes <= 99 * 1024  # what a block has on an L4 or an RTX 4090


@pytest.mark.parametrize("name", [*EXPERTS, "int4, 64 tokens, gate and up", "int4, 2,048 tokens, down"])
def test_experts_compile_for_gpus_before_hopper(name, tmp_path):
    T, G, E, O, I, out_dtype, *rounded = EXPERTS.get(name.removeprefix("int4, "), EXPERTS.get(name))
    dtype = jnp.dtype("int4" if name.startswith("int4") else (rounded or ["bfloat16"])[0])
    array = jax.ShapeDtypeStruct
    shapes = [array((T, I), jnp.bfloat16), array((G, O, I), dtype), array((E,), jnp.int32)]
    if dtype == jnp.int8:
        shapes += [array((E, O), jnp.float32)]
    elif dtype == jnp.int4:
        shapes += [array((G, O, I // 32), jnp.bfloat16)] * 2

    def multiply(x_TI, kernel, sizes_E, scale=None, offset=None):
        options = {"first": jnp.int32(0), "out_dtype": jnp.dtype(out_dtype)}
        return grouped_matmul(x_TI, kernel, sizes_E, kernel_scale=scale, kernel_offset=offset, **options)

    executable, _ = absent_gpu.compile_for(absent_gpu.A100, multiply, shapes, dump=tmp_path)
    assert executable.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    # Rows twice at most, and their answers; of no expert anything.
    assert executable.memory_analysis().temp_size_in_bytes < 2 * T * (2 * I + 4 * O)
    if absent_gpu.assembler() is None:
        return
    (kernel,) = absent_gpu.triton_kernels(tmp_path, "grouped_matmul")
    assert kernel.spilled_bytes == 0 and kernel.shared_bytes <= 99 * 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_rows_of_experts_are_read_where_tokens_stand(dtype):
    T, R, E, O, I = 2048, 16384, 128, 1536, 2048
    array = jax.ShapeDtypeStruct
    shapes = [array((T, I), jnp.bfloat16), array((E, O, I), dtype), array((E,), jnp.int32), array((R,), jnp.int32)]
    shapes += [array((E, O, I // 32), jnp.bfloat16)] * 2 if dtype == "int4" else []

    def multiply(x_TI, kernel, sizes_E, token_R, *scales):
        options = dict(zip(("kernel_scale", "kernel_offset"), scales, strict=False))
        return grouped_matmul(x_TI, kernel, sizes_E, token_R=token_R, out_dtype=jnp.bfloat16, **options)

    executable, _ = absent_gpu.compile_for(absent_gpu.A100, multiply, shapes)
    assert executable.memory_analysis().temp_size_in_bytes < 2 * R * O + 2 * T * 2 * I  # answers, and tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_keys_and_values_are_written_in_place_by_one_kernel(dtype, tmp_path):
    """And by plain stores: XLA would write by compare-and-swap where two tokens might go to one place."""
    T, S, K = 64, 64, 8
    array = jax.ShapeDtypeStruct
    pages = array(cache_shape(256, 32, K, 128, "gpu", dtype), jnp.dtype(dtype))
    tokens = [array((T, K, 128), jnp.bfloat16)] * 2
    rows = [array(shape, jnp.int32) for shape in [(S,), (S, 64), (S + 1,), (2,)]]

    def write(cache_PBCH, k_TKH, v_TKH, kv_lens_S, page_table_SM, cu_q_lens_S1, counts_2):
        located = reference.locate(T, kv_lens_S, cu_q_lens_S1, counts_2)
        return reference.write(cache_PBCH, k_TKH, v_TKH, None, None, page_table_SM, *located, 0)

    options = {"xla_dump_to": str(tmp_path), "xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": ".*"}
    executable, _ = absent_gpu.compile_for_h100(write, [pages, *tokens, *rows], donate=(0,), options=options)
    shape = "[" + ",".join(map(str, pages.shape)) + "]"
    of_pages = [line for line in executed(executable.as_text()) if shape in line.result and not line.is_fused]
    assert sorted(line.op for line in of_pages) == ["fusion", "parameter"]
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes == int(np.prod(pages.shape)) * pages.dtype.itemsize
    assert memory.temp_size_in_bytes <= 2 * T * 2 * K * 4  # scales, where there are any, apart and together
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx") if "scatter" in path.read_text())
    assert "st.global" in ptx and "atom." not in ptx
