"""The CPU kernel behind `pallas_kernels.linear`: normalise, multiply, add or gate, in one pass over the weights.

Work is cut into chunks of BLOCK_BYTES of weights by up to `block_rows` tokens. A thread prepares a block of tokens
once (normalised, and as float32, or in the bits that the CPU multiplies with), streams the chunk's weights past it in
register tiles, and finishes the chunk's outputs while they are in its cache. Only real tokens are touched.

An output's bits depend on its own token, its own weights and the number of inputs, and on nothing else.

Dimension key
    T  tokens     I  inputs     O  outputs
"""

import functools

import jax
import jax.numpy as jnp
import numba
import numpy as np

from pallas_kernels.cpu import arrays, ffi, grouped, panels, threads, tiles
from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.ffi import BF16, S4, S8
from pallas_kernels.cpu.panels import OUTS
from pallas_kernels.cpu.rotation import rotate_block
from pallas_kernels.rotation import BLOCK

TARGET, CHUNK = "jax_serving_cpu_linear_5", "jax_serving_cpu_linear_chunk_5"
BLOCK_BYTES = 65536  # of weights a chunk: what the second-level cache holds beside the tokens
STREAM_BYTES = 262144  # the same for tokens that fit one tile: weights then pass by once
PANEL_BYTES = 196608  # of widened tokens a block
DEPTH = 2048  # inputs summed in one run of a register tile; part of what an output's bits depend on
WIDE_TILE_INPUTS = 1024  # six rows of more inputs overflow the first-level cache
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2, "relu": 3}
SILU, GELU_TANH, RELU = 1, 2, 3

# The job: one int64 a field, at the head of the scratch buffer.
(
    X, X_DTYPE, KERNEL, KERNEL_DTYPE, SCALE, SCALE_DTYPE, OFFSET, OFFSET_DTYPE, NORM, NORM_DTYPE,
    RESIDUAL, RESIDUAL_DTYPE, BIAS, BIAS_DTYPE, Y, Y_DTYPE, TOKENS, INPUTS, OUTPUTS, GATED, ACTIVATION,
    BLOCK_ROWS, BLOCK_OUTS, NUM_BLOCK_OUTS, PANELS, SCRATCH, SCRATCH_STRIDE,
) = range(0, 8 * 27, 8)  # fmt: skip
EPS, NORM_OFFSET = 8 * 27, 8 * 28
# Bytes from a thread's scratch to what it found of each token so far, where nothing but the largest output is wanted.
FOUND = 8 * 29
HEAD_WORDS = 64  # float32 words of scratch before the threads' own: the job
THREAD_WORDS = 16  # words at the head of a thread's scratch: the block of tokens it holds
# What a thread found of a token: a register of sums, the largest output and its number.
LARGEST, NUMBER, FOUND_BYTES = v.WIDTH, v.WIDTH + 8, 2 * v.WIDTH

NO_GROUPS = f"an int4 kernel is multiplied in panels, in groups of {grouped.GROUP} with bfloat16 scales"
FLOATS, INTS = 0, 1  # attributes, in alphabetical order
chunk_address = v.external(CHUNK)
_compiled = v.inner


def _panel(wide, outs, single):
    """Compiles the product of a tile's tokens with any number of weight rows, `outs` of them at a time."""

    @_compiled
    def panel(x, x_stride, w, w_stride, count, num_outs, y, y_stride, more):
        o = 0
        while o + outs <= num_outs:
            wide(x, x_stride, w + o * w_stride, w_stride, count, y + 4 * o, y_stride, more)
            o += outs
        while o < num_outs:
            single(x, x_stride, w + o * w_stride, w_stride, count, y + 4 * o, y_stride, more)
            o += 1

    return panel


