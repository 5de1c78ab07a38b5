"""What windows and drafts change, in one run: `make bench BENCH=speculation`.

Four engines of one model: single steps, windows, drafts, and both. Each continues a text that repeats itself and one
that does not, for 1, 4 and 16 requests at once, greedily. The tokens must be the same everywhere; times are medians
over --runs, gains are against single steps.
"""

import argparse
import statistics
import sys
import time

from runtime import bench, demo
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.params import SamplingParams
from runtime.request import Prompt

LINE = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n"
COPIED = "Here is the list again, word for word.\n" + 6 * LINE
PROSE = "Once upon a time, in a small village by the sea, there lived an old fisherman who"
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4}


def answer(engine: Engine, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], float]:
    """(each prompt's tokens, seconds a token of one request), from the first token to the last."""
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for number, ids in enumerate(prompts):
        engine.add(engine.prepare(str(number), Prompt(ids), params))
    found: list[list[int]] = [[] for _ in prompts]
    began = 0.0
    while engine.has_work:
        for gain in engine.step():
            found[int(gain.choice.key)] += gain.token_ids
        if not began and all(found):
            began, known = time.perf_counter(), sum(map(len, found))
    return found, (time.perf_counter() - began) / (sum(map(len, found)) - known) * len(prompts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=8, help="of a window")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print("\n".join(f"{name:10} {value}" for name, value in bench.machine().items()))
    path = str(demo.fetch(args.model))
    drafts = {"speculative_config": DRAFTS | {"disable_by_batch_size": max(args.rows)}}
    none = {"speculative_config": {"num_speculative_tokens": 0}}  # a request that is alone would draft
    wishes = {
        "single steps": {"max_decode_steps": 1, **none},
        f"windows of {args.steps}": {"max_decode_steps": args.steps, **none},
        "drafts": {"max_decode_steps": 1, **drafts},
        "both": {"max_decode_steps": args.steps, **drafts},
    }
    # All of them live at once and take turns, for a machine's speed changes within a minute.
    engines = {
        name: Engine.load(EngineConfig(model=path, max_num_seqs=max(args.rows), kv_cache_memory_bytes=2**29, **wish))
        for name, wish in wishes.items()
    }
    print(f"\nmilliseconds a token of each request, {args.tokens} tokens; gain over single steps; same tokens")
    for kind, text in (("repeats", COPIED), ("prose", PROSE)):
        for rows in args.rows:
            tokens, spent = {}, {name: [] for name in engines}
            for _ in range(args.runs):
                for name, engine in engines.items():
                    assert engine.tokenizer is not None
                    # Another beginning each, or all would share their pages.
                    prompts = [engine.tokenizer.encode(f"{number}. {text}") for number in range(rows)]
                    tokens[name], seconds = answer(engine, prompts, args.tokens)
                    spent[name].append(seconds)
            base = statistics.median(spent["single steps"])
            for name, times in spent.items():
                same = sum(a == b for a, b in zip(tokens[name], tokens["single steps"], strict=True))
                middle = statistics.median(times)
                print(
                    f"{name:>14}  {kind:>7}  {rows:>3} at once  {1e3 * middle:>7.1f} ms  {base / middle:>5.2f} times"
                    f"  {same}/{rows} the same",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
