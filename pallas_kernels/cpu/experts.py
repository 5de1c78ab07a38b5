"""The CPU kernel behind `pallas_kernels.grouped_matmul`: the product of `matmul`, once for each expert that has rows.

Dimension key
    T  rows, sorted by expert     I  inputs     O  outputs     E  experts     G  kernels
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import arrays, ffi, matmul
from pallas_kernels.cpu import vectors as v

TARGET = "jax_serving_cpu_experts_1"


@v.inner
def _start(frame):
    """Arguments: x, kernels, group sizes, the first expert's number; results: y, scratch as `matmul` has it."""
    x, kernels, y = ffi.argument(frame, 0), ffi.argument(frame, 1), ffi.result(frame, 0)
    sizes, first = ffi.data(ffi.argument(frame, 2)), v.load_i32(ffi.data(ffi.argument(frame, 3)))
    inputs, outputs = ffi.dim(x, 1), ffi.dim(y, 1)
    max_threads, block_rows, block_outs = ffi.int_in(frame, 0, 0), ffi.int_in(frame, 0, 1), ffi.int_in(frame, 0, 2)
    in_panels = ffi.int_in(frame, 0, 3)
    job = matmul.begin(ffi.result(frame, 1), inputs, outputs, max_threads, block_rows, block_outs, in_panels)
    v.store_i64(job + matmul.X_DTYPE, ffi.dtype(x))
    v.store_i64(job + matmul.KERNEL_DTYPE, ffi.dtype(kernels))
    v.store_i64(job + matmul.Y_DTYPE, ffi.dtype(y))
    row, limit = 0, ffi.dim(x, 0)
    for expert in range(ffi.dim(ffi.argument(frame, 2), 0)):
        count = min(v.load_i32(sizes + 4 * expert), limit - row)
        if count <= 0:
            continue
        kernel = (first + expert) * outputs * inputs * arrays.itemsize(ffi.dtype(kernels))
        v.store_i64(job + matmul.X, ffi.data(x) + row * inputs * arrays.itemsize(ffi.dtype(x)))
        v.store_i64(job + matmul.KERNEL, ffi.data(kernels) + kernel)
        v.store_i64(job + matmul.Y, ffi.data(y) + row * outputs * arrays.itemsize(ffi.dtype(y)))
        matmul.run(job, count, max_threads)
        row += count


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def multiply(x_TI, kernel_GOI, group_sizes_E, first, *, out_dtype, num_threads, in_panels):
    """See `pallas_kernels.grouped_matmul`; num_threads is the most that may work on it. Padding rows hold anything."""
    (T, I), O = x_TI.shape, kernel_GOI.shape[1]
    (block_rows, block_outs), words = matmul.blocks(T, I, O, False, kernel_GOI.dtype, in_panels)
    y_TO, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((T, O), out_dtype),
            jax.ShapeDtypeStruct((matmul.HEAD_WORDS + num_threads * words,), jnp.float32),
        ],
    )(
        x_TI,
        kernel_GOI,
        group_sizes_E.astype(jnp.int32),
        jnp.int32(first),
        ints=np.array([num_threads, block_rows, block_outs, in_panels], np.int32),
    )
    return y_TO
