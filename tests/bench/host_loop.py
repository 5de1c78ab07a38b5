"""What a decode step costs the host: `python -m tests.bench.host_loop [--rows 1 16 64 256] [--profile 256]`.

The engine runs whole, and its device step is a stand-in that returns arrays made beforehand: what is left is planning,
filling the packed vector, calling, reading and accepting, with metrics. Times are of steps in which every row decodes.
The parts are measured in a second run, since looking costs time too.

Under it, what calling a compiled program costs that does nothing but takes as many arrays as a model's step.
"""

import argparse
import cProfile
import io
import pstats
import random
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from runtime import bench
from runtime.batch import StepLayout
from runtime.buckets import buckets_for
from runtime.config import EnginePlan
from runtime.engine import Engine
from runtime.executables import CompileCounter
from runtime.metrics import EngineMetrics
from runtime.params import SamplingParams
from runtime.preparation import mask_words
from runtime.request import Prompt
from runtime.sampling import empty_row
from runtime.step_state import COUNT, TOKENS, StepOutput, empty_state

TARGET_US = 300  # at 256 rows
VOCAB = 49_152
PROMPT = 100  # tokens, give or take 50: in every step some rows need a page
PARTS = ("_fill", "_masks", "_read")


def plan_for(rows: int, length: int) -> EnginePlan:
    return EnginePlan(
        platform="cpu", dtype="bfloat16", kv_dtype="bfloat16", vocab_size=VOCAB, max_model_len=length,
        max_num_seqs=rows, max_num_batched_tokens=max(rows, 8192), max_decode_chunk=8192, max_decode_steps=1,
        page_size=16, num_pages=rows * (length // 16 + 1), page_columns=-(-length // 16),
        max_logprobs=20, num_logprobs=20, logprobs_mode="raw_logprobs", stacked=False,
        weight_bytes=0, page_bytes=1, quantization=None,
        enable_prefix_caching=True, scheduling_policy="fcfs", seed=0, max_queued=10**6, reasons=(),
    )  # fmt: skip


def stand_in(bucket, plan):
    """A step that gives every row the token 5 at once."""
    offset, (num_rows,) = StepLayout.of(bucket, plan).fields["advance"]
    rows_OS = np.zeros((TOKENS + 1, num_rows), np.int32)
    rows_OS[TOKENS], rows_OS[COUNT] = 5, 1
    out = StepOutput(rows_OS, None, None, None)  # type: ignore[arg-type]

    def step(_weights, state, packed, _mask):
        if not bucket.is_decode:  # a chunk that does not end its prompt gains nothing
            rows_OS[COUNT] = packed[offset : offset + num_rows]
        return state, out

    return step


def stand_in_engine(plan: EnginePlan) -> Engine:
    sizes = buckets_for(plan)
    loaded = types.SimpleNamespace(
        plan=plan, tokenizer=None, weights={}, steps={b: stand_in(b, plan) for b in sizes}, state=None,
        no_mask={b.num_rows: np.zeros((b.num_rows, mask_words(plan)), np.uint32) for b in sizes},
        load_history=lambda state, *_: state, load_tables=lambda state, *_: state, eos_id=2, eos_ids=frozenset([2]),
        usual_tables=None, new_state=lambda: None,
    )  # fmt: skip
    return Engine(loaded, EngineMetrics(plan), CompileCounter())  # type: ignore[arg-type]


def running(rows: int, steps: int) -> Engine:
    """An engine in which every row decodes and goes on for as many steps."""
    engine = stand_in_engine(plan_for(rows, PROMPT * 2 + steps + 16))
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=steps + 8 + rows // 2, ignore_eos=True)
    for number in range(rows):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(PROMPT // 2, PROMPT * 3 // 2))]
        engine.add(engine.prepare(f"{number}", Prompt(prompt), params))
    for _ in range(1000):
        if len(engine.step()) == rows:
            return engine
    raise RuntimeError(f"{rows} rows never decoded together; num_pages or max_num_batched_tokens is too small")


def step_times(engine: Engine, rows: int, steps: int) -> list[float]:
    """Microseconds of each step."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        gains = engine.step()
        times.append(1e6 * (time.perf_counter() - start))
        assert len(gains) == rows
    return times


def part_times(engine: Engine, rows: int, steps: int) -> dict[str, float]:
    """Median microseconds of the parts of a step."""
    spent: dict[str, list[float]] = {}

    def watch(holder, name):
        call = getattr(holder, name)
        times = spent[name.strip("_")] = []

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                times.append(1e6 * (time.perf_counter() - start))

        setattr(holder, name, timed)

    watch(engine.scheduler, "plan")
    watch(engine.scheduler, "accept")
    for name in PARTS:
        watch(engine, name)
    watch(engine.metrics, "on_tokens")
    watch(engine.metrics, "on_step")
    step_times(engine, rows, steps)
    return {name: bench.quantile(times, 0.5) for name, times in spent.items() if times}


def profile(engine: Engine, rows: int, steps: int) -> str:
    """The functions that the most time is spent in, themselves."""
    with cProfile.Profile() as profiler:
        step_times(engine, rows, steps)
    text = io.StringIO()
    stats = pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime")
    stats.print_stats(16)
    return "\n".join(line for line in text.getvalue().splitlines()[5:] if line.strip())


def call_times(num_arrays: int, rows: int, calls: int) -> list[float]:
    """Microseconds of calling a compiled program that does nothing, with a step's arguments, until it returns."""
    plan = plan_for(rows, 1024)
    state = empty_state(plan, empty_row(VOCAB, [2]), [jnp.zeros((1, 1))] * 30)
    weights = {f"layers.{i}.kernel": jnp.zeros((8, 8)) for i in range(num_arrays)}
    bucket = next(b for b in buckets_for(plan) if b.num_rows >= rows)
    packed = np.zeros(StepLayout.of(bucket, plan).size, np.int32)
    mask = jnp.zeros((rows, mask_words(plan)), jnp.uint32)
    empty = jax.jit(lambda weights, state, packed, mask: (state, packed[:5] + 1), donate_argnums=1)
    state = jax.tree.map(lambda x: x.copy(), state)  # each its own buffer: a buffer can be donated once only
    run = empty.lower(weights, state, packed, mask).compile()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        state, out = run(weights, state, packed, mask)
        times.append(1e6 * (time.perf_counter() - start))
        np.asarray(out)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", type=int, default=256, metavar="ROWS", help="profile a run of so many; 0 for none")
    parser.add_argument("--arrays", type=int, default=272, help="weights of the program that does nothing")
    args = parser.parse_args()
    about = bench.machine()
    print(
        f"{about['processor']}, {about['cpus']} CPUs; Python {about['python']}; {about['versions']}; {about['commit']}"
    )
    print(f"{args.steps} steps, a stand-in for the device\n\nrows   p50 us   p99 us   us a row   parts, median us")
    for rows in args.rows:
        times = step_times(running(rows, args.steps), rows, args.steps)
        parts = part_times(running(rows, args.steps), rows, args.steps)
        p50, p99 = bench.quantile(times, 0.5), bench.quantile(times, 0.99)
        shown = "  ".join(f"{name} {spent:.0f}" for name, spent in parts.items())
        print(f"{rows:>4}   {p50:>6.0f}   {p99:>6.0f}   {p50 / rows:>8.2f}   {shown}", flush=True)
        if rows == 256:
            print(f"       the target is {TARGET_US}: {'kept' if p50 <= TARGET_US else 'missed'}")
    times = call_times(args.arrays, args.rows[-1], args.steps)
    print(
        f"\ncalling a compiled program with {args.arrays} weights, {args.rows[-1]} rows: "
        f"p50 {bench.quantile(times, 0.5):.0f} us, p99 {bench.quantile(times, 0.99):.0f} us"
    )
    if args.profile:
        print(f"\nprofile of {args.steps} steps of {args.profile} rows; looking makes all of it slower")
        print(profile(running(args.profile, args.steps), args.profile, args.steps))


if __name__ == "__main__":
    main()
