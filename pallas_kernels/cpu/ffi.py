"""Runs numba functions as XLA custom calls, with XLA's typed foreign-function interface (its C API).

XLA hands a handler one call frame: a C struct of argument and result buffers and attributes. The functions here
read it by offset; the layout is that of xla/ffi/api/c_api.h (struct sizes are only ever appended to). A handler
returns NULL for success. Nothing is compiled by a C compiler and nothing here is called under Python's lock.
"""

from llvmlite import ir
from numba import types

from pallas_kernels.cpu import vectors as v

# XLA_FFI_DataType
S8, S32, F16, F32, BF16, F8E5M2, F8E4M3FN, S4 = 2, 4, 10, 11, 16, 19, 20, 21

EXTENSION, API, STAGE = 8, 16, 32  # of the call frame
NUM_ARGS, ARGS, NUM_RETS, RETS, NUM_ATTRS, ATTRS = 56, 72, 96, 112, 136, 160
DTYPE, DATA, RANK, DIMS = 16, 24, 32, 40  # of a buffer
SCALAR_VALUE, ARRAY_DATA = 8, 16  # of an attribute
METADATA_EXTENSION, EXECUTE = 1, 3

_ZERO = ir.Constant(v.I64, 0)
handler_signature = types.intp(types.intp)


@v.op(types.boolean, types.intp)
def is_call(b, frame):
    """False when XLA only asks which version of the interface the handler speaks, which is answered here."""
    extension = _word(b, frame, EXTENSION)
    with b.if_then(b.icmp_signed("!=", extension, _ZERO), likely=False):
        with b.if_then(b.icmp_signed("==", _half(b, extension, 8), ir.Constant(v.I32, METADATA_EXTENSION))):
            api, metadata = _word(b, frame, API), _word(b, extension, 24)
            # XLA's own version: the fields read here are the same in all of them.
            answers = [(24, _half(b, api, 32)), (28, _half(b, api, 36)), (32, ir.Constant(v.I32, 0))]  # 32: no traits
            for offset, value in answers:
                v.store(b, value, b.add(metadata, ir.Constant(v.I64, offset)), 4)
    executes = b.icmp_signed("==", _half(b, frame, STAGE), ir.Constant(v.I32, EXECUTE))
    return b.and_(executes, b.icmp_signed("==", extension, _ZERO))


@v.op(types.intp, types.intp, types.intp)
def argument(b, frame, index):
    """The buffer of an argument, by number."""
    return _element(b, _word(b, frame, ARGS), index)


@v.op(types.intp, types.intp, types.intp)
def result(b, frame, index):
    return _element(b, _word(b, frame, RETS), index)


@v.op(types.intp, types.intp)
def data(b, buffer):
    return _word(b, buffer, DATA)


@v.op(types.intp, types.intp)
def dtype(b, buffer):
    return b.sext(_half(b, buffer, DTYPE), v.I64)


@v.op(types.intp, types.intp, types.intp)
def dim(b, buffer, index):
    return _element(b, _word(b, buffer, DIMS), index)


@v.inner
def size(buffer):
    """Elements in a buffer."""
    count = 1
    for i in range(v.load_i64(buffer + RANK)):
        count *= dim(buffer, i)
    return count


@v.op(types.intp, types.intp, types.intp)
def int_attribute(b, frame, index):
    """The index-th attribute in alphabetical order, given as np.int32."""
    attribute = _element(b, _word(b, frame, ATTRS), index)
    return b.sext(_half(b, _word(b, attribute, SCALAR_VALUE), 0), v.I64)


@v.op(types.intp, types.intp, types.intp, types.intp)
def int_in(b, frame, index, element):
    """An element of the index-th attribute, given as an array of np.int32."""
    return b.sext(v.load(b, _array(b, frame, index, element), v.I32, 4), v.I64)


@v.op(types.float32, types.intp, types.intp, types.intp)
def float_in(b, frame, index, element):
    """An element of the index-th attribute, given as an array of np.float32."""
    return v.load(b, _array(b, frame, index, element), v.F32, 4)


def _word(b, address, offset):
    return v.load(b, b.add(address, ir.Constant(v.I64, offset)), v.I64, 8)


def _half(b, address, offset):
    return v.load(b, b.add(address, ir.Constant(v.I64, offset)), v.I32, 4)


def _element(b, address, index):
    return v.load(b, b.add(address, b.shl(index, ir.Constant(v.I64, 3))), v.I64, 8)


def _array(b, frame, index, element):
    attribute = _element(b, _word(b, frame, ATTRS), index)
    return b.add(_word(b, attribute, ARRAY_DATA), b.shl(element, ir.Constant(v.I64, 2)))
