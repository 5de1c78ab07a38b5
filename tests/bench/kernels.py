"""Kernels by shape: what must move, what must be computed, and how close the program comes.

    python -m tests.bench.kernels                      figures from the shapes alone, for every chip
    python -m tests.bench.kernels --schedule v5e v6e   also what the TPU compiler makes of each (needs libtpu only)
    python -m tests.bench.kernels --assemble           also what CUDA's assembler makes of attention on an H100, A100
    python -m tests.bench.kernels --time               also times on the accelerator of this machine
    python -m tests.bench.kernels --case "8B decode"   those whose names begin so

The floor is the larger of bytes / bandwidth and FLOPs / peak: no program is faster. The compiler's figures are static,
with no stalls and no memory latency in them: they say "this much work must hide under that much fetching", not how long
a step takes. Of attention, bundles are counted of the loop that folds one block of keys for all heads; blocks differ in
size, so the last column divides by their query-key pairs. `jax` rows are the kernel that JAX ships
(jax.experimental.pallas.ops.tpu.ragged_paged_attention); its decodes work on 32 query tokens, of which one counts.
Of other kernels, a Pallas kernel's bundles are those of a step of its grid, of latent attention those of an item, and
XLA's cost model says what the instructions around it take, or all of them where there is no Pallas kernel; its bundles
and spills are then of all.

A time is that of a call in a loop inside of one program: see tests/support/kernel_timing.py.
"""

import argparse
import dataclasses
import functools
import pathlib
import shutil
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

import absent_gpu
import absent_tpu

SHIPPED_QUERIES = 128  # of a block of a chunk, in the kernel that JAX ships
MIB = 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chips = list(absent_tpu.TOPOLOGIES)
    parser.add_argument("--schedule", nargs="*", metavar="CHIP", choices=chips, help=f"compile for: {' '.join(chips)}")
    parser.add_argument("--assemble", action="store_true", help="assemble an H100's and an A100's attention with ptxas")
    parser.add_argument("--time", action="store_true", help="time on this machine's accelerator")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--case", nargs="*", default=[""], help="how the names of cases begin")
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
    from kernel_cases import CASES

    cases = {name: case for name, case in CASES.items() if name.startswith(tuple(options.case))}
    if not cases:
        sys.exit(f"no case begins with {' or '.join(options.case)}; there are: {', '.join(CASES)}")
    header()
    shape_table(cases)
    for chip in options.schedule or []:
        attention_table(chip, only_attention(cases), dump)
        others_table(chip, {name: case for name, case in cases.items() if name not in only_attention(cases)}, dump)
    if options.assemble:
        assembler_table(only_attention(cases))
    if options.time:
        time_table(cases, options.runs)
    if dump:
        shutil.rmtree(dump)


def header():
    import jax

    print(f"jax {jax.__version__}  devices {jax.devices()[0].device_kind}  {time.strftime('%Y-%m-%d')}\n")


def only_attention(cases):
    from kernel_cases import Attention

    return {name: case for name, case in cases.items() if isinstance(case, Attention)}


def columns(*names):
    return "".join(f"{name:>10}" for name in names)


def microseconds(seconds):
    return f"{'-':>10}" if seconds is None else f"{seconds * 1e6:10.2f}"


def shape_table(cases):
    from kernel_cases import SHOWN

    print(f"{'case':34}" + columns("TPU MB", "GPU MB", "GFLOP", *(f"{chip} us" for chip in SHOWN)))
    for name, case in cases.items():
        sizes = "".join(f"{case.bytes(platform) / 1e6:10.1f}" for platform in ("tpu", "gpu"))
        floors = "".join(f"{case.floor(chip) * 1e6:10.0f}" for chip in SHOWN.values())
        print(f"{name:34}{sizes}{case.flops / 1e9:10.1f}{floors}")


