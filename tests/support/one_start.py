"""Run as a program: one of several servers that start on one cache folder at the same time; says what it found as JSON.

one_start.py MODEL CACHE GATE     starts when the file GATE is there
"""

import json
import sys
import time
from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.params import SamplingParams
from runtime.request import Prompt

SIZES = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 64, "num_gpu_blocks_override": 16}


def start(model: str, cache: str) -> dict:
    config = EngineConfig(model=model, cache_dir=cache, speculative_config={"num_speculative_tokens": 0}, **SIZES)
    engine = Engine.load(config)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add(engine.prepare("one", Prompt(list(range(5, 25))), params))
    tokens = []
    while engine.has_work:
        for gain in engine.step():
            tokens += gain.token_ids
    return {"tokens": tokens, "phases": list(engine.loaded.seconds)}


if __name__ == "__main__":
    model, cache, gate = sys.argv[1:]
    print("here", flush=True)
    while not Path(gate).exists():
        time.sleep(0.001)
    print(json.dumps(start(model, cache)), flush=True)
