"""The selective scan runs each row's own recurrence, however the rows' tokens are cut into steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selective_scan as module
from pallas_kernels.selective_scan import selective_scan

C, N = 5, 3
LENGTHS = [[1], [4], [1, 1, 1], [3, 0, 7], [0, 0], [6, 1], [8, 4], [1, 11]]


scan = jax.jit(selective_scan, static_argnames=("implementation", "max_q_len"))


def batch(lengths, T=12, S=4, seed=0):
    rng = np.random.default_rng(seed)
    x_TC, dt_TC, b_TN, c_TN = (rng.normal(size=(T, n)) for n in (C, C, N, N))
    dt_TC, a_NC, skip_C = np.log1p(np.exp(dt_TC)), -np.exp(rng.normal(size=(N, C))), rng.normal(size=C)
    state_SNC = rng.normal(size=(S, N, C))
    cu_S1 = np.concatenate([[0], np.cumsum(lengths + [0] * (S - len(lengths)))])
    return [x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_S1, np.array(len(lengths))]


def arrays(args):
    *floats, cu_S1, num_rows = args
    return [*(jnp.asarray(x, jnp.float32) for x in floats), jnp.asarray(cu_S1, jnp.int32), jnp.int32(num_rows)]


def looped(x_TC, dt_TC, a_NC, b_TN, c_TN, skip_C, state_SNC, cu_S1, num_rows):
    y_TC, state_SNC = np.zeros_like(x_TC), state_SNC.copy()
    for s in range(num_rows):
        for t in range(cu_S1[s], cu_S1[s + 1]):
            for c in range(C):
                for n in range(N):
                    decay = np.exp(dt_TC[t, c] * a_NC[n, c])
                    state_SNC[s, n, c] = decay * state_SNC[s, n, c] + dt_TC[t, c] * b_TN[t, n] * x_TC[t, c]
                y_TC[t, c] = state_SNC[s, :, c] @ c_TN[t] + skip_C[c] * x_TC[t, c]
    return y_TC, state_SNC


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "blocks"])
def test_matches_loops(lengths, implementation):
    args = batch(lengths)
    assert_right(*scan(*arrays(args), implementation=implementation), args)


def assert_right(y_TC, state_SNC, args):
    expected_y, expected_state = looped(*args)
    np.testing.assert_allclose(y_TC, expected_y, atol=1e-5)
    np.testing.assert_allclose(state_SNC, expected_state, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocks"])
def test_a_prompt_in_two_steps_is_the_prompt_at_once(implementation):
    x, dt, a, b, c, skip, state, _, _ = arrays(batch([9], T=9, S=1))
    run = lambda span, state: scan(
        x[span],
        dt[span],
        a,
        b[span],
        c[span],
        skip,
        state,
        jnp.array([0, len(x[span])]),
        1,
        implementation=implementation,
    )
    whole, end = run(slice(0, 9), state)
    first, middle = run(slice(0, 4), state)
    second, cut_end = run(slice(4, 9), middle)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-5)
    np.testing.assert_allclose(cut_end, end, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [1, 0, 1], [0, 0], [1]], ids=str)
def test_one_token_a_row_is_one_update(lengths):
    args = batch(lengths)
    assert_right(*scan(*arrays(args), max_q_len=1), args)


def test_refusals_say_what_to_do():
    args = arrays(batch([2]))
    with pytest.raises(ValueError, match=r"needed are \[T, 5\]"):
        selective_scan(args[0][:, :4], *args[1:])
    with pytest.raises(ValueError, match="choose one of"):
        selective_scan(*args, implementation="fast")
    with pytest.raises(ValueError, match="one token a row, and max_q_len is None; choose blocks"):
        selective_scan(*args, implementation="update")


BLOCKED, ROWS, FLOWS = module._blocked, module._rows, module._decay_and_inflow


def with_first_tokens(change):
    """What says which tokens go on from their rows' old states, changed."""
    return lambda x, fill=0: change(BLOCKED(x, fill)) if x.dtype == bool else BLOCKED(x, fill)


def with_ends(change):
    """What says where states of rows' last tokens go, changed."""
    return lambda x, fill=0: change(BLOCKED(x, fill)) if fill else BLOCKED(x, fill)


def all_live(*args):
    row_T, live_T = ROWS(*args)
    return row_T, jnp.ones_like(live_T)


ERRORS = {
    "a row goes on from the state of the row before": (
        "blocks",
        "_blocked",
        with_first_tokens(lambda is_first: is_first.at[1:].set(False)),
    ),
    "a state is lost between two blocks": (
        "blocks",
        "_blocked",
        with_first_tokens(lambda is_first: is_first.at[:, 0].set(True)),
    ),
    "a state goes to the row after": ("blocks", "_blocked", with_ends(lambda end: end + 1)),
    "a state is not kept when its row ends with a block": (
        "blocks",
        "_blocked",
        with_ends(lambda end: end.at[:, -1].set(99)),
    ),
    "padding is answered, blocks": ("blocks", "_rows", all_live),
    "padding is answered, update": ("update", "_rows", all_live),
    "a state does not decay, blocks": (
        "blocks",
        "_decay_and_inflow",
        lambda *args: (1.0 + 0 * FLOWS(*args)[0], FLOWS(*args)[1]),
    ),
    "a state does not decay, update": (
        "update",
        "_decay_and_inflow",
        lambda *args: (1.0 + 0 * FLOWS(*args)[0], FLOWS(*args)[1]),
    ),
}


@pytest.mark.parametrize("implementation, name, fault", ERRORS.values(), ids=ERRORS)
def test_planted_error_is_noticed(monkeypatch, implementation, name, fault):
    args = batch([1, 0, 1] if implementation == "update" else [5, 3, 10], T=20)
    monkeypatch.setattr(module, name, fault)
    answer = selective_scan(
        *arrays(args), implementation=implementation, max_q_len=1 if implementation == "update" else None
    )
    with pytest.raises(AssertionError):
        assert_right(*answer, args)
