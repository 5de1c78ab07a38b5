"""The Hopper attention kernel compiles for an H100, fits its shared memory and keeps the pages in place."""

import functools

import absent_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import cache_shape, ragged_paged_attention

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
    "fp8 pages": (32, 8, 128, 16, "float8_e4m3fn", 64, False),
    "window, soft cap, sinks, large pages": (32, 8, 128, 256, "bfloat16", 1024, True),
}
OPTIONS = {
    "window, soft cap, sinks, large pages": dict(window=1000, soft_cap=30.0, sinks_N=np.zeros(32, np.float32)),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_compiles_and_writes_pages_in_place(name, tmp_path):
    N, K, H, B, dtype, T, is_kernel = CASES[name]
    P, S, M = 256, 64, 64
    array = jax.ShapeDtypeStruct
    shapes = [
        *(array((T, heads, H), jnp.bfloat16) for heads in (N, K, K)),
        array(cache_shape(P, B, K, H, "gpu"), jnp.dtype(dtype)),
        *(array(shape, jnp.int32) for shape in [(S,), (S, M), (S + 1,), (2,)]),
    ]
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
