"""Models as their publishers describe them, and hosts that serve them: what is compiled ahead of time in tests."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.buckets import Bucket
from runtime.footprint import COLLECTIVES, Instruction

HLO_NAMES = {"bfloat16": "bf16", "int8": "s8", "int4": "s4", "float32": "f32"}
HLO_NAMES |= {"float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2"}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3 = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ROWS = 64  # of the decode step that is measured beside the largest
CONFIGS = {
    "Llama-3-8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "Llama-3-70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "Qwen3-32B": QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
    "Mixtral-8x7B": LLAMA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Build:
    """A model on a host.

    Attributes:
        options: fields of EngineConfig.
        written_slices: how many of a layer's matrices a chunk brings to another place before it multiplies by them.
        has_chunk: whether a chunk is compiled too.
    """

    model: str
    target: str
    options: dict = dataclasses.field(default_factory=dict)
    written_slices: int = 0
    has_chunk: bool = True

    def __str__(self):
        return " ".join(
            [
                self.model,
                "on",
                self.target,
                *(name if value is True else str(value) for name, value in self.options.items()),
            ]
        )


TPU = [
    Build("Llama-3-8B", "v5e-8"),
    Build("Llama-3-8B", "v6e-1"),
    Build("Llama-3-70B", "v6e-8"),
    Build("Qwen3-32B", "v5p-8"),
    Build("Llama-3-8B", "tpu7x-2"),
    Build("Llama-3-70B", "v5e-16"),  # four hosts
    Build("Llama-3-8B", "v6e-1", {"kv_cache_dtype": "fp8"}),
    Build("Llama-3-8B", "v5e-1", {"quantization": "int8"}),
    Build("Llama-3-8B", "v5e-1", {"quantization": "int4"}),
    Build("Qwen3-30B-A3B", "v6e-4", {"enable_expert_parallel": True}),
    Build("Qwen3-30B-A3B", "v5e-4", {"quantization": "int8", "enable_expert_parallel": True}),
    Build("Mixtral-8x7B", "v5e-8"),
    Build("Llama-3-8B", "v6e-1", {"quantization": "int4"}, written_slices=1),  # int4[4096, 14336], in other tiles
]
GPU = [
    *(Build("Llama-3-8B", target) for target in ("h100-1", "h100-2", "h100-4", "a100-1")),
    Build("Qwen3-30B-A3B", "h100-2", {"enable_expert_parallel": True}),
    Build("Qwen3-30B-A3B", "a100-2", {"enable_expert_parallel": True}),
    Build("Qwen3-30B-A3B", "a100-1", {"quantization": "int4"}),
]
# For the fast tests: few rows and short chunks compile in seconds, and all else is as large.
SMALL = {"max_num_seqs": 32, "max_num_batched_tokens": 512}
FAST = [Build("Llama-3-8B", "v6e-1", SMALL), Build("Llama-3-8B", "v5e-8", SMALL, has_chunk=False)]


def write_config(model: str, folder: Path) -> Path:
    """A folder that holds the model's config.json and nothing else."""
    folder = folder / model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
    return folder


def prepared(build: Build, folder: Path):
    """What the host would be served with: a runtime.preparation.Prepared."""
    from converters.checkpoint import open_checkpoint
    from runtime import machine
    from runtime.config import EngineConfig
    from runtime.preparation import prepare

    place = machine.absent(build.target)
    options = {"tensor_parallel_size": len(place.devices)} | build.options
    config = EngineConfig(model=str(write_config(build.model, folder)), **options)
    return prepare(config, open_checkpoint(config.model, needs_weights=False), place)


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled step of a build."""

    prepared: Any
    bucket: Any
    footprint: Any
    written_slices: int

    def check(self) -> None:
        """What is true of every step on every accelerator."""
        plan, layout, memory = self.prepared.plan, self.prepared.layout, self.prepared.machine.memory
        found, size, config = self.footprint, len(layout.devices), self.prepared.checkpoint.config
        used, pages = found.arguments + found.beside_arguments, plan.num_pages * plan.page_bytes // size
        assert used <= memory.total, f"{self.bucket} takes {used:,} bytes of {memory.total:,}"
        assert found.aliased >= pages, f"{self.bucket}: {found.aliased:,} bytes are in place, and pages are {pages:,}"
        assert found.temporaries < self.limit, (
            f"{self.bucket}: {found.temporaries:,} bytes of temporaries, over {self.limit:,}"
        )
        # The tokens' hidden states, which some step has to bring together, may have the shape of a weight's part.
        moved = found.moved(held for held in self.held() if sorted(held[1]) != sorted(self.hidden))
        known = 0 if self.bucket.is_decode else self.written_slices
        said = f"{self.bucket} moves {len(moved)} arrays as large as weights or pages, not {known}: {_named(moved)}"
        assert len(moved) == known, said
        whole = plan.vocab_size, config.num_layers
        wrong = wrong_collectives(found.instructions, size, self.hidden, *whole, self.weights())
        assert not wrong, f"{self.bucket}: {wrong}"

    @property
    def limit(self) -> int:
        """Bytes of temporaries that a step may take on a device: 64 MB where up to 64 rows decode, 256 MB for a chunk.

        Of more rows the scores alone are more, float32[rows, vocabulary]. Each is written once, since blocks of rows
        would read the head's weights once each; on a mesh twice, before and after they change hands.
        """
        if not self.bucket.is_decode:
            return 256 * 10**6
        size = len(self.prepared.layout.devices)
        scores = 4 * self.bucket.num_rows * self.prepared.plan.vocab_size // size * min(size, 2)
        return max(64 * 10**6, scores + 31 * 10**6)

    @property
    def hidden(self) -> tuple[int, int]:
        """The shape of the tokens' hidden states."""
        return self.bucket.num_tokens, self.prepared.checkpoint.config.hidden_size

    def weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """(HLO dtype, shape) of each matrix as a device holds it, all layers and one."""
        wheres, held = self.prepared.layout.shardings(self.prepared.shapes), []
        for name, shape in self.prepared.shapes.items():
            if not name.endswith((".kernel", ".table")):
                continue
            part = wheres[name].shard_shape(shape.shape)
            layers = part[1:] if self.prepared.plan.stacked and name.startswith("layers.") else part
            held += [(HLO_NAMES[shape.dtype.name], p) for p in {part, layers}]
        return held

    def held(self) -> list[tuple[str, tuple[int, ...]]]:
        """The same, and the pages."""
        of_pages = self.prepared.programs[self.bucket].args[1].caches
        pages = [(HLO_NAMES[c.dtype.name], c.sharding.shard_shape(c.shape)) for c in of_pages]
        return self.weights() + pages


