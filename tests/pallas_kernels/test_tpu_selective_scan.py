"""The TPU kernel of the selective scan computes what the recurrence does, in the Pallas TPU interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_attention import FUNCTION
from quick_compile import quick_jit
from tpu_interpreter import INTERPRET

from pallas_kernels import selective_scan as door
from pallas_kernels.selective_scan import reference, tpu

N, C, T, S = 3, 640, 24, 4
U = 2.0**-24
in_both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
compiled = functools.cache(lambda: program())
compiled_reference = quick_jit(reference)


def program():
    return quick_jit(functools.partial(tpu.scan, tokens=16, interpret=INTERPRET))


def batch(lengths, dtype="float32", seed=0):
    """The door's arrays; a padding token's are NaN, and a padding row has a state all the same."""
    rng = np.random.default_rng(seed)
    x_TC, dt_TC, b_TN, c_TN = (rng.normal(size=(T, n)) for n in (C, C, N, N))
    dt_TC = np.log1p(np.exp(dt_TC))
    for array in (x_TC, dt_TC, b_TN, c_TN):
        array[sum(lengths) :] = np.nan
    cu_S1 = np.cumsum([0, *lengths, *[0] * (S - len(lengths))])
    tokens = [jnp.asarray(array, dtype) for array in (x_TC, dt_TC, b_TN, c_TN)]
    x_TC, dt_TC, b_TN, c_TN = tokens
    a_NC, skip_C, state_SNC = -np.exp(rng.normal(size=(N, C))), rng.normal(size=C), rng.normal(size=(S, N, C))
    floats = [x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC]
    floats = [x if hasattr(x, "at") else jnp.asarray(x, jnp.float32) for x in floats]
    return *floats, jnp.asarray(cu_S1, jnp.int32), jnp.int32(len(lengths))


def exact(x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_S1, num_rows):
    """Answers and states in float64, and how far an evaluation in float32 may be from each of them.

    To first order in u = 2**-24. A step's decay exp(z), z = dt a, is off by FUNCTION u and by three roundings of z,
    which move exp(z) by 3 |z| u; what it multiplies is rounded once more, what flows in has two roundings, and their
    sum one. What a state was off by before decays as the state does. An answer adds N products and what is skipped, in
    any order: at most N + 2 roundings each, and what the states are off by. Ten per cent stand for higher orders.
    """
    arrays = [np.asarray(x, np.float64) for x in (x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C)]
    x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C = arrays
    state_SNC = np.array(state_SNC, np.float64)
    off_SNC, y_TC, off_TC = np.zeros_like(state_SNC), np.zeros_like(x_TC), np.zeros_like(x_TC)
    for s in range(int(num_rows)):
        for t in range(cu_S1[s], cu_S1[s + 1]):
            z_NC = dt_TC[t] * a_NC
            kept_NC, inflow_NC = np.exp(z_NC) * state_SNC[s], b_TN[t][:, None] * (dt_TC[t] * x_TC[t])
            state_SNC[s] = kept_NC + inflow_NC
            rounded_NC = abs(kept_NC) * (FUNCTION + 3 * abs(z_NC) + 1) + 2 * abs(inflow_NC) + abs(state_SNC[s])
            off_SNC[s] = np.exp(z_NC) * off_SNC[s] + U * rounded_NC
            y_TC[t] = c_TN[t] @ state_SNC[s] + skip_C * x_TC[t]
            size_C = abs(c_TN[t]) @ abs(state_SNC[s]) + abs(skip_C * x_TC[t])
            off_TC[t] = abs(c_TN[t]) @ off_SNC[s] + U * (N + 2) * size_C
    return y_TC, state_SNC, 1.1 * off_TC, 1.1 * off_SNC


def assert_same(got, args):
    """Each number is within its bound, and in float32 no farther from it than twice the reference's farthest."""
    y_TC, state_SNC, off_TC, off_SNC = exact(*args)
    found, usual = ([np.asarray(x, np.float64) for x in pair] for pair in (got, compiled_reference(*args)))
    num_tokens = int(args[-2][args[-1]])
    assert not found[0][num_tokens:].any()
    if args[0].dtype == jnp.bfloat16:
        off_TC = off_TC + (abs(y_TC) + off_TC) * float(jnp.finfo(jnp.bfloat16).eps) / 2
    for number, wanted, off, by_reference in zip(found, (y_TC, state_SNC), (off_TC, off_SNC), usual, strict=True):
        error = abs(number - wanted)
        assert (error <= off).all(), f"off by {(error / np.maximum(off, 1e-300)).max():.1f} times the bound"
        assert error.max() <= 2 * abs(by_reference - wanted).max()
    padding = np.diff(args[-2]) == 0
    np.testing.assert_array_equal(found[1][padding], np.asarray(args[6])[padding])


