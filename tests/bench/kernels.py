"""Attention kernels by shape: what must move, what must be computed, and how close the program comes.

    python -m tests.bench.kernels                      figures from the shapes alone, for every chip below
    python -m tests.bench.kernels --schedule v5e v6e   also what the TPU compiler makes of each (needs libtpu only)
    python -m tests.bench.kernels --assemble           also what CUDA's assembler makes of the H100's kernels
    python -m tests.bench.kernels --time               also times on the accelerator of this machine

The floor is the larger of bytes / bandwidth and FLOPs / peak: no program is faster. The compiler's figures are static:
bundles of the loop that folds one block of keys for all heads, with no stalls and no memory latency in them, so they
say "this much work must hide under that much fetching", not how long a step takes. Blocks differ in size, so the last
column divides by their query-key pairs. `jax` rows are the kernel that JAX ships
(jax.experimental.pallas.ops.tpu.ragged_paged_attention); its decodes work on 32 query tokens, of which one counts.

Dimension key as in pallas_kernels.ragged_paged_attention.
"""

import argparse
import dataclasses
import functools
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

import absent_gpu
import absent_tpu


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks: bytes a second, bfloat16 FLOPs a second, and for TPUs the clock that the FLOPs imply."""

    bandwidth: float
    flops: float
    clock: float | None = None
    kind: str = ""  # what JAX calls the device
    platform: str = "tpu"


CHIPS = {
    "v5e": Chip(819e9, 197e12, 1.5e9, "TPU v5 lite"),
    "v6e": Chip(1640e9, 918e12, 1.75e9, "TPU v6 lite"),
    "v5p": Chip(2765e9, 459e12, 1.75e9),
    "tpu7x": Chip(7380e9, 2307e12),
    "H100": Chip(3350e9, 989e12, platform="gpu"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of equal rows: `new` tokens each, `length` tokens in the cache after the step."""

    rows: int
    length: int
    new: int
    N: int = 32
    K: int = 8
    H: int = 128
    B: int = 128
    dtype: str = "bfloat16"

    def cache_bytes(self, platform):
        """Of all rows' keys and values, as the platform pads them."""
        import jax.numpy as jnp

        from pallas_kernels.ragged_paged_attention import cache_shape

        _, _, C, H = cache_shape(1, self.B, self.K, self.H, platform)
        return self.rows * self.length * C * H * jnp.dtype(self.dtype).itemsize

    def bytes(self, platform):
        """Each key and value once, the new ones once more into their pages, queries in and answers out."""
        tokens = self.rows * self.new
        return self.cache_bytes(platform) * (1 + self.new / self.length) + 4 * tokens * self.N * self.H

    @property
    def flops(self):
        seen = self.new * (self.length - self.new) + self.new * (self.new + 1) / 2
        return 4 * self.rows * self.N * self.H * seen

    def floor(self, chip):
        return max(self.bytes(chip.platform) / chip.bandwidth, self.flops / chip.flops)

    def shapes(self, num_pages=None, platform=None):
        import jax
        import jax.numpy as jnp

        from pallas_kernels.ragged_paged_attention import cache_shape
        from pallas_kernels.ragged_paged_attention.tpu_plan import round_up

        M = -(-self.length // self.B)
        T, P = round_up(self.rows * self.new, 16), num_pages or self.rows * M
        array = jax.ShapeDtypeStruct
        return [
            *(array((T, heads, self.H), jnp.bfloat16) for heads in (self.N, self.K, self.K)),
            array(cache_shape(P, self.B, self.K, self.H, platform or _platform()), jnp.dtype(self.dtype)),
            *(array(shape, jnp.int32) for shape in [(self.rows,), (self.rows, M), (self.rows + 1,), (2,)]),
        ]


SHIPPED_QUERIES = 128  # of a block of a chunk, in the kernel that JAX ships
CASES = {
    "8B decode, 64 x 1k": Case(64, 1024, 1),
    "8B decode, 64 x 8k": Case(64, 8192, 1),
    "8B decode int8, 64 x 8k": Case(64, 8192, 1, dtype="int8"),
    "8B chunk, 4 x 512 of 2k": Case(4, 2048, 512),
    "8B chunk, 1 x 1k of 8k": Case(1, 8192, 1024),
    "8B on one of 8 chips, decode": Case(64, 2048, 1, N=4, K=1),
    "8B on one of 8 chips, chunk": Case(1, 8192, 1024, N=4, K=1),
    "heads of 64, decode": Case(64, 2048, 1, H=64),
    "heads of 64, chunk": Case(4, 2048, 512, H=64),
    "heads of 256, decode": Case(64, 2048, 1, N=16, K=8, H=256),
    "heads of 256, chunk": Case(4, 2048, 512, N=16, K=8, H=256),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", nargs="*", metavar="CHIP", help="chips to compile for with libtpu")
    parser.add_argument("--assemble", action="store_true", help="assemble the H100's kernels with ptxas")
    parser.add_argument("--time", action="store_true", help="time on this machine's accelerator")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    dump = pathlib.Path(tempfile.mkdtemp(prefix="llo-")) if options.schedule else None
    if dump:
        reason = absent_tpu.prepare(dump)
        if reason:
            sys.exit(reason)
    if options.assemble:
        reason = absent_gpu.prepare() or (None if absent_gpu.assembler() else "CUDA's ptxas is not installed")
        if reason:
            sys.exit(reason)
    header()
    shape_table(options.case)
    for chip in options.schedule or []:
        schedule_table(chip, options.case, dump)
    if options.assemble:
        assembler_table(options.case)
    if options.time:
        time_table(options.case, options.runs)
    if dump:
        shutil.rmtree(dump)


def header():
    import jax

    print(f"jax {jax.__version__}  devices {jax.devices()[0].device_kind}  {time.strftime('%Y-%m-%d')}\n")


def shape_table(names):
    columns = ("TPU MB", "GPU MB", "GFLOP", *(f"{chip} us" for chip in CHIPS))
    print(f"{'case':32}" + "".join(f"{c:>10}" for c in columns))
    for name in names:
        case = CASES[name]
        sizes = "".join(f"{case.bytes(platform) / 1e6:10.1f}" for platform in ("tpu", "gpu"))
        floors = "".join(f"{case.floor(chip) * 1e6:10.0f}" for chip in CHIPS.values())
        print(f"{name:32}{sizes}{case.flops / 1e9:10.1f}{floors}")


def schedule_table(chip, names, dump):
    print(f"\n{chip}: static schedule. 'block' is the loop over one block of keys, all heads")
    columns = (
        "compile s",
        "VMEM MiB",
        "bundles",
        "spills",
        "block tok",
        "block bnd",
        "us/block",
        "fetch us",
        "bnd/kpair",
    )
    print(f"{'case':32}{'kernel':8}" + "".join(f"{c:>10}" for c in columns))
    for name in names:
        for kernel in ("ours", "jax"):
            try:
                row = _schedule_row(chip, CASES[name], kernel, dump)
            except Exception as error:  # a table of several kernels: what does not compile is a row of its own
                row = f"  {type(error).__name__}: {' '.join(str(error).split())[:90]}"
            print(f"{name:32}{kernel:8}{row}", flush=True)


def _schedule_row(chip, case, kernel, dump):
    for old in dump.iterdir():
        old.unlink()
    if kernel == "ours":
        function, shapes, blocks = _ours(chip, case)
        tokens, queries = blocks.compute, blocks.query
    else:
        function, shapes, tokens = _shipped(case)
        queries = 1 if case.new == 1 else SHIPPED_QUERIES
    executable, seconds = absent_tpu.compile_for(chip, function, shapes, donate=(3,) if kernel == "ours" else ())
    schedule = absent_tpu.schedule(dump, "ragged_paged_attention" if kernel == "ours" else "ragged")
    sizes = _scoped_vmem(executable.as_text())
    block = _block_bundles(schedule, case, tokens) if kernel == "ours" else _largest_loop(schedule)
    token_bytes = case.cache_bytes("tpu") / case.rows / case.length
    clock = CHIPS[chip].clock
    cells = (
        f"{seconds:10.1f}{sizes / 2**20:10.1f}{schedule.bundles:10}{schedule.uses['SPILL']:10}{tokens:10}{block:10}"
        f"{block / clock * 1e6:10.2f}{tokens * token_bytes / CHIPS[chip].bandwidth * 1e6:10.2f}"
        f"{block / (tokens * queries) * 1000:10.1f}"
    )
    return cells


def _block_bundles(schedule, case, tokens):
    """Bundles that one block of so many keys takes in our kernel, the turns of the loops inside it counted.

    Decodes come first in the program, chunks second: each a loop over items with one over blocks inside. Inside
    that are two ways to unpack the block, of which one runs, and, when heads are not interleaved, a loop over heads.
    """
    from pallas_kernels.ragged_paged_attention import tpu, tpu_plan

    walks = [loop for loop in schedule.loops if loop.depth == 1 and loop.uses["MXU"]]
    walk = walks[0 if case.new == 1 else -1]
    block = next(loop for loop in walk.inside(schedule.loops) if loop.uses["MXU"])
    inside = block.inside(schedule.loops)
    heads = [loop.bundles for loop in inside if loop.uses["MXU"]]
    unpack = [loop.bundles for loop in inside if not loop.uses["MXU"] and loop.uses["VSTORE"]]
    together = tpu_plan.heads_together(case.K, 1 if case.new == 1 else tpu.QUERY_GROUP)
    turns = max(1, tokens // tpu.UNPACKED_TOKENS)
    return block.bundles - sum(heads) - sum(unpack) + sum(heads) * case.K // together + max(unpack, default=0) * turns


def _largest_loop(schedule):
    """Bundles of the loop with most matrix work, as the JAX kernel has one for its blocks."""
    return max((l for l in schedule.loops if l.uses["MXU"]), key=lambda l: l.uses["MXU"]).bundles


def _ours(chip, case):
    from pallas_kernels.ragged_paged_attention import tpu, tpu_plan

    shapes = case.shapes(num_pages=256)
    case_name = "decode" if case.new == 1 else "chunk"
    q, k, _, cache, _, table, *_ = shapes
    blocks = tpu_plan.blocks(q, k, cache, table.shape[1], case_name, CHIPS[chip].kind)
    return functools.partial(tpu.attend, scale=case.H**-0.5), shapes, blocks


def _shipped(case):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    q, _, _, _, lens, table, cu, _ = case.shapes(num_pages=256)
    import jax
    import jax.numpy as jnp

    cache = jax.ShapeDtypeStruct((256, case.B, 2 * case.K, case.H), jnp.dtype(case.dtype))
    pages = max(1, 256 // case.B)
    scales = dict(k_scale=1.0, v_scale=1.0) if cache.dtype.itemsize == 1 else {}
    function = functools.partial(
        ragged_paged_attention,
        sm_scale=case.H**-0.5,
        num_kv_pages_per_block=pages,
        num_queries_per_block=32 if case.new == 1 else SHIPPED_QUERIES,
        vmem_limit_bytes=64 * 2**20,
        **scales,
    )
    return function, [q, cache, lens, table, cu, jax.ShapeDtypeStruct((1,), jnp.int32)], pages * case.B


def _scoped_vmem(text):
    import re

    sizes = re.findall(r'custom_call_target="tpu_custom_call".*?"memory_space":"1","offset":"\d+","size":"(\d+)"', text)
    return max(map(int, sizes), default=0)


def assembler_table(names):
    """Registers, spills and shared memory of each kernel on an H100: decodes, then rows of any length."""
    from pallas_kernels.ragged_paged_attention import ragged_paged_attention

    columns = ("compile s", "kernel", "registers", "spilled B", "shared B")
    print(f"\nH100, pages of 32\n{'case':32}" + "".join(f"{c:>10}" for c in columns))
    for name in names:
        case = dataclasses.replace(CASES[name], B=32)
        step = functools.partial(ragged_paged_attention, scale=case.H**-0.5)
        with tempfile.TemporaryDirectory() as dump:
            shapes = case.shapes(num_pages=256, platform="gpu")
            _, seconds = absent_gpu.compile_for_h100(step, shapes, donate=(3,), dump=pathlib.Path(dump))
            kernels = absent_gpu.kernels(pathlib.Path(dump))
        for part, kernel in zip(("decodes", "any"), kernels, strict=False):
            numbers = (kernel.registers, kernel.spilled_bytes, kernel.shared_bytes)
            print(f"{name:32}{seconds:10.1f}{part:>10}" + "".join(f"{n:10,}" for n in numbers))
        if not kernels:
            print(f"{name:32}{seconds:10.1f}{'none':>10}  pages are gathered in XLA")


def time_table(names, runs):
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        sys.exit("no accelerator on this machine: leave --time out, or use tests/bench/cpu_kernels.py")
    print(f"\nmeasured on {kind}: median of {runs} runs after one to warm up")
    print(f"{'case':32}{'us':>10}{'GB/s':>10}{'TFLOP/s':>10}")
    for name in names:
        case = CASES[name]
        seconds = _measure(case, runs)
        speed, rate = case.bytes(_platform()) / seconds / 1e9, case.flops / seconds / 1e12
        print(f"{name:32}{seconds * 1e6:10.0f}{speed:10.0f}{rate:10.1f}")


def _measure(case, runs):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.ragged_paged_attention import ragged_paged_attention

    q, k, v, cache, lens, table, cu, _ = case.shapes()
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (q, k, v), strict=False))
    cache = jax.random.normal(keys[3], cache.shape, jnp.bfloat16).astype(cache.dtype)
    lens = jnp.full(lens.shape, case.length, jnp.int32)
    table = jnp.asarray(np.random.default_rng(0).permutation(cache.shape[0]).reshape(table.shape), jnp.int32)
    cu = jnp.arange(cu.shape[0], dtype=jnp.int32) * case.new
    counts = jnp.array([case.rows if case.new == 1 else 0, case.rows], jnp.int32)
    step = jax.jit(functools.partial(ragged_paged_attention, scale=case.H**-0.5), donate_argnums=3)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        out, cache = jax.block_until_ready(step(q, k, v, cache, lens, table, cu, counts))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _platform():
    """Where caches are shaped for: this machine's accelerator, or a TPU when it has none."""
    import jax

    platform = jax.default_backend()
    return platform if platform in ("gpu", "cuda", "tpu") else "tpu"


if __name__ == "__main__":
    main()
