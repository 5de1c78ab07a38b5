"""`pallas_kernels.rotation` of a block of float32, in registers."""

from llvmlite import ir
from numba import types

from pallas_kernels.cpu import vectors as v
from pallas_kernels.cpu.vectors import I64, LANES, VF32
from pallas_kernels.rotation import BLOCK


@v.op(types.none, types.intp)
def rotate_block(b, address):
    """Turns BLOCK float32 in place: sums and differences of elements half a block apart, then a quarter, and so on."""
    places = [b.add(address, ir.Constant(I64, 4 * i)) for i in range(0, BLOCK, LANES)]
    parts = [v.load(b, place, VF32, 4) for place in places]
    apart = BLOCK // 2
    while apart >= LANES:
        step = apart // LANES
        parts = [
            b.fsub(parts[i - step], part) if i & step else b.fadd(part, parts[i + step]) for i, part in enumerate(parts)
        ]
        apart //= 2
    while apart:
        others = [i ^ apart for i in range(LANES)]
        signs = ir.Constant(VF32, [-1.0 if i & apart else 1.0 for i in range(LANES)])
        parts = [v.fused(b, part, signs, v.shuffle(b, part, part, others)) for part in parts]
        apart //= 2
    for part, place in zip(parts, places, strict=True):
        v.store(b, b.fmul(part, v.constant(VF32, BLOCK**-0.5)), place, 4)
