"""Batches that the kernels are measured on: their arrays, the bytes that must move, the FLOPs, and the floor of a chip.

The floor is the larger of bytes / bandwidth and FLOPs / peak: no program is faster. Peaks are those of the products'
operands, of one device as JAX counts them: half of a TPU7x chip.

Dimension key as in each kernel's own file.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import latent_attention, ragged_paged_attention
from pallas_kernels.grouped_matmul import MEGABLOX_ROWS, grouped_matmul
from pallas_kernels.grouped_matmul.tpu import rows_of_tile
from pallas_kernels.latent_attention import tpu_plan
from pallas_kernels.linear import linear
from pallas_kernels.ragged_paged_attention import scales
from pallas_kernels.ragged_paged_attention.tpu_plan import round_up
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.tpu import UNROLLED
from runtime.chips import CHIPS, Chip

# Of the bundles that a TPU issues, one a cycle, as its FLOPs imply; there is no such figure of a TPU7x.
CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "v5p": 1.75e9}
SHOWN = {name: CHIPS[name] for name in ("v5e", "v6e", "v5p", "tpu7x", "h100")}

ABSENT = jax.ShapeDtypeStruct


class Case:
    """One call of a kernel.

    Attributes:
        written: which arguments it returns changed, after its answer; given away, they are written in place.
    """

    written: ClassVar[tuple[int, ...]] = ()

    @property
    def multiplied(self) -> str:
        """The dtype of its products' operands."""
        return "bfloat16"

    def bytes(self, platform: str) -> float:
        """That must move between memory and chip, each input and output once, as the platform pads them."""
        raise NotImplementedError

    @property
    def flops(self) -> float:
        raise NotImplementedError

    @property
    def function(self) -> Callable:
        """Of arrays alone; returns the answer, or a tuple of the answer and what was written."""
        raise NotImplementedError

    def arrays(self, platform: str) -> list[Any]:
        """One call's arguments, made by `random` and `whole`, so that under eval_shape they take no memory."""
        raise NotImplementedError

    def shapes(self, platform: str) -> list[jax.ShapeDtypeStruct]:
        return jax.eval_shape(lambda: self.arrays(platform))

    def floor(self, chip: Chip) -> float:
        return max(self.bytes(chip.platform) / chip.bandwidth, self.flops / chip.peak(self.multiplied))

    def grid_steps(self, grid: tuple) -> int:
        """Steps that a TPU kernel of this grid takes."""
        return math.prod(grid)

    def steps_and_bundles(self, grid: tuple, schedule) -> tuple[int, int]:
        """Steps that a TPU kernel takes, and bundles of all of them together."""
        steps = self.grid_steps(grid)
        return steps, steps * max(loop.bundles for loop in schedule.loops if loop.depth == 1)


def random(seed, shape, dtype=jnp.bfloat16, low=-1.0, high=1.0):
    return jax.random.uniform(jax.random.key(seed), shape, jnp.float32, low, high).astype(dtype)


def whole(values):
    return jnp.asarray(np.asarray(values), jnp.int32)


def num_bytes(*arrays) -> float:
    bits = sum(math.prod(a.shape) * (4 if a.dtype == jnp.int4 else 8 * a.dtype.itemsize) for a in arrays)
    return bits / 8


