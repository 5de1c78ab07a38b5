"""Machine words for kernels written in numba: memory by address, float32 vectors, atomics.

Numba compiles plain Python loops; what it does not offer is written here as a few lines of LLVM each. Addresses
are plain integers. A `Vector` holds LANES float32 and lives in a register; bfloat16 is widened on load and
rounded to nearest even on store.
"""

import inspect
import platform

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model


def _cpu_features() -> set[str]:
    """What numba compiles for: this CPU, or what NUMBA_CPU_FEATURES names ("+avx2,-avx512f,...")."""
    chosen = numba.config.CPU_FEATURES
    if chosen is None:
        return {name for name, is_there in llvmlite.binding.get_host_cpu_features().items() if is_there}
    return {word[1:] for word in chosen.split(",") if word.startswith("+")}


def _cpu_name() -> str:
    return numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()


_features = _cpu_features()
HAS_AVX2 = "avx2" in _features
LANES = 16 if "avx512f" in _features else 8
HAS_BF16 = LANES == 16 and "avx512bf16" in _features
# Whether products of pairs of bfloat16 multiply fastest: on AMD's cores. On Intel's one of them takes as long as four
# of float32, which multiply twice as much (Emerald Rapids, 2026: 165 GFLOP/s of pairs, 275 of widened halves).
MULTIPLIES_PAIRS = HAS_BF16 and _cpu_name().startswith("znver")
HAS_BYTE_DOT = LANES == 16 and "avx512vnni" in _features  # products of fours of bytes, added to an int32
WIDTH = 4 * LANES  # bytes in a register


class BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloatType)

    def __hash__(self):
        return hash(BFloatType)


I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF32, VI32, VI16 = (ir.VectorType(t, LANES) for t in (F32, I32, I16))
VBF16 = ir.VectorType(BFloatType(), 2 * LANES)


class Vector(types.Type):
    def __init__(self):
        super().__init__(name=f"f32x{LANES}")


@register_model(Vector)
class VectorModel(PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, VF32)


vector = Vector()