def _by_rows(tile, shapes):
    """Compiles a product whose number of tokens is one of those in shapes, [(tokens, weight rows), ...]."""
    (size, outs), *others = shapes
    panel = _panel(tile(size, outs), outs, tile(size, 1))
    other = _by_rows(tile, others) if others else None

    @_compiled
    def multiply(rows, x, x_stride, w, w_stride, count, num_outs, y, y_stride, more):
        if other is None or rows == size:
            panel(x, x_stride, w, w_stride, count, num_outs, y, y_stride, more)
        else:
            other(rows, x, x_stride, w, w_stride, count, num_outs, y, y_stride, more)

    return multiply


# Tokens and weight rows a tile: as many sums as the registers hold, while loads stay fewer than multiplications.
# Products of pairs and of fours come with 32 registers, others with 16.
_wide_f32, _wide_bf16 = (functools.partial(tiles.dot_tile, bf16=bf16) for bf16 in (False, True))
WIDE, WIDE_I8 = [(6, 2), (4, 3), (3, 3), (2, 4), (1, 4)], [(4, 2), (3, 2), (2, 2), (1, 4)]
NARROW = [(8, 3), (6, 4), (4, 4), (3, 4), (2, 1), (1, 1)]
PAIRS, BYTES = v.MULTIPLIES_PAIRS, v.HAS_BYTE_DOT
_multiply_f32 = _by_rows(_wide_f32, WIDE)
_multiply_bf16 = _by_rows(*((tiles.dot_tile_pairs, NARROW) if PAIRS else (_wide_bf16, WIDE)))
_multiply_i8 = _by_rows(*((tiles.dot_tile_bytes, NARROW) if BYTES else (tiles.dot_tile_i8, WIDE_I8)))


@_compiled
def _token_bytes(dtype):
    """Bytes of an input in the panel, for weights of a dtype."""
    if dtype == S8:
        return 1
    return 2 if PAIRS and dtype == BF16 else 4


@_compiled
def _tile_rows(dtype, left, inputs):
    """How many of the tokens left go into one tile."""
    if (PAIRS and dtype == BF16) or (BYTES and dtype == S8):
        for size in (8, 6, 4, 3, 2):
            if left >= size:
                return size
        return 1
    if dtype == S8 or min(inputs, DEPTH) > WIDE_TILE_INPUTS:
        return min(left, 4)
    if left >= 6 and left != 8 and left != 7:
        return 6
    return 4 if left == 8 or left == 7 or left == 4 else min(left, 3)


@_compiled
def _multiply(dtype, rows, x, x_stride, w, w_stride, inputs, num_outs, y, y_stride, more):
    if dtype == BF16:
        count = 2 * inputs if PAIRS else inputs
        _multiply_bf16(rows, x, x_stride, w, w_stride, count, num_outs, y, y_stride, more)
    elif dtype == S8:
        _multiply_i8(rows, x, x_stride, w, w_stride, inputs, num_outs, y, y_stride, more)
    else:
        _multiply_f32(rows, x, x_stride, w, w_stride, inputs, num_outs, y, y_stride, more)


@_compiled
def _prepare(job, token, rows, panel, scales):
    """Copies tokens into the panel, normalised where a norm is given, as their products want them: float32, bfloat16,
    or int8 and a scale each."""
    inputs, dtype = v.load_i64(job + INPUTS), v.load_i64(job + KERNEL_DTYPE)
    itemsize = _token_bytes(dtype)
    line = panel + rows * inputs * itemsize  # a token on its way to fewer bits
    for m in range(rows):
        target = panel + m * inputs * itemsize
        if itemsize == 4:
            _read(job, token + m, target)
            continue
        _read(job, token + m, line)
        if itemsize == 1:
            v.store_f32(scales + 4 * m, _quantise(line, inputs, target))
        else:
            for i in range(0, inputs, v.LANES):
                v.store_v_bf16(target + 2 * i, v.load_v(line + 4 * i))


