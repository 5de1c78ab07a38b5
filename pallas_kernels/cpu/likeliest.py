"""The CPU kernel behind `pallas_kernels.likeliest`: the product of `matmul`, of which only each row's largest is kept.

Scores of 32 rows and 49,152 tokens would be 6 MB to write and to read again, in memory as new as the step.

Dimension key
    S  rows     I  inputs     V  vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import ffi, matmul
from pallas_kernels.cpu import vectors as v

TARGET = "jax_serving_cpu_likeliest_1"
MOST = np.float32(3.4028235e38)


@v.inner
def _start(frame):
    """Arguments: x, kernel, scale, num_rows; results: token, best, is_finite, scratch as `matmul` has it, with what
    a thread found of each row at the end of its own."""
    x, kernel = ffi.argument(frame, 0), ffi.argument(frame, 1)
    inputs, vocabulary, rows = ffi.dim(x, 1), ffi.dim(kernel, 0), ffi.dim(x, 0)
    max_threads, block_rows, block_outs = ffi.int_in(frame, 0, 0), ffi.int_in(frame, 0, 1), ffi.int_in(frame, 0, 2)
    job = matmul.begin(ffi.result(frame, 3), inputs, vocabulary, max_threads, block_rows, block_outs, 1)
    for i in range(3):
        matmul.describe(job, (matmul.X, matmul.KERNEL, matmul.SCALE)[i], ffi.argument(frame, i))
    own, stride = v.load_i64(job + matmul.SCRATCH), v.load_i64(job + matmul.SCRATCH_STRIDE)
    v.store_i64(job + matmul.FOUND, stride - rows * matmul.FOUND_BYTES)
    first = own + v.load_i64(job + matmul.FOUND)
    num_rows = min(v.load_i32(ffi.data(ffi.argument(frame, 3))), rows)
    for thread in range(max_threads):
        for row in range(num_rows):
            found = first + thread * stride + row * matmul.FOUND_BYTES
            v.store_v(found, v.splat(0.0))
            v.store_f32(found + matmul.LARGEST, np.float32(-np.inf))
            v.store_i64(found + matmul.NUMBER, vocabulary)
    matmul.run(job, num_rows, max_threads)
    for row in range(rows):
        best, token, total = np.float32(-np.inf), vocabulary, np.float32(0.0)
        if row < num_rows:
            for thread in range(max_threads):
                found = first + thread * stride + row * matmul.FOUND_BYTES
                largest, number = v.load_f32(found + matmul.LARGEST), v.load_i64(found + matmul.NUMBER)
                if largest > best or (largest == best and number < token):
                    best, token = largest, number
                total += v.total(v.load_v(found))
        v.store_i32(ffi.data(ffi.result(frame, 0)) + 4 * row, token if token < vocabulary else 0)
        v.store_f32(ffi.data(ffi.result(frame, 1)) + 4 * row, best)
        # A sum sees NaN and both infinities; a maximum may miss NaN.
        v.store_i32(ffi.data(ffi.result(frame, 2)) + 4 * row, 1 if -MOST <= total <= MOST else 0)


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def likeliest(x_SI, kernel_VI, num_rows, *, kernel_scale, num_threads):
    """See `pallas_kernels.likeliest`; of a kernel in panels. num_threads is the most that may work on it."""
    S, (V, I) = len(x_SI), kernel_VI.shape
    (block_rows, block_outs), words = matmul.blocks(S, I, V, False, kernel_VI.dtype, True)
    words += matmul.FOUND_BYTES // 4 * S
    token_S, best_S, finite_S, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((S,), jnp.int32),
            jax.ShapeDtypeStruct((S,), jnp.float32),
            jax.ShapeDtypeStruct((S,), jnp.int32),
            jax.ShapeDtypeStruct((matmul.HEAD_WORDS + num_threads * words,), jnp.float32),
        ],
    )(
        x_SI,
        kernel_VI,
        jnp.zeros((0,), jnp.float32) if kernel_scale is None else kernel_scale,
        jnp.int32(S) if num_rows is None else num_rows,
        ints=np.array([num_threads, block_rows, block_outs], np.int32),
    )
    return token_S, best_S, finite_S != 0