# Compiles a function that only compiled code calls: without entrances from Python and C, in half the time.
inner = numba.njit(error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def op(result, *params):
    """Makes `emit(builder, *values) -> value` callable from compiled code, with these numba types."""

    def decorate(emit):
        def typed(context, *args):
            return result(*params), lambda _, builder, signature, values: _or_none(_emit(builder, values))

        def _emit(builder, values):
            # Without it LLVM deletes `address + 0`: it may take the constant 0 for the pointer, address for its index.
            set.add(builder.function.attributes, "null_pointer_is_valid")
            return emit(builder, *values)

        typed.__signature__ = inspect.signature(emit)  # the builder stands where numba puts its typing context
        typed.__name__ = typed.__qualname__ = emit.__name__
        typed.__module__ = emit.__module__
        return intrinsic(typed)

    return decorate


def _or_none(value):
    return ir.Constant(ir.IntType(8).as_pointer(), None) if value is None else value


def at(b, address, t):
    """The LLVM pointer to a value of type t at an integer address."""
    return b.inttoptr(address, t.as_pointer())


def load(b, address, t, align):
    return b.load(at(b, address, t), align=align)


def store(b, value, address, align):
    b.store(value, at(b, address, value.type), align=align)


def call(b, name, result, *args):
    """Calls an LLVM intrinsic or a C function."""
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def prefetch(b, address, level=1):
    """Starts to fetch a cache line, into the first or the second level; any address will do, nothing is read."""
    hint = [ir.Constant(I32, n) for n in (0, 4 - level, 1)]  # to read, how near, data
    call(b, "llvm.prefetch.p0", ir.VoidType(), at(b, address, I8), *hint)


def constant(t, value):
    return ir.Constant(t, [value] * t.count if isinstance(t, ir.VectorType) else value)


def widen_bf16(b, bits):
    """bfloat16 bits (a vector of i16) -> float32: the upper half of the word."""
    wide = ir.VectorType(I32, bits.type.count)
    return b.bitcast(b.shl(b.zext(bits, wide), constant(wide, 16)), ir.VectorType(F32, bits.type.count))


def narrow_bf16(b, value):
    """float32 -> bfloat16 bits, to nearest even; NaN stays NaN."""
    if HAS_BF16 and value.type.count == LANES:
        t = ir.VectorType(BFloatType(), LANES)
        return b.bitcast(call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", t, value), VI16)
    wide = ir.VectorType(I32, value.type.count)
    bits = b.bitcast(value, wide)
    odd = b.and_(b.lshr(bits, constant(wide, 16)), constant(wide, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, constant(wide, 0x7FFF))), constant(wide, 16))
    rounded = b.select(b.fcmp_unordered("uno", value, value), constant(wide, 0x7FC0), rounded)
    return b.trunc(rounded, ir.VectorType(I16, value.type.count))


# Kind -> (mantissa bits, exponent bias, largest finite value): one byte of sign, exponent, mantissa.
FLOAT8 = {"e4m3": (3, 7, 448.0), "e5m2": (2, 15, 57344.0)}


def widen_float8(b, bits, kind):
    """float8 bits (a vector of i8) -> float32; what is infinite or no number comes out as some number."""
    mantissa, bias, _ = FLOAT8[kind]
    wide = ir.VectorType(I32, bits.type.count)
    floats = ir.VectorType(F32, bits.type.count)
    bits = b.zext(bits, wide)
    size = b.and_(bits, constant(wide, 0x7F))
    normal = b.add(b.shl(size, constant(wide, 23 - mantissa)), constant(wide, (127 - bias) << 23))
    small = b.fmul(b.uitofp(size, floats), constant(floats, 2.0 ** (1 - bias - mantissa)))  # exponent 0: whole steps
    is_small = b.icmp_unsigned("<", size, constant(wide, 1 << mantissa))
    value = b.select(is_small, b.bitcast(small, wide), normal)
    return b.bitcast(b.or_(value, b.shl(b.and_(bits, constant(wide, 0x80)), constant(wide, 24))), floats)


def narrow_float8(b, value, kind):
    """float32 -> float8 bits, to nearest even; what the kind cannot hold saturates."""
    mantissa, bias, top = FLOAT8[kind]
    wide, t = ir.VectorType(I32, value.type.count), value.type
    bits = b.bitcast(value, wide)
    sign = b.and_(b.lshr(bits, constant(wide, 24)), constant(wide, 0x80))
    size = b.bitcast(b.and_(bits, constant(wide, 0x7FFFFFFF)), t)
    size = b.select(b.fcmp_ordered("<", size, constant(t, top)), size, constant(t, top))
    drop = 23 - mantissa
    bits = b.bitcast(size, wide)
    odd = b.and_(b.lshr(bits, constant(wide, drop)), constant(wide, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, constant(wide, (1 << (drop - 1)) - 1))), constant(wide, drop))
    normal = b.sub(rounded, constant(wide, (127 - bias) << mantissa))
    steps = b.fmul(size, constant(t, 2.0 ** (bias + mantissa - 1)))
    small = b.fptosi(call(b, f"llvm.rint.v{t.count}f32", t, steps), wide)
    is_small = b.fcmp_ordered("<", size, constant(t, 2.0 ** (1 - bias)))
    return b.trunc(b.or_(b.select(is_small, small, normal), sign), ir.VectorType(I8, t.count))


def spread(b, value):
    """A scalar in every lane."""
    t = ir.VectorType(value.type, LANES)
    one = b.insert_element(ir.Constant(t, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(t, ir.Undefined), constant(VI32, 0))


def load_wide(b, address, kind, count):
    """`count` elements of a kind ("bf16", "f32", "i8", or one of FLOAT8) as float32."""
    if kind == "f32":
        return load(b, address, ir.VectorType(F32, count), 4)
    if kind == "bf16":
        return widen_bf16(b, load(b, address, ir.VectorType(I16, count), 2))
    bits = load(b, address, ir.VectorType(I8, count), 1)
    if kind in FLOAT8:
        return widen_float8(b, bits, kind)
    bits = b.sext(bits, ir.VectorType(I32, count))
    return b.sitofp(bits, ir.VectorType(F32, count))


def shuffle(b, x, y, indices):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(indices)), list(indices)))


def fold(b, value, combine):
    """Reduces a vector to a scalar, halving it: the order depends on nothing but its length."""
    count = value.type.count
    while count > 1:
        count //= 2
        value = combine(shuffle(b, value, value, range(count)), shuffle(b, value, value, range(count, 2 * count)))
    return b.extract_element(value, ir.Constant(I32, 0))


def totals(b, values):
    """The sums of 16 vectors of 16 lanes, each added up in the order of `fold`, as one vector.

    That of vector 4 * i + j is in lane 4 * j + i.
    """

    def halved(pick):
        """Adds the halves of what is left of each vector; two vectors become one."""
        first, second = pick
        return [
            add(shuffle(b, x, y, first), shuffle(b, x, y, second))
            for x, y in zip(values[::2], values[1::2], strict=True)
        ]

    def by_quarter(*picks):
        return [[16 * side + 4 * quarter + i for side, quarter in pick for i in range(4)] for pick in picks]

    def in_quarters(*picks):
        return [[16 * side + 4 * quarter + i for quarter in range(4) for side, i in pick] for pick in picks]

    add = b.fadd if values[0].type.element == F32 else b.add
    outer = [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 2), (0, 3), (1, 2), (1, 3)]
    inner = [(0, 0), (0, 2), (1, 0), (1, 2)], [(0, 1), (0, 3), (1, 1), (1, 3)]
    for cut in (by_quarter(*outer), by_quarter(*inner), in_quarters(*outer), in_quarters(*inner)):
        values = halved(cut)
    return values[0]


