"""The engine's own steps of a model that exists as shapes only, compiled for a chip that is not here.

`compile_steps` compiles what loading would; what a program does to memory is read off its own account and its HLO.
"""

import dataclasses
import re
import time
import types

import numpy as np
import tiny

from converters.families import family_of
from converters.fields import Fields
from runtime import executables, machine, preparation
from runtime.buckets import Bucket
from runtime.config import EngineConfig
from runtime.footprint import COLLECTIVES, Instruction, instructions


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled step. Bytes are of one device.

    Attributes:
        page_bytes: all pages.
        layer_bytes: one layer's pages or its smallest matrix, whichever is less.
        text: the optimised HLO.
    """

    bucket: Bucket
    seconds: float
    page_bytes: int
    layer_bytes: int
    aliased_bytes: int
    temp_bytes: int
    text: str

    @property
    def large_copies(self) -> list[Instruction]:
        """Copies as large as a layer's pages or one of its matrices."""
        return large_copies(self.text, self.layer_bytes)

    @property
    def num_kernels(self) -> int:
        """Calls of Pallas kernels in the program; one in layers that are scanned counts once."""
        return len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu_v2)"', self.text))


def compile_steps(hf, target, only=None, **wishes) -> list[Step]:
    """Compiles the steps of a config.json for a target of runtime.machine.absent; `only` names one bucket."""
    prepared = prepare(hf, target, **wishes)
    keys = [key for key in prepared.programs if isinstance(key, Bucket) and only in (None, str(key))]
    return [_compile(prepared, key) for key in keys]


def prepare(hf, target, **wishes) -> preparation.Prepared:
    fields = Fields(hf)
    family = family_of(fields)
    checkpoint = types.SimpleNamespace(model_class=family.model_class, config=family.config(fields), dtype="bfloat16")
    return preparation.prepare(EngineConfig(model="", **wishes), checkpoint, machine.absent(target))


def step_of(prepared, bucket, executable, seconds=0.0) -> Step:
    devices, layers = len(prepared.layout.devices), prepared.checkpoint.config.num_layers
    page_bytes = sum(map(_bytes, prepared.caches)) // devices
    is_stacked = lambda name: prepared.plan.stacked and name.startswith("layers.")
    matrices = [
        _bytes(shape) // (layers if is_stacked(name) else 1) // devices
        for name, shape in prepared.shapes.items()
        if name.endswith(".kernel") and not name.endswith("router.kernel")  # which is hardly larger than a row
    ]
    memory = executable.memory_analysis()
    sizes = (page_bytes, min(page_bytes // layers, *matrices), memory.alias_size_in_bytes, memory.temp_size_in_bytes)
    return Step(bucket, seconds, *sizes, executable.as_text())


def _compile(prepared, bucket):
    start = time.perf_counter()
    executable = executables.compiled(prepared.programs[bucket], prepared.machine, prepared.layout.devices)
    return step_of(prepared, bucket, executable, time.perf_counter() - start)


def _bytes(shape) -> int:
    return int(np.prod(shape.shape)) * shape.dtype.itemsize


def large_copies(text, least_bytes) -> list[Instruction]:
    """What an optimised HLO writes to main memory only to be elsewhere, of so many bytes at least."""
    found = [each for each in instructions(text) if each.op not in COLLECTIVES]
    return [each for each in found if each.arrays[0].is_main and each.arrays[0].num_bytes >= least_bytes]


def family(name, **changes):
    """config.json of a small model of a family, with matrices of whole tiles."""
    sizes = dict(hidden_size=512, intermediate_size=1024, moe_intermediate_size=128, head_dim=128, vocab_size=2048)
    return tiny.FAMILIES[name] | sizes | changes


LLAMA_3_8B = tiny.FAMILIES["llama"] | dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)
