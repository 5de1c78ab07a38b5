"""The CPU kernel behind `pallas_kernels.ragged_paged_attention`: reads pages where they lie.

First the step's keys (normalised and rotated, where asked) and values are written into their pages; then tasks
of one row, one kv head and up to QUERY_ROWS query vectors walk the row's keys in blocks of BLOCK with a running
softmax. A block's keys are widened and transposed once, so that both products run as outer products of float32.

Blocks start at multiples of BLOCK in the row's own positions and every sum walks them in order, with exact zeros
for what a query may not see. So the bits of an output depend on its query and its past alone: not on pages, nor
on the batch, nor on how a prompt was cut into chunks.

Source: Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135.

Dimension key
    T  tokens     S  rows     N  query heads     K  kv heads     G  N / K     H  head dimension
    X  what a token brings a kv head: G queries, a key, a value           R  rotated pairs
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np

from pallas_kernels.cpu import arrays, ffi, outer, pairs, threads, tiles
from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.ffi import BF16, F8E4M3FN, F8E5M2, S8
from pallas_kernels.ragged_paged_attention import scales as page_scales

TARGET = "jax_serving_cpu_attention_3"
WRITE_CHUNK, ATTEND_CHUNK = "jax_serving_cpu_attention_write_3", "jax_serving_cpu_attention_attend_3"
BLOCK = 64  # keys; part of what an output's bits depend on
QUERY_ROWS = 96  # query vectors a task: enough to pay for widening the keys
WRITE_TOKENS = 16  # a chunk of the first phase
NO_WINDOW = 2**30
LINE = 64  # bytes in a cache line
MASKED = -1e30  # finite: -inf minus -inf is nan

# The job: one int64 a field, at the head of the scratch buffer.
(
    Q, KEY, VALUE, CACHE, KV_LENS, TABLE, CU_Q_LENS, SINKS, ROPE, Q_NORM, K_NORM, OUT,
    INPUT_DTYPE, CACHE_DTYPE, OUT_DTYPE, NORM_DTYPE,
    Q_TOKEN, Q_GROUP, KV_TOKEN, KV_HEAD,
    T, ROWS, M, P, B, C, K, G, H, R, PAGE_OFFSET, WINDOW, QUERIES, SCRATCH, SCRATCH_STRIDE, STARTS, TASKS, JOINT,
    SCALED,
) = range(0, 8 * 39, 8)  # fmt: skip
SCALE, SOFT_CAP, K_SCALE, V_SCALE, EPS, NORM_OFFSET = range(8 * 39, 8 * 45, 8)
HEAD_WORDS = 96  # float32 words before the tasks' table

FLOATS, INTS = 0, 1  # attributes, in alphabetical order
write_address, attend_address = v.external(WRITE_CHUNK), v.external(ATTEND_CHUNK)
_compiled = v.inner
_transpose_f32, _transpose_i8, _transpose_e4m3, _transpose_e5m2 = (
    tiles.transpose_tile(kind) for kind in ("f32", "i8", "e4m3", "e5m2")
)


@_compiled
def _normalise(job, norm, target):
    """Scales a head's vector to unit mean square, in place, where there is a norm."""
    if norm == 0:
        return
    size = v.load_i64(job + H)
    squares = v.splat(0.0)
    for h in range(0, size, v.LANES):
        value = v.load_v(target + 4 * h)
        squares = v.fma(value, value, squares)
    mean = v.total(squares) / numba.float32(size)
    scale = v.splat(numba.float32(1.0) / v.square_root(mean + v.load_f32(job + EPS)))
    offset = v.splat(v.load_f32(job + NORM_OFFSET))
    for h in range(0, size, v.LANES):
        weight = v.add(arrays.get(norm, h, v.load_i64(job + NORM_DTYPE)), offset)
        v.store_v(target + 4 * h, v.mul(v.mul(v.load_v(target + 4 * h), scale), weight))


