"""The CPU kernel behind `pallas_kernels.choose`: one row a chunk, held in the thread's own cache.

A greedy row is read once. A random row is read three times more (distances, weights, the draw), and about twenty
times when top_k or top_p look for their cutoff; from the cache, at some microseconds a time. XLA's operations over
the same rows take tens to hundreds of microseconds each.

A row's token depends on that row and its settings alone.

Dimension key
    S  rows     V  vocabulary
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np
from numba import types

from pallas_kernels.cpu import ffi, threads
from pallas_kernels.cpu import vectors as v

TARGET, CHUNK = "jax_serving_cpu_choose_2", "jax_serving_cpu_choose_chunk_2"
STEP = 4 * v.LANES  # tokens a turn of the loops: four sums at once hide the latency of each
BLOCK = 8 * STEP
EVERYTHING = np.float32(3.4028235e38)
TOTAL = np.float32(2.0**30)  # what a row's weights add up to
NEAR = np.float32(64.0)

# The job: one int64 a field, at the head of the scratch buffer.
(
    LOGITS,
    VOCABULARY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    CUTOFF,
    BITS,
    TOKEN_OUT,
    BEST_OUT,
    CUTOFF_OUT,
    FINITE_OUT,
    SCRATCH,
    SCRATCH_STRIDE,
) = range(0, 8 * 13, 8)
HEAD_WORDS = 64  # float32 words of scratch before the threads' own
THREAD_WORDS = STEP  # words at the head of a thread's scratch: the end of its row, padded

chunk_address = v.external(CHUNK)
_compiled = v.inner


# Vectors of int32 travel as the bits of float32 ones.


@v.op(types.none, types.intp, v.vector)
def _store_rounded(b, address, x):
    """Stores x as int32, rounded to nearest even."""
    v.store(b, b.fptosi(v.call(b, f"llvm.rint.v{v.LANES}f32", v.VF32, x), v.VI32), address, 4)


@v.op(v.vector, v.vector, v.vector, v.vector, types.intp)
def _weigh(b, total, x, limit, address):
    """total + the int32 at the address where x <= limit."""
    within = b.fcmp_ordered("<=", x, limit)
    kept = b.select(within, v.load(b, address, v.VI32, 4), v.constant(v.VI32, 0))
    return b.bitcast(b.add(b.bitcast(total, v.VI32), kept), v.VF32)


@v.op(v.vector, v.vector, v.vector, v.vector)
def _count(b, total, x, limit):
    """total + 1 where x <= limit."""
    within = b.fcmp_ordered("<=", x, limit)
    return b.bitcast(b.add(b.bitcast(total, v.VI32), b.zext(within, v.VI32)), v.VF32)


@v.op(types.intp, v.vector)
def _sum(b, total):
    return b.sext(v.fold(b, b.bitcast(total, v.VI32), b.add), v.I64)


@v.op(types.intp, types.float32)
def _bits(b, x):
    return b.sext(b.bitcast(x, v.I32), v.I64)


@v.op(types.float32, types.intp)
def _value(b, bits):
    return b.bitcast(b.trunc(bits, v.I32), v.F32)


@_compiled
def _best(x, end, size):
    """The highest logit, the first place that has it, and the sum of all. `end` holds the row's last part, padded."""
    whole = size // STEP * STEP
    best, block = numba.float32(-np.inf), 0
    lowest, zero = v.splat(-np.inf), v.splat(0.0)
    r, s, t, u = zero, zero, zero, zero  # sums
    start = 0
    while start < whole:
        stop = min(start + BLOCK, whole)
        a, b, c, d = lowest, lowest, lowest, lowest
        for i in range(start, stop, STEP):
            at = x + 4 * i
            w, x1, y, z = v.load_v(at), v.load_v(at + v.WIDTH), v.load_v(at + 2 * v.WIDTH), v.load_v(at + 3 * v.WIDTH)
            a, b, c, d = v.maximum(w, a), v.maximum(x1, b), v.maximum(y, c), v.maximum(z, d)
            r, s, t, u = v.add(r, w), v.add(s, x1), v.add(t, y), v.add(u, z)
        high = v.largest(v.maximum(v.maximum(a, b), v.maximum(c, d)))
        if high > best:
            best, block = high, start
        start = stop
    total = v.total(v.add(v.add(r, s), v.add(t, u)))
    for i in range(size - whole):
        high = v.load_f32(end + 4 * i)
        total += high
        if high > best:
            best, block = high, whole
    for i in range(block, min(block + BLOCK, size)):
        if v.load_f32(x + 4 * i) == best:
            return best, i, total
    return best, 0, total