@_compiled
def _read(job, token, line):
    """One token as float32, divided by its root mean square and weighted where a norm is given."""
    inputs, x, x_dtype = v.load_i64(job + INPUTS), v.load_i64(job + X), v.load_i64(job + X_DTYPE)
    norm, norm_dtype = v.load_i64(job + NORM), v.load_i64(job + NORM_DTYPE)
    offset, eps = v.splat(v.load_f32(job + NORM_OFFSET)), v.load_f32(job + EPS)
    squares = v.splat(0.0)
    for i in range(0, inputs, v.LANES):
        value = arrays.get(x, token * inputs + i, x_dtype)
        squares = v.fma(value, value, squares)
        v.store_v(line + 4 * i, value)
    if norm:
        mean = v.total(squares) / numba.float32(inputs)
        scale = v.splat(numba.float32(1.0) / v.square_root(mean + eps))
        for i in range(0, inputs, v.LANES):
            weight = v.add(arrays.get(norm, i, norm_dtype), offset)
            v.store_v(line + 4 * i, v.mul(v.mul(v.load_v(line + 4 * i), scale), weight))


@_compiled
def _quantise(line, inputs, target):
    """float32, rotated, to int8 in [-127, 127], or 128 more than that; returns what one step is worth."""
    for i in range(0, inputs, BLOCK):
        rotate_block(line + 4 * i)
    low, high = v.splat(0.0), v.splat(0.0)
    for i in range(0, inputs, v.LANES):
        value = v.load_v(line + 4 * i)
        high, low = v.maximum(value, high), v.maximum(v.sub(v.splat(0.0), value), low)
    top = v.largest(v.maximum(low, high))
    top = top if top > 0 else numba.float32(1.0)
    steps = v.splat(numba.float32(127.0) / top)
    for i in range(0, inputs, v.LANES):
        value = v.mul(v.load_v(line + 4 * i), steps)
        if BYTES:
            v.store_v_u8(target + i, value)
        else:
            v.store_v_i8(target + i, value)
    return top / numba.float32(127.0)


@_compiled
def _activate(kind, value):
    if kind == SILU:
        return v.div(value, v.add(v.splat(1.0), v.exp(v.sub(v.splat(0.0), value))))
    if kind == GELU_TANH:
        # x * (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)).
        cubed = v.mul(v.mul(value, value), value)
        u = v.mul(v.splat(-1.5957691216057308), v.fma(cubed, v.splat(0.044715), value))
        return v.div(value, v.add(v.splat(1.0), v.exp(u)))
    if kind == RELU:
        return v.maximum(value, v.splat(0.0))
    return value


@_compiled
def _total(job, y, o, row_scale, one):
    """A sum, in its unit and with its bias; `o` is its row of the kernel."""
    value = v.splat(v.load_f32(y)) if one else v.load_v(y)
    scale, bias = v.load_i64(job + SCALE), v.load_i64(job + BIAS)
    if scale and v.load_i64(job + KERNEL_DTYPE) != S4:
        dtype = v.load_i64(job + SCALE_DTYPE)
        weight_scale = arrays.get_one(scale, o, dtype) if one else arrays.get(scale, o, dtype)
        value = v.mul(value, v.mul(weight_scale, v.splat(row_scale)))
    if bias:
        dtype = v.load_i64(job + BIAS_DTYPE)
        value = v.add(value, arrays.get_one(bias, o, dtype) if one else arrays.get(bias, o, dtype))
    return value


@_compiled
def _finish(job, y, o, out, row_scale, one):
    """From sums at address y to the outputs at element `out` of the result; `o` is the output's number."""
    value = _activate(v.load_i64(job + ACTIVATION), _total(job, y, o, row_scale, one))
    if v.load_i64(job + GATED):
        up = y + 4 * (OUTS if v.load_i64(job + PANELS) else v.load_i64(job + BLOCK_OUTS))
        value = v.mul(value, _total(job, up, o + v.load_i64(job + OUTPUTS), row_scale, one))
    residual = v.load_i64(job + RESIDUAL)
    if residual:
        dtype = v.load_i64(job + RESIDUAL_DTYPE)
        value = v.add(value, arrays.get_one(residual, out, dtype) if one else arrays.get(residual, out, dtype))
    if one:
        arrays.put_one(v.load_i64(job + Y), out, v.load_i64(job + Y_DTYPE), value)
    else:
        arrays.put(v.load_i64(job + Y), out, v.load_i64(job + Y_DTYPE), value)