# Scalars in memory


@op(types.intp, types.intp)
def load_i32(b, address):
    return b.sext(load(b, address, I32, 4), I64)


@op(types.intp, types.intp)
def load_i64(b, address):
    return load(b, address, I64, 8)


@op(types.float32, types.intp)
def load_f32(b, address):
    return load(b, address, F32, 4)


@op(types.none, types.intp, types.intp)
def store_i32(b, address, value):
    store(b, b.trunc(value, I32), address, 4)


@op(types.none, types.intp, types.intp)
def store_i64(b, address, value):
    store(b, value, address, 8)


@op(types.none, types.intp, types.float32)
def store_f32(b, address, value):
    store(b, value, address, 4)


@op(types.none, types.intp)
def fetch(b, address):
    prefetch(b, address)


@op(types.none, types.intp)
def fetch_for_later(b, address):
    """As `fetch`, no nearer than the second level of caches."""
    prefetch(b, address, level=2)


# Vectors


@op(vector, types.float32)
def splat(b, value):
    return spread(b, value)


@op(vector, types.intp)
def load_v(b, address):
    return load_wide(b, address, "f32", LANES)


@op(vector, types.intp)
def load_v_bf16(b, address):
    return load_wide(b, address, "bf16", LANES)


@op(vector, types.intp)
def load_v_i8(b, address):
    return load_wide(b, address, "i8", LANES)


@op(vector, types.intp)
def load_v_e4m3(b, address):
    return load_wide(b, address, "e4m3", LANES)


@op(vector, types.intp)
def load_v_e5m2(b, address):
    return load_wide(b, address, "e5m2", LANES)


@op(types.none, types.intp, vector)
def store_v_e4m3(b, address, value):
    store(b, narrow_float8(b, value, "e4m3"), address, 1)


@op(types.none, types.intp, vector)
def store_v_e5m2(b, address, value):
    store(b, narrow_float8(b, value, "e5m2"), address, 1)


def _narrow_i8(b, value):
    value = call(b, f"llvm.rint.v{LANES}f32", VF32, value)
    for limit, sign in ((127.0, ">"), (-127.0, "<")):
        value = b.select(b.fcmp_ordered(sign, value, constant(VF32, limit)), constant(VF32, limit), value)
    return b.trunc(b.fptosi(value, VI32), ir.VectorType(I8, LANES))


@op(types.none, types.intp, vector)
def store_v_i8(b, address, value):
    """Rounds to even; what int8 cannot hold saturates at +-127."""
    store(b, _narrow_i8(b, value), address, 1)


@op(types.none, types.intp, vector)
def store_v_u8(b, address, value):
    """As `store_v_i8`, plus 128: what products of bytes want on one side."""
    bits = _narrow_i8(b, value)
    store(b, b.xor(bits, constant(bits.type, -128)), address, 1)


@op(types.none, types.intp, vector)
def store_v(b, address, value):
    store(b, value, address, 4)


@op(types.none, types.intp, vector)
def store_v_bf16(b, address, value):
    store(b, narrow_bf16(b, value), address, 2)


@op(vector, vector, vector)
def add(b, x, y):
    return b.fadd(x, y)


@op(vector, vector, vector)
def sub(b, x, y):
    return b.fsub(x, y)


@op(vector, vector, vector)
def mul(b, x, y):
    return b.fmul(x, y)


@op(vector, vector, vector)
def div(b, x, y):
    return b.fdiv(x, y)


@op(vector, vector, vector)
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@op(vector, vector, vector, vector)
def fma(b, x, y, z):
    return fused(b, x, y, z)


@op(types.float32, vector)
def total(b, x):
    return fold(b, x, b.fadd)


@op(types.float32, vector)
def largest(b, x):
    return fold(b, x, lambda u, v: b.select(b.fcmp_ordered(">", u, v), u, v))


@op(types.boolean, vector, vector)
def any_reaches(b, x, y):
    """Whether some element of x is at least y's; never where either is NaN."""
    bits = b.bitcast(b.fcmp_ordered(">=", x, y), ir.IntType(LANES))
    return b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


