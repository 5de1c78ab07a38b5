"""Times the CPU kernels beside XLA's own products: python -m tests.bench.cpu_kernels [--tokens 1 8 32] [--experts].

Shapes are SmolLM2-135M's. A line is all layers' weights of one kind, each with memory of its own, so that a
decode step streams from memory as it does in a server. Cells are GB/s of weights (GFLOP/s), the best of several.
With --experts instead: rows that go to experts at random, and GB/s of the weights of those that have rows.
"""

import argparse
import datetime
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu, panels
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear import linear

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (2, 1536, 576), "down": (576, 1536), "head": (49152, 576)}
COLUMNS = {
    "XLA bf16": ("reference", jnp.bfloat16),
    "XLA f32": ("reference", jnp.float32),
    "ours bf16": ("cpu", jnp.bfloat16),
    "ours f32": ("cpu", jnp.float32),
    "panels bf16": ("cpu", jnp.bfloat16, True),
    "ours int8": ("cpu", jnp.int8),
    "panels int8": ("cpu", jnp.int8, True),
    "panels int4": ("cpu", jnp.int4, True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--experts", action="store_true", help="time products with experts, in milliseconds")
    args = parser.parse_args()
    threads = cpu.register().num_threads
    print(f"jax {jax.__version__}  {os.cpu_count()} CPUs  {threads} threads  {datetime.date.today()}")
    if args.experts:
        return experts()
    print(f"{'shape':>10} {'tokens':>6} " + " ".join(f"{name:>16}" for name in args.columns))
    for shape in args.shapes:
        for tokens in args.tokens:
            cells = [cell(shape, tokens, 1 if shape == "head" else args.layers, *COLUMNS[c]) for c in args.columns]
            print(f"{shape:>10} {tokens:>6} " + " ".join(f"{c:>16}" for c in cells), flush=True)


def experts(num_experts=32, outputs=1024, inputs=1024):
    """Prints what XLA's ragged dot takes and what our kernel does, for a few rows and for many."""
    rng = np.random.default_rng(0)
    size = (num_experts, outputs, inputs)
    kernels = jnp.asarray(rng.standard_normal(size, dtype=np.float32) * 0.05, jnp.bfloat16)
    columns = {"XLA": ("ragged_dot", kernels, False), "ours": ("cpu", panels.pack(kernels), True)}
    print(
        f"bfloat16 {size}\n{'rows':>10} {'experts':>8} " + " ".join(f"{name + ', ms (GB/s)':>20}" for name in columns)
    )
    for rows in (8, 64, 1024):
        sizes = np.bincount(rng.integers(0, num_experts, rows), minlength=num_experts).astype(np.int32)
        x, reached = jnp.ones((rows, inputs), jnp.bfloat16), int((sizes > 0).sum())
        cells = []
        for implementation, stored, in_panels in columns.values():
            run = jax.jit(functools.partial(grouped_matmul, implementation=implementation, in_panels=in_panels))
            seconds = best(lambda args=(x, stored, sizes), run=run: run(*args).block_until_ready(), repeats=7)
            cells.append(f"{1e3 * seconds:.2f} ({reached * outputs * inputs * 2 / seconds / 1e9:.1f})")
        print(f"{rows:>10} {reached:>8} " + " ".join(f"{c:>20}" for c in cells), flush=True)


def cell(shape, tokens, layers, implementation, dtype, in_panels=False):
    kernels = weights(SHAPES[shape], layers, dtype)
    x_TI = jnp.ones((tokens, SHAPES[shape][-1]), jnp.bfloat16 if dtype in (jnp.int8, jnp.int4) else dtype)
    scale = jnp.ones(SHAPES[shape][:-1], jnp.float32) if dtype == jnp.int8 else None
    offset = None
    if dtype == jnp.int4:
        scale = offset = jnp.ones((*SHAPES[shape][:-1], SHAPES[shape][-1] // 32), jnp.bfloat16)
    activation = "silu" if shape == "gate_up" else None

    @jax.jit
    def every_layer(x_TI, kernels):
        run = functools.partial(linear, activation=activation, implementation=implementation, in_panels=in_panels)
        return sum(run(x_TI, kernel, kernel_scale=scale, kernel_offset=offset)[0, 0] for kernel in kernels)

    seconds = best(lambda: every_layer(x_TI, kernels).block_until_ready())
    elements = sum(kernel.size for kernel in kernels)
    itemsize = 0.5 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize
    bandwidth, rate = elements * itemsize / seconds / 1e9, 2 * elements * tokens / seconds / 1e9
    return f"{bandwidth:.1f} ({rate:.0f})"


@functools.lru_cache(maxsize=2)
def weights(shape, layers, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * 0.05, dtype) for _ in range(layers)]


def best(run, repeats=25):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
