"""Run as a program: what tiny models answer on one device and on several, as JSON. Devices are made of this CPU.

A line of standard input is [FAMILY, CHANGES, MESHES, OPTIONS]; a mesh is [replicas, devices of each], and with a third
part, "turned", its weights lie as support/turned_layouts.py says. A line of output is a list with what each mesh
answered, or {"error": traceback}.
"""

import dataclasses
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

from quick_compile import QUICK

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"  # before JAX asks for devices

import pytest
import tiny
import turned_layouts

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.llm import LLM
from runtime.params import SamplingParams
from runtime.request import Prompt

SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 4, "num_gpu_blocks_override": 64}
OPTIONS = {"dtype": "float32", "max_model_len": 96, "speculative_config": {"num_speculative_tokens": 0}}
KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
REQUESTS = [
    (range(5, 40), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)),
    (range(7, 20), SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=10, ignore_eos=True)),
    (range(9, 30), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)),
]


def answers(engines: list[Engine]) -> dict:
    """{request: tokens and, of the one that asked, log probabilities rounded to what several devices agree on}."""
    found: dict = {}
    for number, (prompt, params) in enumerate(REQUESTS):
        engine = engines[number % len(engines)]
        engine.add(engine.prepare(f"{number}", Prompt(list(prompt)), params))
    while any(engine.has_work for engine in engines):
        for gain in (gain for engine in engines if engine.has_work for gain in engine.step()):
            if gain.error:
                raise gain.error
            found.setdefault(gain.choice.key, []).extend(gain.token_ids)
            found.setdefault("logprobs", []).extend(round(entry.logprob, 3) for entry in gain.logprobs or ())
            if (scored := gain.choice.prompt_logprobs) and gain.finish_reason:
                found["prompt"] = [round(entry.logprob, 3) for entry in scored[1:]]
    return found


def notebook_answers(config: EngineConfig) -> dict:
    """{request: tokens} of the notebook's engine."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "model"}
    prompts, params = zip(*((list(prompt), params) for prompt, params in REQUESTS), strict=True)
    answers = LLM(config.model, **options).generate(list(prompts), list(params), use_tqdm=False)
    return {f"{number}": answer.token_ids for number, answer in enumerate(answers)}


def collectives(engine: Engine) -> dict:
    """{kind: shapes of the results} of the largest decode step."""
    bucket = max((b for b in engine.loaded.steps if b.is_decode), key=lambda b: b.num_rows)
    text = engine.loaded.steps[bucket].as_text()
    kinds: dict = {"all-reduce": [], "all-gather": [], "all-to-all": [], "collective-permute": [], "reduce-scatter": []}
    for shape, kind in re.findall(
        r"= \(?[a-z0-9]+\[([\d,]*)\]\S* (all-[a-z-]+|collective-permute|reduce-scatter)\(", text
    ):
        kinds[kind].append([int(n) for n in shape.split(",") if n])
    return kinds


def messages() -> list[str]:
    """What runtime.executables says from now on."""
    found: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("runtime.executables")
    handler.emit = lambda record: found.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return found


def meshes_answers(family: str, changes: dict, meshes: list, options: dict, said: list[str]) -> list[dict]:
    """What each mesh answers, in turn, with one folder to keep weights and steps in."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny.make_checkpoint(family, Path(folder) / "model", **changes)
        for replicas, size, *how in meshes:
            config = EngineConfig(
                model=str(checkpoint), cache_dir=f"{folder}/cache", tensor_parallel_size=size,
                data_parallel_size=replicas, **{**SIZES, **OPTIONS, **options},
            )  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                if how == ["turned"]:
                    turned_layouts.ask(patch.setattr)
                said.clear()
                found.append(mesh_answers(config, said))
    return found


def mesh_answers(config: EngineConfig, said: list[str]) -> dict:
    engines = Engine.load_replicas(config)
    loaded = engines[0].loaded
    found = {
        "turned": [turned_layouts.are_turned(engine.loaded.weights) for engine in engines],
        "said": list(said),
        "answers": answers(engines),
        "collectives": collectives(engines[0]),
        "weights": {
            name: [list(array.shape), list(array.sharding.shard_shape(array.shape))]
            for name, array in loaded.weights.items()
        },
        "devices": [sorted(d.id for d in e.loaded.state.length_X.sharding.device_set) for e in engines],
        "restored": "restore steps" in loaded.seconds,
    }
    if (config.data_parallel_size, config.tensor_parallel_size) == (2, 1):
        found["notebook"] = notebook_answers(config)
    return found | {"compiled_later": engines[0].num_recompiles}


def main():
    said = messages()
    for line in sys.stdin:
        try:
            found = meshes_answers(*json.loads(line), said)
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
