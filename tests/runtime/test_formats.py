"""Weights lie as the compiler of a decode step wants them, at the first start and at every other."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import turned_layouts
from jax.experimental.layout import Format, Layout

from runtime import executables, formats, machine, weights
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.executables import Program
from runtime.params import SamplingParams
from runtime.request import Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SIZES = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "block_size": 4, "num_gpu_blocks_override": 64}
SIZES |= {"max_model_len": 96, "dtype": "float32", "speculative_config": {"num_speculative_tokens": 0}}


def tokens(engine):
    engine.add(engine.prepare("0", Prompt(list(range(5, 40))), GREEDY))
    found = []
    while engine.has_work:
        found += [token for gain in engine.step() for token in gain.token_ids]
    assert len(found) == 12 and engine.num_recompiles == 0
    return found


@pytest.mark.parametrize("stacked", [False, True])
def test_weights_lie_as_the_decode_step_wants_them_and_tokens_are_the_same(stacked, tmp_path, monkeypatch):
    folder = str(tiny.make_checkpoint("llama_biased", tmp_path / "model"))
    usual = Engine.load(EngineConfig(model=folder, cache_dir="", stacked=stacked, **SIZES))
    assert not turned_layouts.are_turned(usual.loaded.weights)
    placed, place = [], weights.on_devices

    def watched(*args):
        placed.append(place(*args))
        return dict(placed[-1])

    monkeypatch.setattr(weights, "on_devices", watched)
    turned_layouts.ask(monkeypatch.setattr)
    wanted = tokens(usual)
    for is_known in (False, True):  # the second start finds the steps, and reads the weights straight to their layouts
        engine = Engine.load(EngineConfig(model=folder, cache_dir=str(tmp_path / "cache"), stacked=stacked, **SIZES))
        assert ("restore steps" in engine.loaded.seconds) == is_known
        assert turned_layouts.are_turned(engine.loaded.weights)
        deleted = [array.is_deleted() for array in placed.pop().values()]
        assert not any(deleted) if is_known else any(deleted)
        assert tokens(engine) == wanted


HERE = machine.here()
ONE = jax.sharding.SingleDeviceSharding(HERE.devices[0])


def program(order, chooses, times=1):
    """A step that wants its one weight in this order of axes."""
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=ONE)
    step = lambda weights, x: weights["kernel"] @ x * times
    left_open = jax.jit(step, in_shardings=({"kernel": Format(Layout(order), ONE)}, None))
    args = {"kernel": shape}, jax.ShapeDtypeStruct((16,), jnp.float32)
    return Program(jax.jit(step), args, left_open, chooses)


def build(programs, folder=None, **options):
    return executables.build(programs, {"model": "m"}, HERE, HERE.devices[:1], folder, **options)


def test_programs_that_want_another_layout_follow(tmp_path):
    programs = {f"{n}": program((0, 1), False, n) for n in range(9)} | {"decode": program((1, 0), True)}
    kernel = np.arange(128, dtype=np.float32).reshape(8, 16)
    for num_loaded in (0, 10):
        choice = formats.Choice()
        built = build(programs, tmp_path, choice=choice)
        assert built.num_loaded == num_loaded
        assert choice.result()["kernel"].major_to_minor == (1, 0)
        weights = formats.laid_out({"kernel": jnp.array(kernel)}, choice.result())
        for name, run in built.table.items():
            assert formats.read_back(run) == choice.result()
            times = 1 if name == "decode" else int(name)
            np.testing.assert_allclose(run(weights, np.ones(16, np.float32)), kernel.sum(1) * times, rtol=1e-6)


def test_where_nothing_is_left_open_the_layouts_are_the_usual_ones():
    choice, shape = formats.Choice(), jax.ShapeDtypeStruct((4,), jnp.float32)
    build({"a": Program(jax.jit(lambda x: x + 1), (shape,))}, choice=choice)
    assert choice.result() == {}
    weights = {"kernel": jnp.ones((2, 3))}
    assert formats.laid_out(weights, {})["kernel"] is weights["kernel"]


def test_an_error_of_the_program_that_chooses_is_raised_and_none_waits():
    def fails(*_):
        raise ZeroDivisionError

    decode = Program(jax.jit(fails), program((0, 1), True).args, jax.jit(fails), True)
    programs = {f"{n}": program((0, 1), False) for n in range(3)} | {"decode": decode}
    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        pool.submit(build, programs).result(60)