@_compiled
def _rotate(job, token, target):
    """Turns pair r, target[r] and target[r + R], by the token's angle, in place."""
    pairs = v.load_i64(job + R)
    table = v.load_i64(job + ROPE) + 8 * token * pairs
    for r in range(0, pairs, v.LANES):
        cos, sin = v.load_v(table + 4 * r), v.load_v(table + 4 * (pairs + r))
        x, y = v.load_v(target + 4 * r), v.load_v(target + 4 * (pairs + r))
        v.store_v(target + 4 * r, v.sub(v.mul(x, cos), v.mul(y, sin)))
        v.store_v(target + 4 * (pairs + r), v.fma(y, cos, v.mul(x, sin)))


@_compiled
def _load_vector(job, source, index, target):
    dtype, size = v.load_i64(job + INPUT_DTYPE), v.load_i64(job + H)
    for h in range(0, size, v.LANES):
        v.store_v(target + 4 * h, arrays.get(source, index + h, dtype))


@_compiled
def _itemsize(job):
    """Bytes of an element of the cache."""
    dtype = v.load_i64(job + CACHE_DTYPE)
    return 1 if dtype == F8E4M3FN or dtype == F8E5M2 else arrays.itemsize(dtype)


@_compiled
def _get_cached(address, index, dtype):
    """As arrays.get, of the cache."""
    if dtype == F8E4M3FN:
        return v.load_v_e4m3(address + index)
    if dtype == F8E5M2:
        return v.load_v_e5m2(address + index)
    return arrays.get(address, index, dtype)


@_compiled
def _put_cached(address, index, dtype, value):
    """As arrays.put, into the cache."""
    if dtype == F8E4M3FN:
        v.store_v_e4m3(address + index, value)
    elif dtype == F8E5M2:
        v.store_v_e5m2(address + index, value)
    else:
        arrays.put(address, index, dtype, value)


@_compiled
def _slot(job, row, position):
    """The address of a token's keys and values, or 0 when its page is not in the pool."""
    pool, page_size = v.load_i64(job + P), v.load_i64(job + B)
    column = position // page_size
    if position < 0 or column >= v.load_i64(job + M):
        return 0
    entry = v.load_i64(job + TABLE) + 4 * (row * v.load_i64(job + M) + column)
    page = v.load_i32(entry) + v.load_i64(job + PAGE_OFFSET)
    if page < 0 or page >= pool:
        return 0
    size = v.load_i64(job + C) * v.load_i64(job + H) * _itemsize(job)
    return v.load_i64(job + CACHE) + (page * page_size + position % page_size) * size


@_compiled
def _query_length(job, row):
    starts = v.load_i64(job + CU_Q_LENS)
    return v.load_i32(starts + 4 * (row + 1)) - v.load_i32(starts + 4 * row)


@_compiled
def _write(job, chunk, thread):
    starts, heads, size = v.load_i64(job + CU_Q_LENS), v.load_i64(job + K), v.load_i64(job + H)
    dtype = v.load_i64(job + CACHE_DTYPE)
    vector = v.load_i64(job + SCRATCH) + thread * v.load_i64(job + SCRATCH_STRIDE)
    scales = (
        v.splat(numba.float32(1.0) / v.load_f32(job + K_SCALE)),
        v.splat(numba.float32(1.0) / v.load_f32(job + V_SCALE)),
    )
    row = 0
    for token in range(chunk * WRITE_TOKENS, min((chunk + 1) * WRITE_TOKENS, v.load_i64(job + T))):
        while v.load_i32(starts + 4 * (row + 1)) <= token:
            row += 1
        position = v.load_i32(v.load_i64(job + KV_LENS) + 4 * row) - v.load_i32(starts + 4 * (row + 1)) + token
        slot = _slot(job, row, position)
        if slot == 0:
            continue
        for head in range(heads):
            index = token * v.load_i64(job + KV_TOKEN) + head * v.load_i64(job + KV_HEAD)
            _load_vector(job, v.load_i64(job + KEY), index, vector)
            _normalise(job, v.load_i64(job + K_NORM), vector)
            _rotate(job, token, vector)
            values = vector + 4 * size
            _load_vector(job, v.load_i64(job + VALUE), index, values)
            if v.load_i64(job + SCALED):
                places = slot + 2 * heads * size + 8 * head  # of the two scales
                scales = v.splat(_keep_scale(vector, size, places)), v.splat(_keep_scale(values, size, places + 4))
            for h in range(0, size, v.LANES):
                key, value = v.load_v(vector + 4 * h), v.load_v(values + 4 * h)
                if _itemsize(job) == 1:
                    key, value = v.mul(key, scales[0]), v.mul(value, scales[1])
                _put_cached(slot, 2 * head * size + h, dtype, key)
                _put_cached(slot, (2 * head + 1) * size + h, dtype, value)
    return 0


