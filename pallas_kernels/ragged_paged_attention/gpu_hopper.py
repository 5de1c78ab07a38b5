"""The Mosaic GPU kernel of ragged paged attention for Hopper GPUs: a tile of 64 query rows, pages fetched by TMA.

Heads of 256 are cut in two for two warpgroups, which add up their logits. Pages of 8 bits become 16 in shared memory:
see gpu_narrow.

Source: Shah et al. 2024, arXiv 2407.08608 (Hopper's wgmma and TMA under attention). Compared with attention_mgpu of
jax.experimental.pallas.ops.gpu.

Dimension key as in gpu.py, and
    U  64 cache tokens of a block
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_narrow, scales
from pallas_kernels.ragged_paged_attention.gpu_plan import TILE, num_stages, num_warpgroups, widened
from pallas_kernels.ragged_paged_attention.reference import MASKED


def num_rows(wanted: int) -> int:
    """Rows of a tile with so many queries, in eights."""
    return -(-wanted // 8) * 8


def attend_tiles(
    tiles_I5, pages_SM, sinks_KR, q_IKRH, cache_PBCH, k_scale, v_scale,
    *, group, scale, soft_cap, splits, answers, interpret,
):  # fmt: skip
    """Attends each tile to each split of its keys.

    Args:
        tiles_I5: int32, as `gpu._row_tiles` gives them.
        pages_SM: int32 page ids, each row's in order.
        sinks_KR: float32[K, TILE], a row's head's sink or MASKED.
        q_IKRH: queries, row r of a tile being head r % G of its token r // G; H as in the cache, R by `num_rows`.
        group: G.
        answers: the dtype of answers that are not joined with others.

    Returns:
        Answers `[I, K, splits, R, H]`, float32 where they are to be joined; log-sum-exps, float32[I, K, splits, R].
    """
    I, K, R, H = q_IKRH.shape
    dtype, wide = cache_PBCH.dtype, widened(cache_PBCH.dtype)
    tile = Tile(
        G=group, page_size=cache_PBCH.shape[1], splits=splits, rows=R, scale=scale, soft_cap=soft_cap,
        stages=num_stages(H, dtype), head_dim=H, warpgroups=num_warpgroups(H), dtype=dtype, wide=wide, answers=answers,
        first_scale=2 * K if scales.are_in(cache_PBCH, K) else None,
    )  # fmt: skip
    inputs = [tiles_I5, pages_SM, sinks_KR, q_IKRH.astype(wide), cache_PBCH]
    if tile.is_narrow:
        inputs[3], factor_IKR = gpu_narrow.queries(q_IKRH, wide)
        factor_IKR *= scale * (1.0 if k_scale is None else k_scale)
        inputs += [factor_IKR, jnp.full((1,), 1.0 if v_scale is None else v_scale, jnp.float32)]
    return tile.kernel(I, K, interpret)(*inputs)


@dataclasses.dataclass(frozen=True)
class Tile:
    """The kernel for one tile, kv head and split; everything static about it.

    A warpgroup has queries, keys and values of its own share of the head's dimensions. It alone fetches and reads them;
    only logits are summed over all.
    """

    G: int
    page_size: int
    splits: int
    rows: int  # of the tile's 64 that are wanted, in eights
    scale: float
    soft_cap: float | None
    stages: int
    head_dim: int
    warpgroups: int
    dtype: object  # of pages
    wide: object  # that wgmma multiplies
    answers: object
    first_scale: int | None  # of a token's vectors the first that holds scales

    @property
    def is_narrow(self):
        return self.dtype != self.wide

    @property
    def has_scales(self):
        return self.first_scale is not None

    @property
    def share(self):
        """Head dimensions of a warpgroup."""
        return self.head_dim // self.warpgroups

    @property
    def parts(self):
        """A warpgroup's share cut into parts, each accumulated on its own: (first, width)."""
        # By halves float32 answers of a split leave room for a second block of threads, and those of two warpgroups fit
        # the memory of the weights or of the logits.
        width = 64 if self.splits > 1 or self.warpgroups > 1 else self.share
        return [(first, width) for first in range(0, self.share, width)]

    @property
    def copies(self):
        """Copies that fill a block of keys, and the tokens of each."""
        tokens = min(self.page_size, TILE)
        return TILE // tokens, tokens

    def kernel(self, num_tiles, num_kv_heads, interpret):
        H, X, W, D = self.head_dim, self.splits, self.warpgroups, self.share
        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        as_pages = (plgpu.TilingTransform((8, D)), plgpu.SwizzleTransform(D)) if self.is_narrow else tiled
        out_dtype = self.answers if X == 1 else jnp.float32
        num_copies, _ = self.copies
        scratch = dict(
            q_smem=plgpu.SMEM((W, TILE, D), self.wide, transforms=tiled),
            k_smem=plgpu.SMEM((W * self.stages, TILE, D), self.dtype, transforms=as_pages),
            v_smem=plgpu.SMEM((W * self.stages, TILE, D), self.dtype, transforms=as_pages),
            p_smem=plgpu.SMEM((W, TILE, TILE), self.wide, transforms=tiled),
            row_smem=plgpu.SMEM((W, TILE), jnp.float32),
            q_barriers=plgpu.Barrier(num_barriers=W),
            row_barriers=plgpu.Barrier(num_arrivals=1 + self.is_narrow, num_barriers=W),
            k_barriers=plgpu.Barrier(num_arrivals=num_copies * (1 + self.has_scales), num_barriers=W * self.stages),
            v_barriers=plgpu.Barrier(num_arrivals=num_copies, num_barriers=W * self.stages),
            meeting=plgpu.Barrier(num_arrivals=W),
        )
        if W > 1:
            scratch["logits_smem"] = plgpu.SMEM((W, TILE, TILE), jnp.float32)
        if self.is_narrow:
            scratch["wide_smem"] = plgpu.SMEM((W, TILE, D), self.wide, transforms=tiled)
            scratch["factor_smem"] = plgpu.SMEM((W, TILE), jnp.float32)
        if self.has_scales:
            scratch["bytes_smem"] = plgpu.SMEM((W * self.stages, TILE, gpu_narrow.SCALE_BYTES), self.dtype)
            scratch["scale_smem"] = plgpu.SMEM((W, 2, TILE), jnp.float32)
        if W == 1 or (self.is_narrow and X == 1):
            scratch["out_smem"] = plgpu.SMEM((W, TILE, self.parts[0][1]), out_dtype)
        return plgpu.kernel(
            self.body,
            out_type=[
                jax.ShapeDtypeStruct((num_tiles, num_kv_heads, X, self.rows, H), out_dtype),
                jax.ShapeDtypeStruct((num_tiles, num_kv_heads, X, self.rows), jnp.float32),
            ],
            grid=(num_tiles, num_kv_heads, X),
            grid_names=("tile", "head", "split"),
            num_threads=W,
            thread_name="warpgroup",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=interpret,
        )

    def body(self, tiles, pages, sinks, q, cache, *rest, **smem):
        """Attends one tile to one split of its keys; an empty split answers zeros and a log-sum-exp of MASKED."""
        *factors, out, lse = rest
        tile, head, split, warpgroup = (lax.axis_index(name) for name in ("tile", "head", "split", "warpgroup"))
        row, position, end, low = (tiles[tile, i] for i in (0, 2, 3, 4))
        begin = jnp.maximum(low, 0)
        first_block, last_block = lax.div(begin, TILE), lax.div(end + TILE - 1, TILE)
        turns = lax.div(last_block - first_block + self.splits - 1, self.splits)
        block = first_block + split * turns
        stop = jnp.minimum(block + turns, last_block)
        share = pl.ds(pl.multiple_of(warpgroup * self.share, self.share), self.share)
        first_slot = warpgroup * self.stages
        q_barrier, row_barrier = (smem[name].at[warpgroup] for name in ("q_barriers", "row_barriers"))
        fetch = functools.partial(self.fetch, pages, cache, row, head, share, begin, end, **smem)
        # Rows of the tile past those wanted hold anything: no row meets another.
        q_rows = smem["q_smem"].at[warpgroup, pl.ds(0, self.rows)]
        plgpu.copy_gmem_to_smem(q.at[tile, head, :, share], q_rows, q_barrier)
        plgpu.copy_gmem_to_smem(sinks.at[head], smem["row_smem"].at[warpgroup], row_barrier)
        if self.is_narrow:
            plgpu.copy_gmem_to_smem(factors[0].at[tile, head], smem["factor_smem"].at[warpgroup], row_barrier)
        for stage in range(self.stages):

            @pl.when(block + stage < stop)
            def _start(stage=stage):
                fetch(block + stage, first_slot + stage)

        plgpu.barrier_wait(q_barrier)
        plgpu.barrier_wait(row_barrier)
        carry = self.start(split, smem["row_smem"].at[warpgroup])

        def fold(b, carry):
            # The slot that the last turn has emptied. Here and not at that turn's end, where the compiler would carry
            # its sums and products past the branch, which are more than the registers hold.
            @pl.when((b > block) & (b + self.stages - 1 < stop))
            def _next():
                fetch(b + self.stages - 1, first_slot + lax.rem(b - 1 - block, self.stages))

            slot = first_slot + lax.rem(b - block, self.stages)
            return self.fold(b, slot, head, position, low, end, carry, **smem)

        accs, top_R, total_R = lax.fori_loop(block, stop, fold, carry)
        v_scale = factors[1][0] if self.is_narrow else None
        self.finish(accs, top_R, total_R, v_scale, out.at[tile, head, split], lse.at[tile, head, split], **smem)

    def start(self, split, row_smem):
        """Accumulators, running top and total; the sink counts once, in the first split."""
        sink_R = plgpu.layout_cast(row_smem[...], plgpu.Layout.WGMMA.reduce(1))
        top_R = sink_R + jnp.where(split == 0, 0.0, MASKED)
        total_R = jnp.where(top_R > 0.5 * MASKED, jnp.ones_like(top_R), jnp.zeros_like(top_R))
        accs = tuple(
            plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), plgpu.Layout.WGMMA) for _, width in self.parts
        )
        return accs, top_R, total_R

    def fetch(
        self, pages, cache, row, head, share, begin, end, block, slot, *, k_smem, v_smem, k_barriers, v_barriers, **rest
    ):
        """Starts bringing in a block of keys and values. Pages out of sight are replaced by one in sight."""
        num_copies, tokens = self.copies
        for i in range(num_copies):
            start = block * TILE + i * tokens
            p = jnp.clip(
                lax.div(start, self.page_size), lax.div(begin, self.page_size), lax.div(end - 1, self.page_size)
            )
            page = page_id(pages, row, p)
            inside = pl.ds(pl.multiple_of(lax.rem(start, self.page_size), tokens), tokens)
            here = pl.ds(i * tokens, tokens)
            key, value = (cache.at[page, inside, 2 * head + j, share] for j in (0, 1))
            plgpu.copy_gmem_to_smem(key, k_smem.at[slot, here], k_barriers.at[slot])
            plgpu.copy_gmem_to_smem(value, v_smem.at[slot, here], v_barriers.at[slot])
            if self.has_scales:
                to = rest["bytes_smem"].at[slot, here]
                gpu_narrow.fetch_scales(cache.at[page], inside, head, self.first_scale, to, k_barriers.at[slot])

    def fold(self, block, slot, head, position, low, end, carry, *, q_smem, k_smem, v_smem, p_smem, **rest):
        """Folds a block of keys into the running softmax. Weights pass through memory, as the interpreter asks."""
        accs, top_R, total_R = carry
        warpgroup = lax.axis_index("warpgroup")
        p_smem = p_smem.at[warpgroup]
        wait(rest["k_barriers"], slot)
        keys = k_smem.at[slot]
        if self.is_narrow:
            keys = rest["wide_smem"].at[warpgroup]
            gpu_narrow.widen(k_smem.at[slot], keys)

        def score(acc_ref):
            plgpu.wgmma(acc_ref, q_smem.at[warpgroup], keys.T)
            return acc_ref[...]

        logits_RU = pl.run_scoped(score, plgpu.ACC((TILE, TILE), jnp.float32))
        if self.warpgroups > 1:
            logits_RU = self.sum_shares(logits_RU, rest["logits_smem"], rest["meeting"])
        if self.has_scales:
            scale_smem = rest["scale_smem"].at[warpgroup]
            seen = (low - block * TILE, end - block * TILE)
            gpu_narrow.read_scales(rest["bytes_smem"].at[slot], scale_smem, head, *seen)
            logits_RU *= gpu_narrow.of_columns(scale_smem.at[0])
        if self.is_narrow:
            factor_R = plgpu.load(rest["factor_smem"].at[warpgroup], layout=plgpu.Layout.WGMMA.reduce(1))
            logits_RU = logits_RU * lax.broadcast_in_dim(factor_R, logits_RU.shape, [0])
        else:
            logits_RU = logits_RU * self.scale
        if self.soft_cap is not None:
            logits_RU = jnp.tanh(logits_RU * (1 / self.soft_cap)) * self.soft_cap
        logits_RU = jnp.where(self.seen(block, position, low, end), logits_RU, MASKED)
        new_top_R = jnp.maximum(top_R, logits_RU.max(axis=1))
        decay_R = jnp.exp(top_R - new_top_R)
        probs_RU = jnp.exp(logits_RU - lax.broadcast_in_dim(new_top_R, logits_RU.shape, [0]))
        total_R = total_R * decay_R + probs_RU.sum(axis=1)
        if self.has_scales:
            probs_RU *= gpu_narrow.of_columns(scale_smem.at[1])
        p_smem[...] = probs_RU.astype(self.wide)
        plgpu.commit_smem()
        wait(rest["v_barriers"], slot)
        values = v_smem.at[slot]
        if self.is_narrow:
            values = rest["wide_smem"].at[warpgroup]
            gpu_narrow.widen(v_smem.at[slot], values)

        @pl.when((block * TILE < low) | (end < (block + 1) * TILE))
        def _blank():
            blank(values, low - block * TILE, end - block * TILE)

        new_accs = []
        for (first, width), acc_RH in zip(self.parts, accs, strict=True):

            def gather(acc_ref, first=first, width=width):
                plgpu.wgmma(acc_ref, p_smem, values.at[:, pl.ds(first, width)])
                return acc_ref[...]

            value_RH = pl.run_scoped(gather, plgpu.ACC((TILE, width), jnp.float32))
            new_accs.append(acc_RH * lax.broadcast_in_dim(decay_R, acc_RH.shape, [0]) + value_RH)
        return tuple(new_accs), new_top_R, total_R

    def sum_shares(self, logits_RU, logits_smem, meeting):
        """Adds what the warpgroups make of their shares; all get the same, as two are added in either order."""
        assert self.warpgroups == 2
        warpgroup = lax.axis_index("warpgroup")
        logits_smem.at[warpgroup][...] = logits_RU
        meet(meeting)
        logits_RU += plgpu.layout_cast(logits_smem.at[1 - warpgroup][...], plgpu.Layout.WGMMA)
        meet(meeting)  # or the next block's would come before these are read
        return logits_RU

    def seen(self, block, position, low, end):
        """Which keys of a block each query row sees: [low, position] at the first token, a key further at each."""
        # Bounds by row and columns by themselves: a position for each of the tile's elements would fill the registers.
        token_R = lax.div(_iota((TILE,), 0, plgpu.Layout.WGMMA.reduce(1)), jnp.full((TILE,), self.G, jnp.int32))
        first_R = low + token_R - block * TILE
        last_R = jnp.minimum(position + token_R, end - 1) - block * TILE
        column_RU = _iota((TILE, TILE), 1, plgpu.Layout.WGMMA)
        wide = lambda x_R: lax.broadcast_in_dim(x_R, (TILE, TILE), [0])
        return (column_RU >= wide(first_R)) & (column_RU <= wide(last_R))

    def finish(self, accs, top_R, total_R, v_scale, out, lse, *, row_smem, p_smem, **rest):
        warpgroup = lax.axis_index("warpgroup")
        row_smem = row_smem.at[warpgroup]
        free = p_smem if self.splits == 1 else rest.get("logits_smem")
        out_smem = rest.get("out_smem", free).at[warpgroup]
        divisor_R = jnp.maximum(total_R, 1e-30)
        row_smem[...] = jnp.where(total_R > 0, top_R + jnp.log(divisor_R), jnp.full_like(total_R, MASKED))
        wanted = pl.ds(0, self.rows)
        for (first, width), acc_RH in zip(self.parts, accs, strict=True):
            answer_RH = acc_RH / lax.broadcast_in_dim(divisor_R, acc_RH.shape, [0])
            if self.is_narrow:
                answer_RH *= v_scale
            out_smem[...] = answer_RH.astype(out_smem.dtype)
            plgpu.commit_smem()
            here = pl.ds(pl.multiple_of(warpgroup * self.share + first, width), width)
            plgpu.copy_smem_to_gmem(out_smem.at[wanted], out.at[:, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 0)
        def _log_sum_exps():
            plgpu.copy_smem_to_gmem(row_smem.at[wanted], lse)
            plgpu.wait_smem_to_gmem(0)


def _iota(shape, axis, layout):
    return plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout), layout)


def page_id(pages, row, p):
    return pages[row, p]


def wait(barriers, slot):
    """Until all copies of a slot's block are in."""
    plgpu.barrier_wait(barriers.at[slot])


def meet(barrier):
    """Until all warpgroups are here."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def blank(v_smem, begin, end):
    """Zeroes the values of tokens outside [begin, end), which may be anything: 0 times NaN is NaN."""
    width = min(v_smem.shape[1], 64)
    token_UH = _iota((v_smem.shape[0], width), 0, plgpu.Layout.WGMMA)
    for first in range(0, v_smem.shape[1], width):  # all at once would not fit the registers beside the accumulators
        part = v_smem.at[:, pl.ds(first, width)]
        value_UH = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
        part[...] = jnp.where((token_UH >= begin) & (token_UH < end), value_UH, jnp.zeros_like(value_UH))
    plgpu.commit_smem()
