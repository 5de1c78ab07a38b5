"""What rows under a JSON schema cost their neighbours: `make bench BENCH=grammar`.

Some rows decode plainly; beside them, as many that are plain as well, or as many that write a long JSON string. The
times are those between two tokens of a plain row. The mixes take turns, so that a busy machine is unfair to none.
"""

import argparse
import sys
import time

import numpy as np

from runtime import LLM, SamplingParams, bench
from runtime.grammar import Constraint
from runtime.request import Prompt

SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 10_000}}, "required": ["text"]}
MIXES = ("nobody", "plain rows", "rows under a schema")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    print("\n".join(f"{name:10} {value}" for name, value in bench.machine().items()))
    print(f"{args.rows} plain rows and their neighbours, {args.tokens} tokens, {args.rounds} rounds\n")
    llm = LLM(args.model, max_num_seqs=2 * args.rows, max_model_len=512)
    compiler = llm.engine.grammar_compiler()
    compiled = compiler.compile_now(Constraint.from_request({"json": SCHEMA}))
    plain = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    under = SamplingParams(temperature=0, max_tokens=args.tokens, constraint=compiled)
    neighbours = dict(zip(MIXES, ([], [plain] * args.rows, [under] * args.rows), strict=True))
    gaps: dict[str, list[float]] = {name: [] for name in MIXES}
    for turn in range(args.rounds + 1):
        for name, others in neighbours.items():
            found = run(llm, [plain] * args.rows, others, seed=turn)
            gaps[name] += found if turn else []  # the first turn warms up
    print(f"{'beside them':22} {'p50 ms':>8} {'mean ms':>8} {'p99 ms':>8}")
    for name, times in gaps.items():
        times_ms = 1e3 * np.array(times)
        shown = (np.percentile(times_ms, 50), times_ms.mean(), np.percentile(times_ms, 99))
        print(f"{name:22} {shown[0]:>8.1f} {shown[1]:>8.1f} {shown[2]:>8.1f}")
    compiler.close()
    return 0


def run(llm: LLM, watched: list[SamplingParams], others: list[SamplingParams], seed: int) -> list[float]:
    """Seconds between the tokens of the watched rows, from where every row has its first."""
    rng = np.random.default_rng(seed)
    every = [
        llm.engine.prepare(f"{i}", Prompt(rng.integers(100, 10_000, 24).tolist()), params)
        for i, params in enumerate([*watched, *others])
    ]
    for choices in every:
        llm.engine.add(choices)
    sequences = [choices[0].sequence for choices in every]
    gaps, last = [], {}
    while llm.engine.has_work:
        before = [len(s.output_ids) for s in sequences]
        llm.engine.step()
        now = time.perf_counter()
        for i, sequence in enumerate(sequences[: len(watched)]):
            if len(sequence.output_ids) > before[i]:
                if i in last and all(before) and not any(s.is_finished for s in sequences):
                    gaps.append(now - last[i])
                last[i] = now
    return gaps


if __name__ == "__main__":
    sys.exit(main())