@_compiled
def _keep_scale(vector, size, place):
    """Stores what one int8 step of a float32 vector is worth; returns its inverse, 0 for a vector of zeros."""
    top = v.splat(0.0)
    for h in range(0, size, v.LANES):
        value = v.load_v(vector + 4 * h)
        top = v.maximum(top, v.maximum(value, v.sub(v.splat(0.0), value)))
    scale = v.largest(top) / numba.float32(127.0)
    v.store_f32(place, scale)
    return numba.float32(1.0) / scale if scale > 0 else numba.float32(0.0)


@_compiled
def _find_task(job, task):
    """The row a task belongs to: the last whose first task is not after it."""
    starts, low, high = v.load_i64(job + STARTS), 0, v.load_i64(job + ROWS) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if v.load_i32(starts + 4 * middle) <= task:
            low = middle
        else:
            high = middle - 1
    return low


@_compiled
def _in_words(job):
    """Whether keys and values are bfloat16, and a block of them is kept in words of two."""
    return v.load_i64(job + CACHE_DTYPE) == BF16


@_compiled
def _in_pairs(job):
    """Whether both products are of pairs of bfloat16: of queries and keys, of weights and values."""
    return v.MULTIPLIES_PAIRS and _in_words(job) and v.load_i64(job + INPUT_DTYPE) == BF16


@_compiled
def _load_queries(job, head, token, queries, target):
    """Queries of one kv head, normalised, rotated and scaled: row j * G + g."""
    groups, size = v.load_i64(job + G), v.load_i64(job + H)
    scale = v.load_f32(job + SCALE)
    if _itemsize(job) == 1:
        scale *= v.load_f32(job + K_SCALE)
    for j in range(queries):
        for g in range(groups):
            place = target + 4 * size * (j * groups + g)
            index = (token + j) * v.load_i64(job + Q_TOKEN) + head * v.load_i64(job + Q_GROUP) + g * size
            _load_vector(job, v.load_i64(job + Q), index, place)
            _normalise(job, v.load_i64(job + Q_NORM), place)
            _rotate(job, token + j, place)
            for h in range(0, size, v.LANES):
                v.store_v(place + 4 * h, v.mul(v.load_v(place + 4 * h), v.splat(scale)))
    if _in_pairs(job):
        pairs.narrow(target, queries * groups, size)


@_compiled
def _locate_keys(job, row, start, oldest, end, zeros, places):
    """Notes where each token of the block at `start` lies in the cache, if some query of the tile sees it.

    For tokens outside [oldest, end) it notes zeros: their pages may be no longer, or not yet, this row's.
    """
    size = v.load_i64(job + H) * _itemsize(job)
    step, page_size = size * v.load_i64(job + C), v.load_i64(job + B)
    first, keys = max(0, oldest - start), max(0, min(BLOCK, end - start))
    for i in range(first):
        v.store_i64(places + 8 * i, zeros)
    i = first
    while i < keys:
        slot = _slot(job, row, start + i)
        in_page = min(keys, i + page_size - (start + i) % page_size)
        place = slot if slot else zeros
        while i < in_page:
            v.store_i64(places + 8 * i, place)
            place += step if slot else 0
            i += 1
    for i in range(keys, BLOCK):
        v.store_i64(places + 8 * i, zeros)


