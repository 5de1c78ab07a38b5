"""The selective scan on a TPU: states stay in registers over a row's tokens, and every input is read once.

Tiles of channels come one after another, and within each blocks of tokens. A register holds 8 x 128 channels of a tile,
so a state of N numbers is N registers, and what goes into and comes out of it, which all channels share, are scalars.
Arrays have channels in rows; a block is laid out by 128 channels, [k, tokens, 128], whose rows of one token are then
loaded, and stored, with a stride. All rows' states of a tile are in vector memory while the tile is worked on.

Dimension key as in the package, and
    B  tokens of a block     L  128 lanes     K  lanes full of channels in a tile, up to 8     W  K L
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.platform import current_device_kind
from pallas_kernels.ragged_paged_attention.tpu_plan import LANES, round_up, vmem_limit

TOKENS = 128  # of a block
UNROLLED = 4  # tokens in one turn of the loop
DTYPES = ("bfloat16", "float32")
LOG2_E = math.log2(math.e)


def refusal(x_TC, dt_TC, state_SNC, device_kind) -> str | None:
    """Why the kernel cannot run these shapes and dtypes, with the nearest that it can; None when it can."""
    S, N, C = state_SNC.shape
    if C % LANES:
        return f"{C} channels are not whole lanes of {LANES}; pad them to {round_up(C, LANES)} or use blocks"
    if {jnp.dtype(x.dtype).name for x in (x_TC, dt_TC)} - set(DTYPES):
        return f"channels of {x_TC.dtype} and {dt_TC.dtype} are not among {', '.join(DTYPES)}; cast them"
    if N > 32:
        return f"states of {N} numbers do not fit the registers; at most 32, or use blocks"
    needed, limit = vmem_bytes(x_TC, dt_TC, state_SNC), vmem_limit(device_kind)
    if needed > limit:
        return f"states of {S} rows take {needed:,} bytes of {limit:,} in vector memory; use fewer rows or blocks"
    return None


def tile(num_channels) -> int:
    """K: as many as divide."""
    return max(k for k in range(1, 9) if num_channels // LANES % k == 0)


def vmem_bytes(x_TC, dt_TC, state_SNC) -> int:
    """Vector memory that the kernel asks for; blocks are there twice, one of them on its way."""
    S, N, C = state_SNC.shape
    W, B = tile(C) * LANES, TOKENS
    states = 2 * 2 * S * round_up(N, 8) * W * 4
    blocks = 2 * B * W * (2 * x_TC.dtype.itemsize + dt_TC.dtype.itemsize)
    return states + blocks + 3 * B * W * 4 + 4 * N * W * 4


def scan(x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_q_lens_S1, num_rows, *, tokens=TOKENS, interpret=False):
    """The door's arrays, and tokens of a block and Pallas's own `interpret`.

    Raises:
        ValueError: the shapes or dtypes are not among those of `refusal`, which words the message.
    """
    if reason := refusal(x_TC, dt_TC, state_SNC, current_device_kind()):
        raise ValueError(reason)
    (T, C), (S, N, _) = x_TC.shape, state_SNC.shape
    K, B = tile(C), min(tokens, round_up(T, 16))
    W, num_blocks = K * LANES, -(-T // B)

    def scalars(x_TN):
        x_TN = jnp.pad(x_TN.astype(jnp.float32), ((0, num_blocks * B - T), (0, 0)))
        return x_TN.reshape(num_blocks, 1, B * N)

    # By log2(e), as the chip has a power of two and no other.
    a_INKL = (a_NC.astype(jnp.float32) * LOG2_E).reshape(N, C // W, K, LANES).swapaxes(0, 1)
    skip_IKL = skip_C.astype(jnp.float32).reshape(C // W, K, LANES)
    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    channels = pl.BlockSpec((B, W), lambda c, t: (t, c))
    block_scalars = pl.BlockSpec((1, 1, B * N), lambda c, t: (t, 0, 0), memory_space=pltpu.SMEM)
    states = pl.BlockSpec((S, N, W), lambda c, t: (0, 0, c))
    return pl.pallas_call(
        functools.partial(_block, num_numbers=N),
        grid=(C // W, num_blocks),
        in_specs=[
            in_smem,
            in_smem,
            channels,
            channels,
            pl.BlockSpec((1, N, K, LANES), lambda c, t: (c, 0, 0, 0)),
            block_scalars,
            block_scalars,
            pl.BlockSpec((1, K, LANES), lambda c, t: (c, 0, 0)),
            states,
        ],
        out_specs=[channels, states],
        out_shape=[jax.ShapeDtypeStruct(x_TC.shape, x_TC.dtype), jax.ShapeDtypeStruct(state_SNC.shape, jnp.float32)],
        scratch_shapes=[*[pltpu.VMEM((K * B, LANES), jnp.float32)] * 3, pltpu.VMEM((K * N, LANES), jnp.float32)]
        + [pltpu.SMEM((1,), jnp.int32)],
        input_output_aliases={8: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(
                vmem_limit(current_device_kind()), max(16 * 2**20, 2 * vmem_bytes(x_TC, dt_TC, state_SNC))
            ),
        ),
        interpret=interpret,
        name="selective_scan",
    )(
        cu_q_lens_S1.astype(jnp.int32),
        jnp.asarray(num_rows, jnp.int32).reshape(1),
        x_TC,
        dt_TC,
        a_INKL,
        scalars(b_TN),
        scalars(c_TN),
        skip_IKL,
        state_SNC,
    )


def _block(
    cu, num_rows, x, dt, a, b, c, skip, state_in, y, state, x_rows, dt_rows, y_rows, numbers, row, *, num_numbers
):
    """A block of tokens of a tile of channels: the parts of rows in it, one after another."""
    B = x.shape[0]
    first = pl.program_id(1) * B

    @pl.when(pl.program_id(1) == 0)
    def _start():
        row[0] = 0

        @pl.loop(0, state.shape[0])
        def _copy(s):
            state[s] = state_in[s]

    lay_out(x, x_rows)
    lay_out(dt, dt_rows)

    @pl.when(has_padding(first + B, cu[num_rows[0]]))
    def _padding():
        y_rows[...] = jnp.zeros_like(y_rows)

    def begins_here(s):
        return (s < num_rows[0]) & (cu[s] < first + B)

    def part(s_and_more):
        s, _ = s_and_more
        begin, end = jnp.maximum(cu[s] - first, 0), jnp.minimum(cu[s + 1] - first, B)

        @pl.when(begin < end)
        def _run():
            step = functools.partial(token, x_rows, dt_rows, a, b, c, skip, y_rows, num_numbers)
            turns = (end - begin) // UNROLLED

            def turn(i, state_N):
                for j in range(UNROLLED):
                    state_N = step(begin + i * UNROLLED + j, state_N)
                return state_N

            after = lax.fori_loop(0, turns, turn, load_state(state, s, numbers))
            after = lax.fori_loop(begin + turns * UNROLLED, end, step, after)
            store_state(after, state, s, numbers)

        is_over = cu[s + 1] <= first + B
        s += is_over
        return s, is_over & begins_here(s)

    row[0], _ = lax.while_loop(lambda s_and_more: s_and_more[1], part, (row[0], begins_here(row[0])))
    put_back(y_rows, y)


def token(x_rows, dt_rows, a, b, c, skip, y_rows, num_numbers, t, state_N):
    """One token: a state, as a register a number, after it; the answer goes to `y_rows`."""
    K = a.shape[2]
    here = pl.ds(t, K, stride=x_rows.shape[0] // K)
    x_KL, dt_KL = x_rows[here], dt_rows[here]
    y_KL, inflow_KL, after = skip[0] * x_KL, dt_KL * x_KL, []
    for n in range(num_numbers):
        after_KL = decay(dt_KL, a[0, n]) * state_N[n] + b[0, 0, t * num_numbers + n] * inflow_KL
        y_KL += c[0, 0, t * num_numbers + n] * after_KL
        after.append(after_KL)
    y_rows[here] = y_KL
    return tuple(after)


def has_padding(end, num_tokens):
    """Whether a block that ends there has tokens of no row."""
    return end > num_tokens


def decay(dt_KL, a_KL):
    return jnp.exp2(dt_KL * a_KL)


def lay_out(block, rows):
    """A block [B, W] by 128 channels, float32[K B, L]."""
    B = block.shape[0]
    for k in range(block.shape[1] // LANES):
        rows[pl.ds(k * B, B)] = block[:, k * LANES : (k + 1) * LANES].astype(jnp.float32)


def put_back(rows, block):
    B = block.shape[0]
    for k in range(block.shape[1] // LANES):
        block[:, k * LANES : (k + 1) * LANES] = rows[pl.ds(k * B, B)].astype(block.dtype)


def load_state(state, s, numbers):
    """A row's state as a register a number."""
    _, N, W = state.shape
    for k in range(W // LANES):
        numbers[pl.ds(k * N, N)] = state[s, :, k * LANES : (k + 1) * LANES]
    return tuple(numbers[pl.ds(n, W // LANES, stride=N)] for n in range(N))


def store_state(state_N, state, s, numbers):
    _, N, W = state.shape
    for n in range(N):
        numbers[pl.ds(n, W // LANES, stride=N)] = state_N[n]
    for k in range(W // LANES):
        state[s, :, k * LANES : (k + 1) * LANES] = numbers[pl.ds(k * N, N)]