@dataclasses.dataclass(frozen=True)
class Rows(Case):
    """A batch of equal rows: `new` tokens each, `length` tokens in the cache after the step, pages in random order."""

    rows: int
    length: int
    new: int

    @property
    def columns(self) -> int:
        return -(-self.length // self.B)

    @property
    def seen(self) -> float:
        """Keys that a row's queries see, all of them together."""
        return self.new * (self.length - self.new) + self.new * (self.new + 1) / 2

    @property
    def is_decode(self) -> bool:
        return self.new == 1

    def batch(self):
        """Lengths, page table, where each row's queries begin, and counts."""
        pages = np.random.default_rng(0).permutation(self.rows * self.columns)
        return [
            whole([self.length] * self.rows),
            whole(pages.reshape(self.rows, self.columns)),
            whole(np.arange(self.rows + 1) * self.new),
            whole([self.rows * self.is_decode, self.rows]),
        ]


@dataclasses.dataclass(frozen=True)
class Attention(Rows):
    N: int = 32
    K: int = 8
    H: int = 128
    B: int = 128
    dtype: str = "bfloat16"

    written = (3,)

    def cache_shape(self, num_pages, platform):
        return ragged_paged_attention.cache_shape(num_pages, self.B, self.K, self.H, platform, self.dtype)

    def cache_bytes(self, platform):
        """Of all rows' keys and values, and a page's part of its scales, as the platform pads them."""
        _, tokens, C, H = self.cache_shape(1, platform)
        return self.rows * self.length * tokens / self.B * C * H * jnp.dtype(self.dtype).itemsize

    def bytes(self, platform):
        """Each key and value once, the new ones once more into their pages, queries in and answers out."""
        tokens = self.rows * self.new
        return self.cache_bytes(platform) * (1 + self.new / self.length) + 4 * tokens * self.N * self.H

    @property
    def flops(self):
        return 4 * self.rows * self.N * self.H * self.seen

    @property
    def function(self):
        return functools.partial(ragged_paged_attention.ragged_paged_attention, scale=self.H**-0.5)

    def arrays(self, platform, num_pages=None):
        T, P = round_up(self.rows * self.new, 16), num_pages or self.rows * self.columns
        tokens = [random(i, (T, heads, self.H)) for i, heads in enumerate((self.N, self.K, self.K))]
        span = 100 if self.dtype == "int8" else 1
        pages = random(3, self.cache_shape(P, platform), self.dtype, -span, span)
        if scales.are_in(pages, self.K):
            vectors = scales.as_vectors(jnp.full((1, 2 * self.K), 0.01), pages.shape[3])
            pages = pages.at[:, :, 2 * self.K :].set(vectors[0])
        if scales.are_behind(pages, self.K):
            (planes,) = scales.as_planes(jnp.full((1, pages.shape[2]), 0.01))
            L = pages.shape[1] - self.B
            pages = pages.at[:, self.B :].set(jnp.tile(planes[..., None], (L // scales.BYTES, 1, pages.shape[3])))
        return [*tokens, pages, *self.batch()]


@dataclasses.dataclass(frozen=True)
class Int4Matmul(Case):
    """Gate and up of a layer."""

    T: int
    I: int = 4096
    O: int = 14336
    group: int = 32

    def bytes(self, platform):
        x, *weights = self.shapes(platform)
        return num_bytes(x, *weights) + 2 * self.T * self.O

    @property
    def flops(self):
        return 2 * self.T * self.I * 2 * self.O

    @property
    def function(self):
        return lambda x_TI, kernel, scale, offset: linear(
            x_TI, kernel, kernel_scale=scale, kernel_offset=offset, activation="silu"
        )

    def arrays(self, platform):
        groups = (2, self.O, self.I // self.group)
        kernel = random(1, (2, self.O, self.I), jnp.int4, -8, 8)
        return [random(0, (self.T, self.I)), kernel, random(2, groups) / 100, random(3, groups) / 100]


@dataclasses.dataclass(frozen=True)
class GroupedMatmul(Case):
    """The first product of a layer's experts, of as many rows each; weights of bfloat16 or rounded."""

    tokens: int
    E: int
    top: int
    I: int
    O: int
    dtype: str = "bfloat16"

    @property
    def T(self) -> int:
        return self.tokens * self.top

    @property
    def multiplied(self) -> str:
        return "int8" if self.dtype == "int8" else "bfloat16"

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(np.arange(self.E + 1) * self.T // self.E)

    def bytes(self, platform):
        x_TI, *weights, _, _ = self.shapes(platform)
        return num_bytes(*weights) * (self.sizes > 0).mean() + num_bytes(x_TI) + 4 * self.T * self.O

    @property
    def flops(self):
        return 2 * self.T * self.I * self.O

    @property
    def function(self):
        def multiply(x_TI, kernel, *others):
            *scale, sizes, token_R = others
            options = dict(zip(("kernel_scale", "kernel_offset"), scale, strict=False))
            return grouped_matmul(x_TI, kernel, sizes, token_R=token_R, **options)

        return multiply

    def arrays(self, platform):
        span, size = {"bfloat16": 1, "int8": 127, "int4": 8}[self.dtype], (self.E, self.O, self.I)
        groups = (*size[:2], self.I // 32)
        scales = {"int8": [random(2, size[:2], jnp.float32)], "int4": [random(2, groups), random(3, groups)]}
        return [
            random(0, (self.tokens, self.I)),
            random(1, size, self.dtype, -span, span),
            *scales.get(self.dtype, []),
            whole(self.sizes),
            whole(np.random.default_rng(0).permutation(self.T) // self.top),
        ]

    def grid_steps(self, grid):
        """The grid's side that is known at run time: tiles of rows, one more for each expert that shares one."""
        rows = MEGABLOX_ROWS if self.dtype == "bfloat16" else rows_of_tile(self.T, self.E, self.dtype)
        ends = np.cumsum(self.sizes)
        tiles = sum(-(-e // rows) - (e - n) // rows for e, n in zip(ends, self.sizes, strict=True) if n)
        return math.prod(side if isinstance(side, int) else int(tiles) for side in grid)


@dataclasses.dataclass(frozen=True)
class LatentAttention(Rows):
    """Of DeepSeek-V2-Lite."""

    N: int = 16
    R: int = 512
    H: int = 64
    B: int = 128

    written = (4,)

    def cache_shape(self, platform):
        return latent_attention.cache_shape(self.rows * self.columns, self.B, self.R, self.H, platform)

    def bytes(self, platform):
        width, tokens = self.cache_shape(platform)[2], self.rows * self.new
        return 2 * self.rows * (self.length + self.new) * width + 2 * tokens * self.N * (2 * self.R + self.H)

    @property
    def flops(self):
        return 2 * self.rows * self.N * (2 * self.R + self.H) * self.seen

    @property
    def function(self):
        return functools.partial(latent_attention.latent_attention, scale=0.1)

    def arrays(self, platform):
        T = self.rows * self.new
        widths = (self.N, self.R), (self.N, self.H), (self.R,), (self.H,)
        tokens = [random(i, (T, *width)) for i, width in enumerate(widths)]
        return [*tokens, random(4, self.cache_shape(platform)), *self.batch()]

    def steps_and_bundles(self, grid, schedule):
        """Steps are items: a block of queries against what one fetch brings in. Loops inside have turns of their own.

        Of loops without products the longest is taken for that over pages. The writer comes before the walks over
        decodes and chunks; a granule goes out some turns after it came in.
        """
        q_latent, _, _, _, cache, *_ = self.shapes("tpu")
        size = tpu_plan.blocks(q_latent, cache, self.columns, "decode" if self.is_decode else "chunk")
        past = self.length - self.new
        ends = [min(past + q + size.query, self.length) for q in range(0, self.new, size.query)]
        items, blocks, pages = (
            self.rows * sum(-(-end // n) for end in ends) for n in (size.fetch, size.compute, self.B)
        )
        granules = self.rows * (-(-self.length // tpu_plan.GRANULE) - past // tpu_plan.GRANULE)
        turns = granules + tpu_plan.IN_FLIGHT // 2
        outer = [loop for loop in schedule.loops if loop.depth == 1]
        walk = [loop for loop in outer if loop.uses["MXU"]][0 if self.is_decode else -1]
        inside = walk.inside(schedule.loops)
        block = next(loop.bundles for loop in inside if loop.uses["MXU"])
        page = max(loop.bundles for loop in inside if not loop.uses["MXU"])
        writer = max(loop.bundles for loop in outer if not loop.uses["MXU"])
        return items, items * (walk.bundles - block) + blocks * block + pages * page + turns * writer


@dataclasses.dataclass(frozen=True)
class SelectiveScan(Case):
    """Of Mamba-2.8B. Ten operations a number of state and token: decay, inflow, sum and answer."""

    rows: int
    new: int
    C: int = 5120
    N: int = 16

    written = (6,)

    @property
    def T(self) -> int:
        return self.rows * self.new

    def bytes(self, platform):
        *inputs, _, _ = self.shapes(platform)
        state = inputs[-1]
        return num_bytes(*inputs, state) + 2 * self.T * self.C

    @property
    def flops(self):
        return 10 * self.T * self.C * self.N

    @property
    def function(self):
        return functools.partial(selective_scan, max_q_len=1 if self.new == 1 else None)

    def arrays(self, platform):
        T, C, N = self.T, self.C, self.N
        return [
            random(0, (T, C)),
            random(1, (T, C), low=0.01, high=0.1),
            random(2, (N, C), jnp.float32, -16, -1),
            random(3, (T, N)),
            random(4, (T, N)),
            random(5, (C,), jnp.float32),
            random(6, (self.rows, N, C), jnp.float32),
            whole(np.arange(self.rows + 1) * self.new),
            whole(self.rows),
        ]

    def steps_and_bundles(self, grid, schedule):
        """A step holds a loop over parts of rows, and that one over some tokens at a time."""
        (step,) = [loop for loop in schedule.loops if loop.depth == 1 and loop.uses["EUP"]]
        (part,) = [loop for loop in step.inside(schedule.loops) if loop.uses["EUP"]]
        turn, rest = [loop for loop in part.inside(schedule.loops) if loop.uses["EUP"]]
        tiles, num_blocks = grid
        size = self.T // num_blocks
        parts = [n for block in range(num_blocks) for n in self.parts(block * size, size)]
        turns = sum(n // UNROLLED * turn.bundles + n % UNROLLED * rest.bundles for n in parts)
        bundles = num_blocks * (step.bundles - part.bundles) + turns
        bundles += len(parts) * (part.bundles - turn.bundles - rest.bundles)
        return math.prod(grid), tiles * bundles

    def parts(self, first, size):
        """Tokens of each row in a block."""
        ends = range(self.new, self.T + 1, self.new)
        found = [min(end, first + size) - max(end - self.new, first) for end in ends]
        return [n for n in found if n > 0]


ATTENTION = {
    "8B decode, 64 x 1k": Attention(64, 1024, 1),
    "8B decode, 64 x 8k": Attention(64, 8192, 1),
    "8B decode int8, 64 x 8k": Attention(64, 8192, 1, dtype="int8"),
    "8B decode fp8, 64 x 8k": Attention(64, 8192, 1, dtype="float8_e4m3fn"),
    "8B chunk, 4 x 512 of 2k": Attention(4, 2048, 512),
    "8B chunk, 1 x 1k of 8k": Attention(1, 8192, 1024),
    "8B chunk int8, 1 x 1k of 8k": Attention(1, 8192, 1024, dtype="int8"),
    "8B chunk fp8, 1 x 1k of 8k": Attention(1, 8192, 1024, dtype="float8_e4m3fn"),
    "8B on one of 8 chips, decode": Attention(64, 2048, 1, N=4, K=1),
    "8B on one of 8 chips, chunk": Attention(1, 8192, 1024, N=4, K=1),
    "heads of 64, decode": Attention(64, 2048, 1, H=64),
    "heads of 64, chunk": Attention(4, 2048, 512, H=64),
    "heads of 256, decode": Attention(64, 2048, 1, N=16, K=8, H=256),
    "heads of 256, chunk": Attention(4, 2048, 512, N=16, K=8, H=256),
    "heads of 64 int8, decode": Attention(64, 2048, 1, H=64, dtype="int8"),
    "heads of 64 fp8, decode": Attention(64, 2048, 1, H=64, dtype="float8_e4m3fn"),
    "heads of 256 int8, decode": Attention(64, 2048, 1, N=16, K=8, H=256, dtype="int8"),
    "heads of 256 fp8, decode": Attention(64, 2048, 1, N=16, K=8, H=256, dtype="float8_e4m3fn"),
}
OTHERS = {
    "int4 gate and up of 8B, 16": Int4Matmul(16),
    "int4 gate and up of 8B, 64": Int4Matmul(64),
    "int4 gate and up of 8B, 512": Int4Matmul(512),
    "experts of Mixtral-8x7B, 64": GroupedMatmul(64, 8, 2, 4096, 14336),
    "experts of Mixtral-8x7B, 512": GroupedMatmul(512, 8, 2, 4096, 14336),
    "experts of DeepSeek-V2-Lite, 64": GroupedMatmul(64, 64, 6, 2048, 1408),
    "experts of DeepSeek-V2-Lite, 512": GroupedMatmul(512, 64, 6, 2048, 1408),
    "int8 experts of Mixtral-8x7B, 64": GroupedMatmul(64, 8, 2, 4096, 14336, "int8"),
    "int8 experts of Mixtral-8x7B, 512": GroupedMatmul(512, 8, 2, 4096, 14336, "int8"),
    "experts of Qwen3-30B-A3B, 64": GroupedMatmul(64, 128, 8, 2048, 1536),
    "experts of Qwen3-30B-A3B, 2048": GroupedMatmul(2048, 128, 8, 2048, 1536),
    "int8 experts of Qwen3-30B-A3B, 64": GroupedMatmul(64, 128, 8, 2048, 1536, "int8"),
    "int8 experts of Qwen3-30B-A3B, 2048": GroupedMatmul(2048, 128, 8, 2048, 1536, "int8"),
    "int4 experts of Mixtral-8x7B, 64": GroupedMatmul(64, 8, 2, 4096, 14336, "int4"),
    "int4 experts of Mixtral-8x7B, 512": GroupedMatmul(512, 8, 2, 4096, 14336, "int4"),
    "int4 experts of Qwen3-30B-A3B, 64": GroupedMatmul(64, 128, 8, 2048, 1536, "int4"),
    "int4 experts of Qwen3-30B-A3B, 2048": GroupedMatmul(2048, 128, 8, 2048, 1536, "int4"),
    "latent decode, 64 x 2k": LatentAttention(64, 2048, 1),
    "latent chunk, 1 x 512 of 2k": LatentAttention(1, 2048, 512),
    "scan of Mamba-2.8B, 64 decodes": SelectiveScan(64, 1),
    "scan of Mamba-2.8B, 1 x 512": SelectiveScan(1, 512),
}
CASES: dict[str, Case] = ATTENTION | OTHERS