def wrong_collectives(instructions, size, hidden, vocab_size, num_layers, weights) -> str:
    """What devices say to each other that no step should, or "".

    A step has two sums of the tokens' hidden states a layer, and one if the token table is split. Beside these it tells
    what was sampled, a few numbers a row, and brings the scores of a row together, some rows to each device. It gathers
    nothing as large as a part of a weight, of whatever dtype: a weight may be rounded or widened first.

    Args:
        size: devices of a replica.
        hidden: the shape of the hidden states.
        weights: (HLO dtype, shape) of each as a device holds it.
    """
    is_split = size > 1 and vocab_size % size == 0
    kinds = {kind: [i for i in instructions if i.op == kind] for kind in COLLECTIVES}
    sums = [i for i in kinds["all-reduce"] if i.arrays[0].shape == hidden]
    expected = 2 * num_layers + is_split if size > 1 else 0
    if (count := sum(i.times for i in sums)) != expected:
        return f"{count} sums of hidden states, not {expected}: {_named(sums)}"
    kinds["all-reduce"] = [i for i in kinds["all-reduce"] if i not in sums]
    for kind, listed in kinds.items():
        most = {"all-reduce": 4, "all-gather": 8, "all-to-all": is_split}.get(kind, 0) if size > 1 else 0
        if (count := sum(i.times for i in listed)) > most:
            return f"{count} times {kind}, over {most:d}: {_named(listed)}"
    if large := [i for i in kinds["all-reduce"] if _num_elements(i) > math.prod(hidden) // 16]:
        return f"sums of more than a few numbers a row: {_named(large)}"
    smallest = min(math.prod(shape) for _, shape in weights)
    # Scores of some rows: a split table, widened, has the same axis and as many rows as hidden states have numbers.
    of_vocab, most = {vocab_size, vocab_size // size}, vocab_size * hidden[1] // 16
    is_scores = lambda a: a.dtype == "f32" and of_vocab & {*a.shape} and math.prod(a.shape) <= most
    gathers = [i for i in kinds["all-gather"] if not all(map(is_scores, i.arrays))]
    if large := [i for i in gathers if _num_elements(i) >= smallest]:
        return f"gathers as large as weights: {_named(large)}"
    return ""


def _named(instructions) -> str:
    return ", ".join(f"{i.times} x {i.op} {i.arrays[0].dtype}{list(i.arrays[0].shape)}" for i in instructions)


def _num_elements(instruction: Instruction) -> int:
    return sum(math.prod(array.shape) for array in instruction.arrays)


def measured(build: Build, folder: Path, in_usual_layouts: bool = False) -> Iterator[Step]:
    """The largest decode step, the largest of ROWS rows at most, and the largest chunk, in this order.

    The first chooses how weights lie, as in an engine, unless they are to lie as arrays usually do.
    """
    from runtime import formats
    from runtime.executables import compiled
    from runtime.footprint import Footprint

    found = prepared(build, folder)
    buckets = [key for key in found.programs if isinstance(key, Bucket)]
    decodes = sorted(bucket for bucket in buckets if bucket.is_decode)
    few = max(bucket for bucket in decodes if bucket.num_rows <= ROWS)
    layouts: formats.Layouts = {}
    chunks = sorted(bucket for bucket in buckets if not bucket.is_decode)[-1:] if build.has_chunk else []
    for bucket in dict.fromkeys([decodes[-1], few, *chunks]):
        program = found.programs[bucket]
        follows = layouts or in_usual_layouts
        made = compiled(program.following(layouts) if follows else program, found.machine, found.layout.devices)
        if program.left_open and not follows:
            layouts = formats.read_back(made)
        yield Step(found, bucket, Footprint.of(made), build.written_slices)