@_compiled
def _locate_first_keys(job, task, zeros, places):
    """The same for the first block of a task that is a whole row."""
    row = _find_task(job, task)
    length, end = _query_length(job, row), v.load_i32(v.load_i64(job + KV_LENS) + 4 * row)
    oldest = max(0, end - v.load_i64(job + WINDOW))
    if _is_joint(job, length):
        _locate_keys(job, row, oldest // BLOCK * BLOCK, oldest, end, zeros, places)


@_compiled
def _widen_keys(job, head, places, following, keys, k_HU, v_UH, fetched, num_bytes, first, middle, last):
    """One head's keys transposed to [H, BLOCK] and its values to [BLOCK, H]: float32, or words of two bfloat16.

    Meanwhile the following block is fetched, a little at a time: all at once would stall. For the last five arguments
    see `pairs.unpack`.
    """
    size, dtype = v.load_i64(job + H), v.load_i64(job + CACHE_DTYPE)
    itemsize = _itemsize(job)
    half = size * itemsize
    key = 2 * head * half  # bytes into a token
    if _in_words(job):
        ahead = fetched, num_bytes, first, middle, last
        pairs.unpack(places, following, key, size, keys, BLOCK, k_HU, v_UH, *ahead)
        return
    for u in range(0, keys, 8):
        for h in range(0, size, 8):
            target = k_HU + 4 * (h * BLOCK + u)
            if dtype == S8:
                _transpose_i8(places + 8 * u, key + h, target, 4 * BLOCK)
            elif dtype == F8E4M3FN:
                _transpose_e4m3(places + 8 * u, key + h, target, 4 * BLOCK)
            elif dtype == F8E5M2:
                _transpose_e5m2(places + 8 * u, key + h, target, 4 * BLOCK)
            else:
                _transpose_f32(places + 8 * u, key + 4 * h, target, 4 * BLOCK)
            ahead = v.load_i64(following + 8 * u + h % 64) + key
            for line in range(h // 64 * LINE, 2 * half, (size + 63) // 64 * LINE):
                v.fetch(ahead + line)
    for u in range(keys):
        source = v.load_i64(places + 8 * u) + key + half
        for h in range(0, size, v.LANES):
            v.store_v(v_UH + 4 * (u * size + h), _get_cached(source, h, dtype))
    if v.load_i64(job + SCALED):
        _scale_keys(job, head, places, keys, k_HU, v_UH)


@_compiled
def _scale_keys(job, head, places, keys, k_HU, v_UH):
    """Multiplies each key and value of a block by the scale that lies behind its token's vectors."""
    size, behind = v.load_i64(job + H), 2 * v.load_i64(job + K) * v.load_i64(job + H) + 8 * head
    k_scales = v_UH + 4 * BLOCK * size
    for u in range(keys):
        place = v.load_i64(places + 8 * u) + behind
        v.store_f32(k_scales + 4 * u, v.load_f32(place))
        v_scale = v.splat(v.load_f32(place + 4))
        for h in range(0, size, v.LANES):
            at = v_UH + 4 * (u * size + h)
            v.store_v(at, v.mul(v.load_v(at), v_scale))
    for u in range(0, keys, v.LANES):
        scales = v.load_v(k_scales + 4 * u)
        for h in range(size):
            at = k_HU + 4 * (h * BLOCK + u)
            v.store_v(at, v.mul(v.load_v(at), scales))


@_compiled
def _soften(job, scores, columns, first, limit, peak, out):
    """One query's scores against one block become weights; its running peak, sum and output follow.

    Keys [first, limit) of the block are seen. At `peak` lie the running maximum and the running sum.
    """
    soft_cap, masked = v.load_f32(job + SOFT_CAP), v.splat(MASKED)
    edge, narrow = first > 0 or limit < columns, _in_pairs(job)
    low, high = v.splat(numba.float32(first) - numba.float32(0.5)), v.splat(numba.float32(limit) - numba.float32(0.5))
    top = masked
    for u in range(0, columns, v.LANES):
        score = v.load_v(scores + 4 * u)
        if soft_cap > 0:
            # c * tanh(x) is c - 2 c / (exp(2 x) + 1).
            bound = v.splat(soft_cap)
            grown = v.exp(v.div(v.add(score, score), bound))
            score = v.sub(bound, v.div(v.add(bound, bound), v.add(grown, v.splat(1.0))))
        if edge:
            index = v.count_from(numba.float32(u))
            score = v.where_above(index, low, v.where_above(high, index, score, masked), masked)
        v.store_v(scores + 4 * u, score)
        top = v.maximum(top, score)
    before = v.load_f32(peak)
    highest = max(before, v.largest(top))
    sums, shift, unseen = v.splat(0.0), v.splat(highest), v.splat(MASKED * 0.5)
    for u in range(0, columns, v.LANES):
        score = v.load_v(scores + 4 * u)
        weight = v.where_above(score, unseen, v.exp(v.sub(score, shift)), v.splat(0.0))
        sums = v.add(sums, weight)
        if narrow:
            v.store_v_bf16(scores + 2 * u, weight)
        else:
            v.store_v(scores + 4 * u, weight)
    decay = v.exp(v.splat(before - highest))
    v.store_f32(peak, highest)
    v.store_f32(peak + 4, v.load_f32(peak + 4) * v.first(decay) + v.total(sums))
    if before != highest:
        for h in range(0, v.load_i64(job + H), v.LANES):
            v.store_v(out + 4 * h, v.mul(v.load_v(out + 4 * h), decay))


@_compiled
def _fetch(job, following, offset, num_bytes, first, end):
    """`pairs.fetch` where a block's words are; returns end."""
    if first < end and _in_words(job):
        pairs.fetch(following, offset, num_bytes, first, end)
    return end


@_compiled
def _multiply(job, rows, a, a_stride, b, b_stride, count, columns, c, more):
    """c[rows, columns] (+)= a[rows, count] @ b[count, columns], where b is a block's keys or values; see `outer`."""
    if _in_pairs(job):
        outer.pairs(rows, a, a_stride, b, b_stride, count // 2, columns, c, b_stride, more)
    elif _in_words(job):
        outer.halves(rows, a, a_stride, b, b_stride, count // 2, columns, c, b_stride, more)
    else:
        outer.floats(rows, a, a_stride, b, b_stride, count, columns, c, b_stride, more)


@_compiled
def _attend(job, chunk, thread):
    last = v.load_i64(job + TASKS) - 1
    task, upcoming = last - chunk, last - chunk - threads.ahead(thread)  # the last tiles of a prompt see most: first
    row = _find_task(job, task)
    within = task - v.load_i32(v.load_i64(job + STARTS) + 4 * row)
    groups, size, length = v.load_i64(job + G), v.load_i64(job + H), _query_length(job, row)
    # A row that decodes is one task: its tokens are then read from end to end, which memory likes best.
    together = _is_joint(job, length)
    heads = v.load_i64(job + K) if together else 1
    head, tile = (0, 0) if together else (within % v.load_i64(job + K), within // v.load_i64(job + K))
    limit = v.load_i64(job + QUERIES)
    queries = min(limit, length - tile * limit)
    position = v.load_i32(v.load_i64(job + KV_LENS) + 4 * row) - length + tile * limit  # of the tile's first query
    token = v.load_i32(v.load_i64(job + CU_Q_LENS) + 4 * row) + tile * limit
    rows = queries * groups

    q = v.load_i64(job + SCRATCH) + thread * v.load_i64(job + SCRATCH_STRIDE)
    scores = q + 4 * limit * groups * size
    out = scores + 4 * limit * groups * BLOCK
    keys_HU = out + 4 * limit * groups * size
    values_UH = keys_HU + 4 * BLOCK * size
    peaks = values_UH + 4 * BLOCK * size + 4 * BLOCK  # between them a block's scales of keys
    places = peaks + 8 * limit * groups
    other = places + 8 * BLOCK
    zeros = other + 8 * BLOCK
    for h in range(0, v.load_i64(job + C) * size, v.LANES):
        v.store_v(zeros + 4 * h, v.splat(0.0))
    window, q_stride = v.load_i64(job + WINDOW), (2 if _in_pairs(job) else 4) * size
    from_, num_bytes = 4 * head * size, 4 * heads * size  # of a token of bfloat16: what this task reads
    oldest, end = max(0, position - window + 1), position + queries  # keys that the tile sees
    start = oldest // BLOCK * BLOCK
    _locate_keys(job, row, start, oldest, end, zeros, places)
    for k in range(heads):
        _load_queries(job, head + k, token, queries, q + 4 * k * rows * size)
        _start_softmax(job, head + k, rows, peaks + 8 * k * rows, out + 4 * k * rows * size)

    while start < end:
        if start + BLOCK < end or not 0 <= upcoming <= last:
            _locate_keys(job, row, start + BLOCK, oldest, end, zeros, other)
        else:
            _locate_first_keys(job, upcoming, zeros, other)
        columns = (min(BLOCK, end - start) + v.LANES - 1) // v.LANES * v.LANES
        for k in range(heads):
            mine_q, line = q + 4 * k * rows * size, out + 4 * k * rows * size
            first, share = k * BLOCK // heads, (k + 1) * BLOCK // heads - k * BLOCK // heads
            ends = first + share * pairs.AFTER_KEYS // 64, first + share * pairs.AFTER_VALUES // 64
            _widen_keys(job, head + k, places, other, columns, keys_HU, values_UH, from_, num_bytes, first, *ends)
            _multiply(job, rows, mine_q, q_stride, keys_HU, 4 * BLOCK, size, columns, scores, 0)
            fetched = _fetch(job, other, from_, num_bytes, ends[1], first + share * pairs.AFTER_SCORES // 64)
            for i in range(rows):
                seen = position + i // groups + 1 - start
                unseen, peak = max(0, seen - window), peaks + 8 * (k * rows + i)
                _soften(job, scores + 4 * BLOCK * i, columns, unseen, seen, peak, line + 4 * i * size)
                part = pairs.AFTER_SCORES + (pairs.AFTER_WEIGHTS - pairs.AFTER_SCORES) * (i + 1) // rows
                fetched = _fetch(job, other, from_, num_bytes, fetched, first + share * part // 64)
            _multiply(job, rows, scores, 4 * BLOCK, values_UH, 4 * size, columns, size, line, 1)
            _fetch(job, other, from_, num_bytes, fetched, first + share)
        start += BLOCK
        places, other = other, places

    for k in range(heads):
        _finish(job, head + k, token, rows, peaks + 8 * k * rows, out + 4 * k * rows * size)
    return 0


@_compiled
def _is_joint(job, length):
    """Whether a row is one task for all its heads."""
    return length == 1 and v.load_i64(job + JOINT) != 0


@_compiled
def _start_softmax(job, head, rows, peaks, out):
    """Running maxima and sums as before the first key: a sink counts as one without a value."""
    sinks, groups, size = v.load_i64(job + SINKS), v.load_i64(job + G), v.load_i64(job + H)
    for i in range(rows):
        v.store_f32(peaks + 8 * i, v.load_f32(sinks + 4 * (head * groups + i % groups)) if sinks else MASKED)
        v.store_f32(peaks + 8 * i + 4, 1.0 if sinks else 0.0)
    for i in range(0, rows * size, v.LANES):
        v.store_v(out + 4 * i, v.splat(0.0))


@_compiled
def _finish(job, head, token, rows, peaks, out):
    heads, groups, size = v.load_i64(job + K), v.load_i64(job + G), v.load_i64(job + H)
    value_scale = v.load_f32(job + V_SCALE) if _itemsize(job) == 1 else numba.float32(1.0)
    for i in range(rows):
        total = v.load_f32(peaks + 8 * i + 4)
        scale = v.splat(value_scale / total if total > 0 else numba.float32(0.0))
        index = (((token + i // groups) * heads + head) * groups + i % groups) * size
        for h in range(0, size, v.LANES):
            value = v.mul(v.load_v(out + 4 * (i * size + h)), scale)
            arrays.put(v.load_i64(job + OUT), index + h, v.load_i64(job + OUT_DTYPE), value)


@_compiled
def _data(buffer):
    return ffi.data(buffer) if ffi.size(buffer) > 0 else 0


@_compiled
def _start(frame):
    """Arguments: q, k, v, cache, kv_lens, page table, cu_q_lens, counts, page offset, window, sinks, kv scales,
    rope tables, rope index, q norm, k norm. Results: out, cache, scratch."""
    out, cache, scratch = ffi.result(frame, 0), ffi.result(frame, 1), ffi.result(frame, 2)
    job = ffi.data(scratch)
    sinks, norm, ropes = ffi.argument(frame, 10), ffi.argument(frame, 14), ffi.argument(frame, 12)
    scales, table = ffi.data(ffi.argument(frame, 11)), ffi.argument(frame, 5)
    itemsize = arrays.itemsize(ffi.dtype(ffi.argument(frame, 0)))
    for i in range(3):
        v.store_i64(job + (Q, KEY, VALUE)[i], ffi.data(ffi.argument(frame, i)) + ffi.int_in(frame, INTS, i) * itemsize)
    for i in range(4):
        v.store_i64(job + (Q_TOKEN, Q_GROUP, KV_TOKEN, KV_HEAD)[i], ffi.int_in(frame, INTS, 3 + i))
    heads, queries, max_threads = ffi.int_in(frame, INTS, 7), ffi.int_in(frame, INTS, 8), ffi.int_in(frame, INTS, 9)
    v.store_i64(job + SCALED, ffi.int_in(frame, INTS, 10))
    for i in range(4):
        v.store_f32(job + (SCALE, SOFT_CAP, EPS, NORM_OFFSET)[i], ffi.float_in(frame, FLOATS, i))
    v.store_i64(job + CACHE, ffi.data(cache))
    v.store_i64(job + KV_LENS, ffi.data(ffi.argument(frame, 4)))
    v.store_i64(job + TABLE, ffi.data(table))
    v.store_i64(job + CU_Q_LENS, ffi.data(ffi.argument(frame, 6)))
    v.store_i64(job + SINKS, _data(sinks))
    v.store_i64(job + Q_NORM, _data(norm))
    v.store_i64(job + K_NORM, _data(ffi.argument(frame, 15)))
    v.store_i64(job + OUT, ffi.data(out))
    v.store_i64(job + INPUT_DTYPE, ffi.dtype(ffi.argument(frame, 0)))
    v.store_i64(job + CACHE_DTYPE, ffi.dtype(cache))
    v.store_i64(job + OUT_DTYPE, ffi.dtype(out))
    v.store_i64(job + NORM_DTYPE, ffi.dtype(norm))

    rows = min(v.load_i32(ffi.data(ffi.argument(frame, 7)) + 4), ffi.dim(table, 0))
    tokens = min(v.load_i32(v.load_i64(job + CU_Q_LENS) + 4 * rows), ffi.dim(out, 0))
    pairs = ffi.dim(ropes, 3) if ffi.size(ropes) > 0 else 0
    index = v.load_i32(ffi.data(ffi.argument(frame, 13)))
    v.store_i64(job + R, pairs)
    v.store_i64(job + ROPE, ffi.data(ropes) + 8 * index * ffi.dim(ropes, 1) * pairs)
    v.store_i64(job + T, tokens)
    v.store_i64(job + ROWS, rows)
    v.store_i64(job + M, ffi.dim(table, 1))
    for i in range(4):
        v.store_i64(job + (P, B, C, H)[i], ffi.dim(cache, i))
    v.store_i64(job + K, heads)
    v.store_i64(job + G, ffi.dim(out, 1) // heads)
    v.store_i64(job + PAGE_OFFSET, v.load_i32(ffi.data(ffi.argument(frame, 8))))
    v.store_i64(job + WINDOW, v.load_i32(ffi.data(ffi.argument(frame, 9))))
    v.store_f32(job + K_SCALE, v.load_f32(scales))
    v.store_f32(job + V_SCALE, v.load_f32(scales + 4))
    v.store_i64(job + QUERIES, queries)
    starts = job + 4 * HEAD_WORDS
    table_words = (ffi.dim(table, 0) + 15) // 16 * 16
    v.store_i64(job + STARTS, starts)
    v.store_i64(job + SCRATCH, starts + 4 * table_words)
    v.store_i64(job + SCRATCH_STRIDE, 4 * ((ffi.dim(scratch, 0) - HEAD_WORDS - table_words) // max_threads))
    decodes = v.load_i32(ffi.data(ffi.argument(frame, 7)))
    v.store_i64(job + JOINT, 1 if decodes >= max_threads and heads <= queries else 0)
    tasks = 0
    for row in range(rows):
        v.store_i32(starts + 4 * row, tasks)
        length = _query_length(job, row)
        tasks += 1 if _is_joint(job, length) else (length + queries - 1) // queries * heads
    v.store_i64(job + TASKS, tasks)
    threads.run(write_address(), job, (tokens + WRITE_TOKENS - 1) // WRITE_TOKENS, max_threads)
    threads.run(attend_address(), job, tasks, max_threads)


def handle(frame):
    if ffi.is_call(frame):
        _start(frame)
    return 0


def write(job, chunk, thread):
    return _write(job, chunk, thread)


def attend(job, chunk, thread):
    return _attend(job, chunk, thread)


def supports(head_dim, *dtypes) -> bool:
    """Whether heads of this size can be run; dtypes are those of the queries and of the cache."""
    x, cache = dtypes
    floats = (jnp.float32, jnp.bfloat16)
    known = cache in (*floats, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    return head_dim % (2 * v.LANES) == 0 and head_dim <= 512 and x in floats and known


def rotates(pairs) -> bool:
    return pairs % v.LANES == 0


def call(
    q, k, v_, cache_PBCH, kv_lens_S, page_table_SM, cu_q_lens_S1, counts_2, *,
    places, num_heads, num_kv_heads, scale, window, soft_cap, sinks_N, k_scale, v_scale, page_offset,
    ropes=None, rope_index=0, q_norm_H=None, k_norm_H=None, norm_eps=0.0, norm_offset=0.0, num_threads,
):  # fmt: skip
    """Calls the kernel; places: the element offsets of q, k, v, their strides by token and kv head: q, then k and v."""
    H, G, T, S = cache_PBCH.shape[-1], num_heads // num_kv_heads, q.shape[0], len(kv_lens_S)
    absent = jnp.zeros((0,), jnp.float32)
    queries = max(1, (QUERY_ROWS if H < 256 else QUERY_ROWS // 2) // G)
    rows = queries * G
    words = 2 * rows * H + rows * BLOCK + 2 * BLOCK * H + 2 * rows + 5 * BLOCK + cache_PBCH.shape[2] * H
    words = -(-words // 16) * 16
    scaled = page_scales.are_in(cache_PBCH, num_kv_heads)
    out_TNH, cache_PBCH, _ = jax.ffi.ffi_call(
        TARGET,
        [
            jax.ShapeDtypeStruct((T, num_heads, H), q.dtype),
            jax.ShapeDtypeStruct(cache_PBCH.shape, cache_PBCH.dtype),
            jax.ShapeDtypeStruct((HEAD_WORDS + -(-S // 16) * 16 + num_threads * words,), jnp.float32),
        ],
        input_output_aliases={3: 1},
    )(
        q,
        k,
        v_,
        cache_PBCH,
        kv_lens_S,
        page_table_SM,
        cu_q_lens_S1,
        counts_2,
        jnp.asarray(page_offset, jnp.int32),
        jnp.asarray(NO_WINDOW if window is None else window, jnp.int32),
        absent if sinks_N is None else sinks_N.astype(jnp.float32),
        jnp.stack([jnp.asarray(1.0 if s is None else s, jnp.float32) for s in (k_scale, v_scale)]),
        jnp.zeros((0, 0, 2, 0), jnp.float32) if ropes is None else ropes,
        jnp.asarray(rope_index, jnp.int32),
        absent if q_norm_H is None else q_norm_H,
        absent if k_norm_H is None else k_norm_H,
        floats=np.array([scale, soft_cap or 0.0, norm_eps, norm_offset], np.float32),
        ints=np.array([*places, num_kv_heads, queries, num_threads, scaled], np.int32),
    )
    return out_TNH, cache_PBCH