@_compiled
def _find(job, found, y, first, row_scale):
    """Looks for a token's largest output, the first of equals, among those of a panel, and adds all of them up."""
    high = v.splat(-np.inf)
    for i in range(0, OUTS, v.LANES):
        value = _total(job, y + 4 * i, first + i, row_scale, False)
        v.store_v(y + 4 * i, value)
        v.store_v(found, v.add(v.load_v(found), value))
        high = v.maximum(value, high)
    before = v.load_f32(found + LARGEST)
    if v.any_reaches(high, v.splat(before)):
        largest = v.largest(high)
        for i in range(OUTS):
            if v.load_f32(y + 4 * i) == largest:
                if largest > before or first + i < v.load_i64(found + NUMBER):
                    v.store_f32(found + LARGEST, largest)
                    v.store_i64(found + NUMBER, first + i)
                return


@_compiled
def _chunk(job, chunk, thread):
    inputs, outputs, gated = v.load_i64(job + INPUTS), v.load_i64(job + OUTPUTS), v.load_i64(job + GATED)
    block_rows, block_outs = v.load_i64(job + BLOCK_ROWS), v.load_i64(job + BLOCK_OUTS)
    num_block_outs, dtype = v.load_i64(job + NUM_BLOCK_OUTS), v.load_i64(job + KERNEL_DTYPE)
    block, o = chunk // num_block_outs, chunk % num_block_outs * block_outs
    token = block * block_rows
    rows = min(block_rows, v.load_i64(job + TOKENS) - token)
    outs = min(block_outs, outputs - o)

    own = v.load_i64(job + SCRATCH) + thread * v.load_i64(job + SCRATCH_STRIDE)
    scales = own + 4 * THREAD_WORDS
    panel = scales + 4 * ((block_rows + 15) // 16 * 16)
    sums = panel + _panel_bytes(_token_bytes(dtype), block_rows, inputs)
    if v.load_i64(own) != block:
        _prepare(job, token, rows, panel, scales)
        v.store_i64(own, block)

    if v.load_i64(job + PANELS):
        found = own + v.load_i64(job + FOUND) + token * FOUND_BYTES if v.load_i64(job + FOUND) else 0
        _multiply_panels(job, token, rows, o, outs, panel, scales, sums, found, threads.ahead(thread) < 0)
        return 0
    itemsize, x_itemsize = arrays.itemsize(dtype), _token_bytes(dtype)
    x_stride, w_stride, y_stride = x_itemsize * inputs, itemsize * inputs, 4 * block_outs * (1 + gated)
    kernel = v.load_i64(job + KERNEL) + o * w_stride
    m = 0
    while m < rows:
        tile = _tile_rows(dtype, rows - m, inputs)
        y = sums + m * y_stride
        for k in range(0, inputs, DEPTH):
            count, more = min(DEPTH, inputs - k), min(k, 1)
            x, w = panel + m * x_stride + k * x_itemsize, kernel + k * itemsize
            _multiply(dtype, tile, x, x_stride, w, w_stride, count, outs, y, y_stride, more)
            if gated:
                up, y_up = w + outputs * w_stride, y + 4 * block_outs
                _multiply(dtype, tile, x, x_stride, up, w_stride, count, outs, y_up, y_stride, more)
        m += tile

    for m in range(rows):
        y, out, row_scale = sums + m * y_stride, (token + m) * outputs + o, v.load_f32(scales + 4 * m)
        i = 0
        while i + v.LANES <= outs:
            _finish(job, y + 4 * i, o + i, out + i, row_scale, False)
            i += v.LANES
        while i < outs:
            _finish(job, y + 4 * i, o + i, out + i, row_scale, True)
            i += 1
    return 0


@_compiled
def _multiply_panels(job, token, rows, o, outs, panel, scales, sums, found, backwards):
    """A chunk of a kernel in panels: outputs [o, o + outs) of tokens [token, token + rows), prepared at `panel`.

    Args:
        found: where what is found of these tokens stands; 0 to write their outputs.
    """
    outputs, gated = v.load_i64(job + OUTPUTS), v.load_i64(job + GATED)
    y_stride = 4 * OUTS * (1 + gated)
    for i in range(0, outs, OUTS):
        first = o + (outs - OUTS - i if backwards else i)
        if v.load_i64(job + KERNEL_DTYPE) == S4:
            for half in range(1 + gated):
                _multiply_groups(job, rows, first + half * outputs, panel, sums + 4 * OUTS * half, y_stride, backwards)
        else:
            _multiply_words(job, rows, first, panel, sums, y_stride, backwards)
        for m in range(rows):
            y, out, row_scale = sums + m * y_stride, (token + m) * outputs + first, v.load_f32(scales + 4 * m)
            if found:
                _find(job, found + m * FOUND_BYTES, y, first, row_scale)
                continue
            for i in range(0, OUTS, v.LANES):
                _finish(job, y + 4 * i, first + i, out + i, row_scale, False)


@_compiled
def _multiply_words(job, rows, first, panel, sums, y_stride, backwards):
    """The sums of the panel whose first row is `first`, and of its other half's; not of int4."""
    inputs, outputs, gated = v.load_i64(job + INPUTS), v.load_i64(job + OUTPUTS), v.load_i64(job + GATED)
    dtype = v.load_i64(job + KERNEL_DTYPE)
    stride, x_stride = arrays.itemsize(dtype) * inputs, _token_bytes(dtype) * inputs
    kernel, widening = v.load_i64(job + KERNEL) + first * stride, _token_bytes(dtype) // arrays.itemsize(dtype)
    fetch_step = 4 * OUTS // panels.num_tiles(dtype, rows)
    for k in range(0, stride, panels.DEPTH_BYTES):
        count = min(panels.DEPTH_BYTES, stride - k)
        for half in range(1 + gated):
            w = kernel + half * outputs * stride + k * OUTS
            # Tokens of many tiles pass by each panel many times: meanwhile comes the next.
            fetch = w + count * OUTS
            if backwards and k + count == stride:
                fetch = w - k * OUTS - stride * OUTS
            x, y, more = panel + k * widening, sums + 4 * OUTS * half, min(k, 1)
            panels.multiply(dtype, rows, x, x_stride, w, count, y, y_stride, more, fetch, fetch_step)


@_compiled
def _multiply_groups(job, rows, first, panel, sums, y_stride, backwards):
    """The sums of a panel of an int4 kernel, whose first row is `first`."""
    inputs = v.load_i64(job + INPUTS)
    kernel, group = v.load_i64(job + KERNEL) + first * inputs // 2, first * inputs // grouped.GROUP * 2
    scales, offsets = v.load_i64(job + SCALE) + group, v.load_i64(job + OFFSET) + group
    following = kernel + (-1 if backwards else 1) * OUTS * inputs // 2
    grouped.multiply(rows, panel, 4 * inputs, kernel, scales, offsets, inputs, sums, y_stride, following)


@_compiled
def _panel_bytes(itemsize, rows, inputs):
    """Room for a block of tokens, and for a line of float32 where they have fewer bits."""
    return (itemsize * rows + (4 if itemsize < 4 else 0)) * inputs


@_compiled
def begin(scratch, inputs, outputs, max_threads, block_rows, block_outs, in_panels):
    """Makes an empty job at the head of a scratch buffer, `[head + threads * words]`; returns its address."""
    job = ffi.data(scratch)
    own = job + 4 * HEAD_WORDS
    for field in range(job, own, 8):
        v.store_i64(field, 0)
    v.store_i64(job + INPUTS, inputs)
    v.store_i64(job + OUTPUTS, outputs)
    v.store_i64(job + BLOCK_ROWS, block_rows)
    v.store_i64(job + BLOCK_OUTS, block_outs)
    v.store_i64(job + NUM_BLOCK_OUTS, (outputs + block_outs - 1) // block_outs)
    v.store_i64(job + PANELS, in_panels)
    v.store_i64(job + SCRATCH, own)
    v.store_i64(job + SCRATCH_STRIDE, 4 * ((ffi.dim(scratch, 0) - HEAD_WORDS) // max_threads))
    return job


@_compiled
def describe(job, index, buffer):
    """Notes an array's address (0 for an empty one) and dtype."""
    v.store_i64(job + index, ffi.data(buffer) if ffi.size(buffer) > 0 else 0)
    v.store_i64(job + index + 8, ffi.dtype(buffer))


@_compiled
def run(job, tokens, max_threads):
    """Does a job for so many tokens, which no thread has prepared yet."""
    v.store_i64(job + TOKENS, tokens)
    for thread in range(max_threads):
        v.store_i64(v.load_i64(job + SCRATCH) + thread * v.load_i64(job + SCRATCH_STRIDE), -1)
    block_rows = v.load_i64(job + BLOCK_ROWS)
    blocks = (tokens + block_rows - 1) // block_rows
    threads.run(chunk_address(), job, blocks * v.load_i64(job + NUM_BLOCK_OUTS), max_threads)


@_compiled
def _start(frame):
    """Arguments: x, kernel, scale, offset, norm, residual, bias, num_tokens; results: y, scratch."""
    y = ffi.result(frame, 0)
    activation, gated, max_threads = ffi.int_in(frame, INTS, 0), ffi.int_in(frame, INTS, 1), ffi.int_in(frame, INTS, 2)
    block_rows, block_outs, in_panels = (
        ffi.int_in(frame, INTS, 3), ffi.int_in(frame, INTS, 4), ffi.int_in(frame, INTS, 5),
    )  # fmt: skip
    inputs = ffi.dim(ffi.argument(frame, 0), 1)
    job = begin(ffi.result(frame, 1), inputs, ffi.dim(y, 1), max_threads, block_rows, block_outs, in_panels)
    for i in range(7):
        describe(job, (X, KERNEL, SCALE, OFFSET, NORM, RESIDUAL, BIAS)[i], ffi.argument(frame, i))
    describe(job, Y, y)
    v.store_i64(job + GATED, gated)
    v.store_i64(job + ACTIVATION, activation)
    v.store_f32(job + EPS, ffi.float_in(frame, FLOATS, 0))
    v.store_f32(job + NORM_OFFSET, ffi.float_in(frame, FLOATS, 1))
    run(job, min(v.load_i32(ffi.data(ffi.argument(frame, 7))), ffi.dim(y, 0)), max_threads)


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def chunk(job, index, thread):
    return _chunk(job, index, thread)


def supports(x_TI, kernel) -> bool:
    floats, I = (jnp.float32, jnp.bfloat16), x_TI.shape[1]
    if kernel.dtype == jnp.int8:
        known = v.HAS_AVX2 and I % BLOCK == 0
    elif kernel.dtype == jnp.bfloat16 and PAIRS:
        known = x_TI.dtype == jnp.bfloat16 and I % 32 == 0  # float32 tokens are not rounded
    else:
        known = kernel.dtype in floats and I % v.LANES == 0
    return known and x_TI.dtype in floats


def supports_groups(x_TI, kernel_scale) -> bool:
    """The same of an int4 kernel in panels."""
    groups = x_TI.shape[1] == kernel_scale.shape[-1] * grouped.GROUP and kernel_scale.dtype == jnp.bfloat16
    return groups and x_TI.dtype in (jnp.float32, jnp.bfloat16)


def multiplies_panels(num_in: int, dtype) -> bool:
    """Whether there are instructions for kernels of this dtype in panels."""
    if dtype == jnp.int4:
        return num_in % grouped.GROUP == 0
    if jnp.dtype(dtype) == jnp.bfloat16:
        return num_in % 32 == 0
    return jnp.dtype(dtype) == jnp.int8 and panels.HAS_BYTES and num_in % 64 == 0


def linear(
    x_TI, kernel, num_tokens, *, kernel_scale, kernel_offset, norm_I, norm_eps, norm_offset, residual_TO, bias,
    activation, out_dtype, num_threads, in_panels,
):  # fmt: skip
    """See `pallas_kernels.linear.linear`; num_threads is the most that may work on it."""
    T, I = x_TI.shape
    O, gated = kernel.shape[-2], kernel.ndim - 2
    absent = jnp.zeros((0,), jnp.float32)
    if kernel.dtype == jnp.int4 and not (in_panels and supports_groups(x_TI, kernel_scale)):
        raise ValueError(NO_GROUPS)
    (block_rows, block_outs), words = blocks(T, I, O, gated, kernel.dtype, in_panels)
    y_TO, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((T, O), out_dtype),
            jax.ShapeDtypeStruct((HEAD_WORDS + num_threads * words,), jnp.float32),
        ],
    )(
        x_TI,
        kernel,
        *(absent if array is None else array for array in (kernel_scale, kernel_offset, norm_I, residual_TO, bias)),
        jnp.int32(T) if num_tokens is None else num_tokens,
        floats=np.array([norm_eps, norm_offset], np.float32),
        ints=np.array([ACTIVATIONS[activation], gated, num_threads, block_rows, block_outs, in_panels], np.int32),
    )
    return y_TO


def blocks(T, I, O, gated, dtype, in_panels) -> tuple[tuple[int, int], int]:
    """Tokens and outputs a chunk, and float32 words of scratch a thread, for a kernel of this dtype."""
    token_bytes = _token_bytes.py_func({jnp.int8: S8, jnp.bfloat16: BF16}.get(dtype.type))
    kernel_bytes = 0.5 if dtype == jnp.int4 else dtype.itemsize
    if in_panels:
        rows, outs = _blocks_of_panels(T, I, O, gated, kernel_bytes, token_bytes)
    else:
        rows, outs = _blocks(T, I, O, gated, kernel_bytes)
    panel_words = _panel_bytes.py_func(token_bytes, rows, I) // 4
    words = THREAD_WORDS + _round_up(rows, 16) + panel_words + rows * outs * (1 + gated)
    return (rows, outs), _round_up(words, 16)


def _blocks(T, I, O, gated, itemsize):
    """Tokens and outputs a chunk; outputs in even shares."""
    rows = min(T, max(24, PANEL_BYTES // (4 * I) // 6 * 6))
    one_pass = T <= NARROW[0][0] and O * I * itemsize * (1 + gated) > 8 * STREAM_BYTES
    most = max(24, (STREAM_BYTES if one_pass else BLOCK_BYTES) // (I * itemsize * (1 + gated)))
    return rows, _round_up(-(-O // -(-O // most)), 24)


def _blocks_of_panels(T, I, O, gated, itemsize, token_bytes):
    """The same for a kernel in panels."""
    rows = max(24, PANEL_BYTES // (max(2, token_bytes) * I) // panels.TILES[0] * panels.TILES[0])
    rows = min(T, _round_up(-(-T // max(1, round(T / rows))), panels.TILES[0]))  # no block of a few tokens at the end
    most, num_panels = max(1, int(panels.CHUNK_BYTES / (OUTS * I * itemsize * (1 + gated)))), O // OUTS
    return rows, OUTS * -(-num_panels // -(-num_panels // most))


def _round_up(count, multiple):
    return -(-count // multiple) * multiple