@_compiled
def _weights(x, end, whole, size, best, per_degree, distance, weight):
    """Writes each token's distance and integer weight; returns what the weights were multiplied by."""
    top, factor, zero = v.splat(best), v.splat(per_degree), v.splat(0.0)
    a, b = zero, zero
    for i in range(0, size, 2 * v.LANES):
        at = x + 4 * i if i < whole else end + 4 * (i - whole)
        d = v.mul(v.sub(top, v.load_v(at)), factor)
        e = v.mul(v.sub(top, v.load_v(at + v.WIDTH)), factor)
        v.store_v(distance + 4 * i, d)
        v.store_v(distance + 4 * i + v.WIDTH, e)
        d, e = v.exp(v.sub(zero, d)), v.exp(v.sub(zero, e))
        v.store_v(weight + 4 * i, d)
        v.store_v(weight + 4 * i + v.WIDTH, e)
        a, b = v.add(a, d), v.add(b, e)
    scale = TOTAL / v.total(v.add(a, b))
    factor = v.splat(scale)
    for i in range(0, size, v.LANES):
        at = weight + 4 * i
        _store_rounded(at, v.mul(v.load_v(at), factor))
    return scale


@_compiled
def _measure(distance, weight, start, stop, limit):
    """What the tokens within the limit weigh, or how many they are when weight is 0."""
    a = b = c = d = v.splat(0.0)
    limits = v.splat(limit)
    if weight:
        for i in range(start, stop, STEP):
            x, w = distance + 4 * i, weight + 4 * i
            a = _weigh(a, v.load_v(x), limits, w)
            b = _weigh(b, v.load_v(x + v.WIDTH), limits, w + v.WIDTH)
            c = _weigh(c, v.load_v(x + 2 * v.WIDTH), limits, w + 2 * v.WIDTH)
            d = _weigh(d, v.load_v(x + 3 * v.WIDTH), limits, w + 3 * v.WIDTH)
    else:
        for i in range(start, stop, STEP):
            x = distance + 4 * i
            a = _count(a, v.load_v(x), limits)
            b = _count(b, v.load_v(x + v.WIDTH), limits)
            c = _count(c, v.load_v(x + 2 * v.WIDTH), limits)
            d = _count(d, v.load_v(x + 3 * v.WIDTH), limits)
    return _sum(a) + _sum(b) + _sum(c) + _sum(d)


@_compiled
def _smallest(distance, weight, size, scale, cutoff, within, target):
    """The smallest cutoff whose measure reaches the target; see the reference's function of this name."""
    low, high, below = -1, _bits(cutoff), 0
    turn = 0
    while high - low > 1 and within > target:
        one = 1
        if weight:
            one = int(np.rint(v.first(v.exp(v.splat(-_value(high)))) * scale))
            one -= (one >> 16) + 1
        if within - below < 2 * one:
            break
        middle = low + (high - low) // 2
        if turn < 20 and _value(high) < NEAR:
            middle = _bits(numba.float32(0.5) * (_value(max(low, 0)) + _value(high)))
        middle = min(max(middle, low + 1), high - 1)
        measure = _measure(distance, weight, 0, size, _value(middle))
        if measure >= target:
            high, within = middle, measure
        else:
            low, below = middle, measure
        turn += 1
    return _value(high)


@_compiled
def _draw(distance, weight, size, cutoff, bits):
    """The token at which the running sum of the kept weights passes the random share of their total."""
    total = _measure(distance, weight, 0, size, cutoff)
    goal = (bits * total) >> 32
    upto = 0
    for start in range(0, size, BLOCK):
        more = _measure(distance, weight, start, min(start + BLOCK, size), cutoff)
        if upto + more > goal:
            for i in range(start, min(start + BLOCK, size)):
                if v.load_f32(distance + 4 * i) <= cutoff:
                    upto += v.load_i32(weight + 4 * i)
                    if upto > goal:
                        return i
        upto += more
    return 0


