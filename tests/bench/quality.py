"""What rounding costs the demo model: `make bench BENCH=quality`.

For each way to store weights, and keys and values: bytes of the weights, bytes a token of context takes, and the
perplexity of texts/prose.txt (openings of novels of the 19th century and of the Declaration of Independence: in the
public domain) read in windows of WINDOW tokens, beside bfloat16. The change is of the mean log probability, token by
token, with its standard error; "same top" is how often the likeliest next token is bfloat16's own.

The demo model from the Python index has its layers stored in four bits already (GGUF's Q4_1, groups of 32 with a
minimum) and its token table in eight. int4 has groups of 32 too, so it finds nearly the same steps again: its row says
what a four-bit file loses on the way, not what rounding a bfloat16 file loses, which a model this small bears badly.
"int4 of 64" stands for that: groups of 64 are not the file's own, and leave the error that unrounded weights have in
groups of 32 (7 % of their size).

    make bench BENCH=quality ARGS="int4 'int8 kv'"      only these, and bfloat16
    make bench BENCH=quality MODEL=path/to/model
"""

import argparse
import contextlib
import dataclasses
import gc
import math
import os
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from runtime import LLM, SamplingParams, quantise

TEXT = Path(__file__).parent / "texts" / "prose.txt"
WINDOW = 512
SMALL = {  # three steps to compile
    "max_num_seqs": 1,
    "max_num_batched_tokens": 128,
    "speculative_config": {"num_speculative_tokens": 0},
}
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int4 of 64": {"quantization": "int4", "cache_dir": ""},  # nothing is kept of what no server makes
    "int8 kv": {"kv_cache_dtype": "int8"},
    "fp8 kv": {"kv_cache_dtype": "fp8"},
    "fp8_e5m2 kv": {"kv_cache_dtype": "fp8_e5m2"},
    "int8, int8 kv": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4, int8 kv": {"quantization": "int4", "kv_cache_dtype": "int8"},
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one kind.

    Attributes:
        logprobs: of each token of the text but the first of a window.
        tops: the likeliest token at each of these places.
    """

    weight_bytes: int
    token_bytes: int
    logprobs: list[float]
    tops: list[int]


def in_groups_of_64(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As quantise.to_int4; two groups of 32 have one scale and one offset."""
    with mock.patch.object(quantise, "group_size", lambda num_in: 64):
        values, scales, offsets = quantise.to_int4(rows)
    return values, np.repeat(scales, 2, -1), np.repeat(offsets, 2, -1)


def measure(model: str | None, name: str) -> Measured:
    rounding = mock.patch.dict(quantise.ROUNDINGS, int4=in_groups_of_64)
    with rounding if name == "int4 of 64" else contextlib.nullcontext():
        llm = LLM(model, dtype="bfloat16", max_model_len=2 * WINDOW, **SMALL, **KINDS[name])
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(TEXT.read_text())
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    entries = [
        entry
        for generation in llm.generate(windows, params, use_tqdm=False)
        for entry in generation.prompt_logprobs or []
        if entry is not None
    ]
    plan = llm.engine.plan
    return Measured(
        plan.weight_bytes,
        plan.page_bytes // plan.page_size,
        [entry.logprob for entry in entries],
        [entry.top[0][0] for entry in entries],
    )


def row(name: str, found: Measured, base: Measured) -> str:
    changes = [b - a for a, b in zip(found.logprobs, base.logprobs, strict=True)]
    mean, error = statistics.mean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
    same = statistics.mean(a == b for a, b in zip(found.tops, base.tops, strict=True))
    perplexity = math.exp(-statistics.mean(found.logprobs))
    return (
        f"{name:>14} {found.weight_bytes / 1e6:>10.1f} {found.token_bytes:>8,} {perplexity:>11.3f} "
        f"{math.expm1(mean):>+9.2%} {error:>7.2%} {same:>9.1%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--model", default=os.environ.get("MODEL") or None)
    args = parser.parse_args()
    if unknown := [name for name in args.kinds if name not in KINDS]:
        parser.error(f"{unknown[0]!r} is not known; choose of {', '.join(KINDS)}")
    base = measure(args.model, "bfloat16")
    print(f"{len(base.logprobs):,} tokens in windows of {WINDOW}")
    print(f"{'':>14} {'weights MB':>10} {'KV bytes':>8} {'perplexity':>11} {'change':>9} {'+-':>7} {'same top':>9}")
    print(row("bfloat16", base, base), flush=True)
    for name in args.kinds:
        if name != "bfloat16":
            gc.collect()
            print(row(name, measure(args.model, name), base), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
