"""The CPU kernel behind `pallas_kernels.grouped_matmul`: the product of `matmul`, once for each expert that has rows.

Dimension key
    R  rows, sorted by expert     I  inputs     O  outputs     E  experts     G  kernels
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import arrays, ffi, grouped, matmul
from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.ffi import S4, S8

TARGET = "jax_serving_cpu_experts_2"


@v.inner
def _start(frame):
    """Arguments: x, kernels, group sizes, the first expert's number, scales, offsets; results: y, scratch as `matmul`.

    Scales of int8 begin with expert 0's, those of int4 with kernel 0's.
    """
    x, kernels, y = ffi.argument(frame, 0), ffi.argument(frame, 1), ffi.result(frame, 0)
    sizes, first = ffi.data(ffi.argument(frame, 2)), v.load_i32(ffi.data(ffi.argument(frame, 3)))
    inputs, outputs = ffi.dim(x, 1), ffi.dim(y, 1)
    max_threads, block_rows, block_outs = ffi.int_in(frame, 0, 0), ffi.int_in(frame, 0, 1), ffi.int_in(frame, 0, 2)
    in_panels = ffi.int_in(frame, 0, 3)
    job = matmul.begin(ffi.result(frame, 1), inputs, outputs, max_threads, block_rows, block_outs, in_panels)
    v.store_i64(job + matmul.X_DTYPE, ffi.dtype(x))
    v.store_i64(job + matmul.KERNEL_DTYPE, ffi.dtype(kernels))
    v.store_i64(job + matmul.Y_DTYPE, ffi.dtype(y))
    scales, offsets, dtype = ffi.argument(frame, 4), ffi.argument(frame, 5), ffi.dtype(kernels)
    kernel_bytes = outputs * inputs // 2 if dtype == S4 else outputs * inputs * arrays.itemsize(dtype)
    of_kernel = outputs * (inputs // grouped.GROUP) * 2
    v.store_i64(job + matmul.SCALE_DTYPE, ffi.dtype(scales))
    v.store_i64(job + matmul.OFFSET_DTYPE, ffi.dtype(offsets))
    row, limit = 0, ffi.dim(x, 0)
    for expert in range(ffi.dim(ffi.argument(frame, 2), 0)):
        count = min(v.load_i32(sizes + 4 * expert), limit - row)
        if count <= 0:
            continue
        v.store_i64(job + matmul.X, ffi.data(x) + row * inputs * arrays.itemsize(ffi.dtype(x)))
        v.store_i64(job + matmul.KERNEL, ffi.data(kernels) + (first + expert) * kernel_bytes)
        v.store_i64(job + matmul.Y, ffi.data(y) + row * outputs * arrays.itemsize(ffi.dtype(y)))
        if dtype == S8:
            v.store_i64(job + matmul.SCALE, ffi.data(scales) + 4 * expert * outputs)
        elif dtype == S4:
            v.store_i64(job + matmul.SCALE, ffi.data(scales) + (first + expert) * of_kernel)
            v.store_i64(job + matmul.OFFSET, ffi.data(offsets) + (first + expert) * of_kernel)
        matmul.run(job, count, max_threads)
        row += count


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def multiply(
    x_RI, kernel_GOI, group_sizes_E, first, *, scale_EO=None, scale_GOJ=None, offset_GOJ=None, out_dtype, num_threads,
    in_panels,
):  # fmt: skip
    """See `pallas_kernels.grouped_matmul`; num_threads is the most that may work on it. Padding rows hold anything.

    Raises:
        ValueError: int4 kernels are not in panels, or in other groups than the kernel's.
    """
    (R, I), O = x_RI.shape, kernel_GOI.shape[1]
    if scale_GOJ is not None and not (in_panels and matmul.supports_groups(x_RI, scale_GOJ)):
        raise ValueError(matmul.NO_GROUPS)
    (block_rows, block_outs), words = matmul.blocks(R, I, O, False, kernel_GOI.dtype, in_panels)
    absent = jnp.zeros(0, jnp.float32)
    scale = absent if scale_EO is None else scale_EO.astype(jnp.float32)
    y_RO, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((R, O), out_dtype),
            jax.ShapeDtypeStruct((matmul.HEAD_WORDS + num_threads * words,), jnp.float32),
        ],
    )(
        x_RI,
        kernel_GOI,
        group_sizes_E.astype(jnp.int32),
        jnp.int32(first),
        scale if scale_GOJ is None else scale_GOJ,
        absent if offset_GOJ is None else offset_GOJ,
        ints=np.array([num_threads, block_rows, block_outs, in_panels], np.int32),
    )
    return y_RO