def attention_table(chip, cases, dump):
    if not cases:
        return
    print(f"\n{chip}: static schedule. 'block' is the loop over one block of keys, all heads")
    titles = (
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
    print(f"{'case':34}{'kernel':8}" + columns(*titles))
    for name, case in cases.items():
        for kernel, row in (("ours", _our_row), ("jax", _shipped_row)):
            print(f"{name:34}{kernel:8}{_row_or_refusal(row, chip, case, dump)}", flush=True)


class Refused(Exception):
    """A kernel does not take a shape; the other rows of a table are wanted all the same."""


def _row_or_refusal(row, chip, case, dump):
    for old in dump.iterdir():
        old.unlink()
    try:
        return row(chip, case, dump)
    except Refused as refusal:
        return f"  does not take it: {refusal}"


def _compiled(chip, function, shapes, donate=()):
    try:
        return absent_tpu.compile_for(chip, function, shapes, donate)
    except Exception as error:
        # A failed assertion says nothing but where; Mosaic names its module first.
        says = " ".join(str(error).split("\n\n")[0].split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise Refused(f"{type(error).__name__}: {says.split('`: ')[-1][:120]}") from error


def _our_row(chip, case, dump):
    from kernel_cases import SHOWN

    from pallas_kernels.ragged_paged_attention import tpu, tpu_plan

    shapes = _few_pages(case)
    q, k, _, cache, _, table, *_ = shapes
    blocks = tpu_plan.blocks(q, k, cache, table.shape[1], "decode" if case.is_decode else "chunk", SHOWN[chip].kind)
    step = functools.partial(tpu.attend, scale=case.H**-0.5)
    executable, seconds = _compiled(chip, step, shapes, donate=case.written)
    schedule = absent_tpu.schedule(dump, "ragged_paged_attention")
    block = _block_bundles(schedule, case, blocks.compute)
    return _attention_cells(chip, case, executable, seconds, schedule, block, blocks.compute, blocks.query)


def _shipped_row(chip, case, dump):
    function, shapes, tokens = _shipped(case)
    executable, seconds = _compiled(chip, function, shapes)
    schedule = absent_tpu.schedule(dump, "ragged")
    # One loop for its blocks, that with most matrix work.
    block = max((l for l in schedule.loops if l.uses["MXU"]), key=lambda l: l.uses["MXU"]).bundles
    queries = 1 if case.is_decode else SHIPPED_QUERIES
    return _attention_cells(chip, case, executable, seconds, schedule, block, tokens, queries)


def _attention_cells(chip, case, executable, seconds, schedule, block, tokens, queries):
    from kernel_cases import CLOCKS, SHOWN

    token_bytes = case.cache_bytes("tpu") / case.rows / case.length
    return (
        f"{seconds:10.1f}{absent_tpu.scoped_vmem(executable.as_text()) / MIB:10.1f}{schedule.bundles:10}"
        f"{schedule.uses['SPILL']:10}{tokens:10}{block:10}"
        f"{microseconds(block / CLOCKS[chip] if chip in CLOCKS else None)}"
        f"{microseconds(tokens * token_bytes / SHOWN[chip].bandwidth)}{block / (tokens * queries) * 1000:10.1f}"
    )


def _few_pages(case, platform="tpu"):
    import jax

    return jax.eval_shape(lambda: case.arrays(platform, num_pages=256))


def _block_bundles(schedule, case, tokens):
    """Bundles that one block of so many keys takes in our kernel, the turns of the loops inside it counted.

    Decodes come first in the program, chunks second: each a loop over items with one over blocks inside. Inside
    that are two ways to unpack the block, of which one runs, and, when heads are not interleaved, a loop over heads.
    """
    from pallas_kernels.ragged_paged_attention import tpu, tpu_plan, tpu_walk

    walks = [loop for loop in schedule.loops if loop.depth == 1 and loop.uses["MXU"]]
    walk = walks[0 if case.is_decode else -1]
    block = next(loop for loop in walk.inside(schedule.loops) if loop.uses["MXU"])
    inside = block.inside(schedule.loops)
    heads = [loop.bundles for loop in inside if loop.uses["MXU"]]
    unpack = [loop.bundles for loop in inside if not loop.uses["MXU"] and loop.uses["VSTORE"]]
    together = tpu_plan.heads_together(case.K, 1 if case.is_decode else tpu_walk.QUERY_GROUP)
    turns = max(1, tokens // tpu.UNPACKED_TOKENS)
    return block.bundles - sum(heads) - sum(unpack) + sum(heads) * case.K // together + max(unpack, default=0) * turns


def _shipped(case):
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    q, _, _, _, lens, table, cu, _ = _few_pages(case)
    cache = jax.ShapeDtypeStruct((256, case.B, 2 * case.K, case.H), jnp.dtype(case.dtype))
    pages = max(1, 256 // case.B)
    scales = dict(k_scale=1.0, v_scale=1.0) if cache.dtype.itemsize == 1 else {}
    function = functools.partial(
        ragged_paged_attention,
        sm_scale=case.H**-0.5,
        num_kv_pages_per_block=pages,
        num_queries_per_block=32 if case.is_decode else SHIPPED_QUERIES,
        vmem_limit_bytes=64 * 2**20,
        **scales,
    )
    return function, [q, cache, lens, table, cu, jax.ShapeDtypeStruct((1,), jnp.int32)], pages * case.B


def others_table(chip, cases, dump):
    if not cases:
        return
    print(f"\n{chip}: static schedule of the other kernels")
    titles = ("compile s", "VMEM MiB", "temp MiB", "bundles", "spills", "steps", "step bnd")
    print(f"{'case':34}{'kernel':20}" + columns(*titles, "kernel us", "XLA us", "floor us"))
    for name, case in cases.items():
        print(f"{name:34}{_row_or_refusal(_other_row, chip, case, dump)}", flush=True)


def _other_row(chip, case, dump):
    from kernel_cases import CLOCKS, SHOWN

    clock, shapes = CLOCKS.get(chip), case.shapes("tpu")
    executable, seconds = _compiled(chip, case.function, shapes, donate=case.written)
    hlo = executable.as_text()
    bundles, spills = absent_tpu.bundles_and_spills(dump)
    name, steps, step, own = "XLA", None, None, 0.0
    if kernels := absent_tpu.pallas_names(hlo):
        ((name,), (grid,)) = kernels, absent_tpu.pallas_grids(absent_tpu.traced(chip, case.function, shapes).jaxpr)
        schedule = absent_tpu.schedule(dump, name)
        bundles, spills = schedule.bundles, schedule.uses["SPILL"]
        steps, own = case.steps_and_bundles(grid, schedule)
        step = round(own / steps)
    others = absent_tpu.estimated_cycles(hlo, unknown_turns=getattr(case, "rows", 1))
    times = [own / clock if clock else None, others / clock if clock else None, case.floor(SHOWN[chip])]
    return (
        f"{name:20}{seconds:10.1f}{absent_tpu.scoped_vmem(hlo) / MIB:10.1f}"
        f"{executable.memory_analysis().temp_size_in_bytes / MIB:10.1f}{bundles:10}{spills:10}"
        f"{steps or '-':>10}{step or '-':>10}" + "".join(map(microseconds, times))
    )


def assembler_table(cases):
    """Registers, spills and shared memory of each kernel on an H100 and an A100: decodes, then rows of any length."""
    for kind in (absent_gpu.H100, absent_gpu.A100):
        print(f"\n{kind}, pages of 32\n{'case':34}", end="")
        print(columns("compile s", "kernel", "registers", "spilled B", "shared B"))
        for name, case in cases.items():
            case = dataclasses.replace(case, B=32)
            with tempfile.TemporaryDirectory() as dump:
                shapes, folder = _few_pages(case, "gpu"), pathlib.Path(dump)
                _, seconds = absent_gpu.compile_for(kind, case.function, shapes, donate=case.written, dump=folder)
                triton = absent_gpu.triton_kernels(folder, "ragged_paged_attention")
                kernels = absent_gpu.kernels(folder) or triton
            for part, kernel in zip(("decodes", "any"), kernels, strict=False):
                numbers = (kernel.registers, kernel.spilled_bytes, kernel.shared_bytes)
                print(f"{name:34}{seconds:10.1f}{part:>10}" + "".join(f"{n:10,}" for n in numbers), flush=True)


def time_table(cases, runs):
    import jax

    if jax.default_backend() == "cpu":
        sys.exit("no accelerator on this machine: leave --time out, or use tests/bench/cpu_kernels.py")
    print(f"\nmeasured on {jax.devices()[0].device_kind}: a call in a loop of many, the median of {runs} such loops")
    timed_rows(cases, runs, "tpu" if jax.default_backend() == "tpu" else "gpu")


def timed_rows(cases, runs, platform):
    import jax
    from kernel_timing import seconds_a_call

    from runtime.chips import of_kind

    chip = of_kind(jax.devices()[0].device_kind)
    print(f"{'case':34}" + columns("us", "GB/s", "TFLOP/s", *(["floor us", "of it"] if chip else [])))
    for name, case in cases.items():
        seconds = seconds_a_call(case, platform, runs)
        speed, rate = case.bytes(platform) / seconds / 1e9, case.flops / seconds / 1e12
        row = f"{name:34}{seconds * 1e6:10.1f}{speed:10.0f}{rate:10.1f}"
        if chip:
            row += f"{case.floor(chip) * 1e6:10.1f}{case.floor(chip) / seconds:10.0%}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