@_compiled
def _row(job, row, own):
    size = v.load_i64(job + VOCABULARY)
    x = v.load_i64(job + LOGITS) + 4 * row * size
    whole, padded = size // STEP * STEP, (size + STEP - 1) // STEP * STEP
    for i in range(STEP):
        v.store_f32(own + 4 * i, v.load_f32(x + 4 * (whole + i)) if whole + i < size else numba.float32(-np.inf))
    best, token, total = _best(x, own, size)
    cutoff = EVERYTHING
    temperature = v.load_f32(v.load_i64(job + TEMPERATURE) + 4 * row)
    if temperature > 0 and -EVERYTHING <= best <= EVERYTHING and total <= EVERYTHING:
        cutoff = v.load_f32(v.load_i64(job + CUTOFF) + 4 * row)
        top_k = v.load_i32(v.load_i64(job + TOP_K) + 4 * row)
        top_p = v.load_f32(v.load_i64(job + TOP_P) + 4 * row)
        distance = own + 4 * THREAD_WORDS
        weight = distance + 4 * padded
        scale = _weights(x, own, whole, padded, best, numba.float32(1.0) / temperature, distance, weight)
        if top_k > 0:
            within = _measure(distance, 0, 0, padded, cutoff)
            cutoff = _smallest(distance, 0, padded, scale, cutoff, within, top_k)
        if 0 < top_p < 1:
            within = _measure(distance, weight, 0, padded, cutoff)
            share = int(np.ceil(numba.float32(within) * top_p))
            cutoff = _smallest(distance, weight, padded, scale, cutoff, within, min(max(share, 1), within))
        bits = v.load_i32(v.load_i64(job + BITS) + 4 * row) & 0xFFFFFFFF
        token = _draw(distance, weight, padded, cutoff, bits)
    v.store_i32(v.load_i64(job + TOKEN_OUT) + 4 * row, token)
    v.store_f32(v.load_i64(job + BEST_OUT) + 4 * row, best)
    v.store_f32(v.load_i64(job + CUTOFF_OUT) + 4 * row, cutoff)
    # A sum sees NaN and both infinities; a maximum may miss NaN.
    v.store_i32(v.load_i64(job + FINITE_OUT) + 4 * row, 1 if -EVERYTHING <= total <= EVERYTHING else 0)


@_compiled
def _start(frame):
    """Arguments: logits, temperature, top_k, top_p, cutoff, bits, num_rows; results: token, best, cutoff, finite,
    scratch."""
    scratch = ffi.result(frame, 4)
    job = ffi.data(scratch)
    fields = (LOGITS, TEMPERATURE, TOP_K, TOP_P, CUTOFF, BITS)
    for i in range(6):
        v.store_i64(job + fields[i], ffi.data(ffi.argument(frame, i)))
    for i in range(4):
        v.store_i64(job + (TOKEN_OUT, BEST_OUT, CUTOFF_OUT, FINITE_OUT)[i], ffi.data(ffi.result(frame, i)))
    v.store_i64(job + VOCABULARY, ffi.dim(ffi.argument(frame, 0), 1))
    max_threads = ffi.int_attribute(frame, 0)
    v.store_i64(job + SCRATCH, job + 4 * HEAD_WORDS)
    v.store_i64(job + SCRATCH_STRIDE, 4 * ((ffi.dim(scratch, 0) - HEAD_WORDS) // max_threads))
    rows, num_rows = ffi.dim(ffi.argument(frame, 0), 0), v.load_i32(ffi.data(ffi.argument(frame, 6)))
    for row in range(num_rows, rows):
        v.store_i32(ffi.data(ffi.result(frame, 0)) + 4 * row, 0)
    threads.run(chunk_address(), job, min(rows, num_rows), max_threads)


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def chunk(job, row, thread):
    _row(job, row, v.load_i64(job + SCRATCH) + thread * v.load_i64(job + SCRATCH_STRIDE))
    return 0


def choose(logits_SV, temperature_S, top_k_S, top_p_S, cutoff_S, bits_S, num_rows, *, num_threads):
    """See `pallas_kernels.choose.choose`; cutoff_S is min_p's, num_threads the most that may work on it."""
    S, V = logits_SV.shape
    num_rows = jnp.int32(S) if num_rows is None else num_rows
    words = THREAD_WORDS + 2 * (-(-V // STEP) * STEP)
    token_S, best_S, cutoff_S, finite_S, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((S,), jnp.int32),
            jax.ShapeDtypeStruct((S,), jnp.float32),
            jax.ShapeDtypeStruct((S,), jnp.float32),
            jax.ShapeDtypeStruct((S,), jnp.int32),
            jax.ShapeDtypeStruct((HEAD_WORDS + num_threads * words,), jnp.float32),
        ],
    )(logits_SV, temperature_S, top_k_S, top_p_S, cutoff_S, bits_S, num_rows, threads=np.int32(num_threads))
    return token_S, best_S, cutoff_S, finite_S != 0