@op(types.float32, types.float32)
def square_root(b, x):
    return call(b, "llvm.sqrt.f32", F32, x)


@op(vector, vector)
def exp(b, x):
    """e ** x to about 1e-7 of its value; 0 below -87, where float32 ends."""
    return exponential(b, x)


@op(vector, types.float32)
def count_from(b, start):
    """start, start + 1, ..., one a lane."""
    return b.fadd(spread(b, start), ir.Constant(VF32, [float(i) for i in range(LANES)]))


@op(vector, vector, vector, vector, vector)
def where_above(b, x, y, yes, no):
    """yes where x > y, else no."""
    return b.select(b.fcmp_ordered(">", x, y), yes, no)


def fused(b, x, y, z):
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def exponential(b, x):
    """Cody-Waite reduction to |r| <= ln(2)/2, a polynomial (Cephes' expf coefficients), then scaling by 2 ** n."""
    c = lambda value: constant(VF32, value)
    low = b.fcmp_ordered("<", x, c(-87.0))
    x = b.select(low, c(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, c(88.0)), c(88.0), x)
    n = call(b, f"llvm.rint.v{LANES}f32", VF32, b.fmul(x, c(1.44269504088896341)))
    r = fused(b, n, c(-0.693359375), x)
    r = fused(b, n, c(2.12194440e-4), r)
    p = c(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fused(b, p, r, c(coefficient))
    p = b.fadd(fused(b, p, b.fmul(r, r), r), c(1.0))
    power = b.bitcast(b.shl(b.add(b.fptosi(n, VI32), constant(VI32, 127)), constant(VI32, 23)), VF32)
    return b.select(low, c(0.0), b.fmul(p, power))


# Threads


@op(types.intp, types.intp, types.intp)
def fetch_add(b, address, value):
    return b.atomic_rmw("add", at(b, address, I64), value, "seq_cst")


@op(types.intp, types.intp, types.intp)
def fetch_or(b, address, value):
    return b.atomic_rmw("or", at(b, address, I64), value, "seq_cst")


@op(types.intp, types.intp, types.intp)
def exchange(b, address, value):
    return b.atomic_rmw("xchg", at(b, address, I64), value, "seq_cst")


@op(types.boolean, types.intp, types.intp, types.intp)
def replace_if(b, address, expected, value):
    """Compare and swap; whether it swapped."""
    done = b.cmpxchg(at(b, address, I64), expected, value, "seq_cst", "seq_cst")
    return b.extract_value(done, 1)


@op(types.intp, types.intp)
def atomic_load(b, address):
    return b.load_atomic(at(b, address, I64), "seq_cst", 8)


@op(types.intp, types.intp, types.intp, types.intp, types.intp)
def call_address(b, function, argument, chunk, thread):
    """Calls `intp(intp argument, intp chunk, intp thread)` at an address."""
    t = ir.FunctionType(I64, [I64, I64, I64])
    return b.call(at(b, function, t), [argument, chunk, thread])


@op(types.none)
def pause(b):
    """Tells the core that this is a spin loop."""
    if platform.machine() in ("x86_64", "AMD64"):
        call(b, "llvm.x86.sse2.pause", ir.VoidType())


def external(name):
    """An op giving the address of a symbol added with `llvmlite.binding.add_symbol`.

    Looked up by name when code is loaded, so that machine code cached on disk serves every process.
    """

    def address(b):
        existing = b.module.globals.get(name)
        return b.ptrtoint(existing or ir.GlobalVariable(b.module, I8, name), I64)

    return op(types.intp)(address)


@op(types.none)
def sched_yield(b):
    call(b, "sched_yield", I32)


@op(types.none, types.intp, types.intp, types.intp, types.intp)
def futex(b, number, address, operation, value):
    """The Linux system call: sleep while a word holds a value, or wake sleepers."""
    t = ir.FunctionType(I64, [I64] * 5)
    function = cgutils.get_or_insert_function(b.module, t, "syscall")
    b.call(function, [number, address, operation, value, constant(I64, 0)])


@op(types.float32, vector)
def first(b, x):
    return b.extract_element(x, ir.Constant(I32, 0))


@op(vector, types.intp)
def splat_bf16(b, address):
    """One bfloat16 in memory, in every lane."""
    wide = b.shl(b.zext(load(b, address, I16, 2), I32), ir.Constant(I32, 16))
    return spread(b, b.bitcast(wide, F32))


@op(types.none, types.intp, vector)
def store_first_bf16(b, address, value):
    store(b, b.extract_element(narrow_bf16(b, value), ir.Constant(I32, 0)), address, 2)