PLANTED = [3, 17, 1]
LENGTHS = {
    "nothing": [],
    "one token": [1],
    "rows that end inside, with a block, and behind it": [9, 7, 5],
    "over two blocks": [24],
    "with one that goes over into the next block": PLANTED,
    "decodes and empty rows": [1, 0, 1, 1],
    "an odd one behind an empty one": [0, 19, 0, 3],
}


@in_both_dtypes
def test_matches_the_recurrence(dtype, subtests):
    for seed, (name, lengths) in enumerate(LENGTHS.items()):
        with subtests.test(name):
            args = batch(lengths, dtype, seed)
            assert_same(compiled()(*args), args)


def test_rows_past_the_count_are_left_alone():
    *args, _ = batch([9, 7, 5])
    y_TC, state_SNC = compiled()(*args, jnp.int32(2))
    assert not np.asarray(y_TC[16:]).any()
    np.testing.assert_array_equal(state_SNC[2:], args[6][2:])


# ---- planted errors ----

decay, load_state, store_state, token = tpu.decay, tpu.load_state, tpu.store_state, tpu.token
# error: (where it is planted, what is planted)
ERRORS = {
    "a state does not decay": ("decay", lambda dt, a: 1 + 0 * decay(dt, a)),
    "a row goes on from the state of the row before": (
        "load_state",
        lambda state, s, numbers: load_state(state, jnp.maximum(s - 1, 0), numbers),
    ),
    "a state goes to the row after": (
        "store_state",
        lambda after, state, s, numbers: store_state(after, state, (s + 1) % S, numbers),
    ),
    "a state is lost between two blocks": (
        "store_state",
        lambda after, state, s, numbers: store_state(
            [x * (s < 1).astype(jnp.float32) for x in after], state, s, numbers
        ),
    ),
    "numbers of a state change places": (
        "store_state",
        lambda after, *rest: store_state([after[1], after[0], *after[2:]], *rest),
    ),
    "a token takes the scalars of the one before": (
        "token",
        lambda x, dt, a, b, c, skip, y, n, t, state: token(x, dt, a, Before(b, n), c, skip, y, n, t, state),
    ),
    "what is skipped is left out": ("token", lambda *args: token(*args[:5], 0 * args[5][...], *args[6:])),
    "padding is not blanked": ("has_padding", lambda end, num_tokens: end < 0),
}


class Before:
    """Scalars of a block, read a token too early."""

    def __init__(self, scalars, num_numbers):
        self.scalars, self.num_numbers = scalars, num_numbers

    def __getitem__(self, index):
        return self.scalars[index[0], index[1], jnp.maximum(index[2] - self.num_numbers, 0)]


AMONG_THE_FAST = {"a state is lost between two blocks"}


@pytest.mark.parametrize(
    "name, fault",
    [
        pytest.param(*case, id=error, marks=[] if error in AMONG_THE_FAST else pytest.mark.slow)
        for error, case in ERRORS.items()
    ],
)
def test_planted_error_is_noticed(monkeypatch, name, fault):
    args = batch(PLANTED)
    monkeypatch.setattr(tpu, name, fault)
    with pytest.raises(AssertionError):
        assert_same(program()(*args), args)


# ---- refusals ----


def shapes(C=5120, N=16, S=64, dtype="bfloat16"):
    array = jax.ShapeDtypeStruct
    return array((512, C), jnp.dtype(dtype)), array((512, C), jnp.dtype(dtype)), array((S, N, C), jnp.float32)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(C=5000), "pad them to 5120"),
        (dict(N=64), "at most 32"),
        (dict(S=1024), "use fewer rows or blocks"),
        (dict(dtype="float16"), "cast them"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_blocks(monkeypatch, change, says):
    assert says in tpu.refusal(*shapes(**change), "TPU v5 lite")
    monkeypatch.setattr(door, "current_platform", lambda: "tpu")
    monkeypatch.setattr(door, "current_device_kind", lambda: "TPU v5 lite")
    assert door._fastest(None, *shapes(**change)) == "blocks" and door._fastest(None, *shapes()) == "tpu"
    assert door._fastest(1, *shapes()) == "update"


@pytest.mark.parametrize("channels, k", [(128, 1), (640, 5), (1536, 6), (5120, 8), (8192, 8)])
def test_tiles_divide_the_channels(channels, k):
    assert tpu.tile(channels) == k
