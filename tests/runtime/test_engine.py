"""A request's tokens do not depend on what else runs: the promises of the engine, on a tiny float32 model."""

import dataclasses
import random

import numpy as np
import pytest
import tiny

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import RequestRefused, StepFailed
from runtime.params import SamplingParams
from runtime.request import Prompt
from runtime.seeds import Seeds
from runtime.step_state import FAULTY

pytestmark = pytest.mark.usefixtures("fully_compiled")

VOCAB = tiny.FAMILIES["llama"]["vocab_size"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, top_p=0.9, top_k=40, max_tokens=24, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.8,
    seed=5,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.2,
    bad_words=["a"],
    logit_bias={7: 2.0, 9: -100.0},
    max_tokens=24,
    ignore_eos=True,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """One load for the module; each test takes an engine of its own from it."""
    folder = tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    return Engine.load(config(folder))


def config(folder, **changes):
    sizes = {"dtype": "float32", "max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 4}
    return EngineConfig(**{"model": str(folder), "cache_dir": "", "num_gpu_blocks_override": 512} | sizes | changes)


@pytest.fixture
def engine(loaded):
    """The shared engine, empty: nothing runs and nothing is cached."""
    loaded.reset_prefix_cache()
    yield loaded
    for key in list(loaded._choices):
        loaded.abort(key)
    while loaded.has_work:
        loaded.step()
    assert loaded.scheduler.pool.num_used == 0
    assert loaded.num_recompiles == 0


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(8, VOCAB - 8, length).tolist()


def run(engine, requests, on_step=None):
    """Runs (prompt ids, params) pairs together; token ids of each, by (request, choice)."""
    for i, (ids, params) in enumerate(requests):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    return collect(engine, on_step)


def collect(engine, on_step=None):
    tokens, steps = {}, 0
    while engine.has_work:
        for gain in engine.step():
            if gain.error:
                raise gain.error
            tokens.setdefault((int(gain.choice.key), gain.choice.index), []).extend(gain.token_ids)
        steps += 1
        if on_step:
            on_step(steps)
        assert steps < 5000, "the engine does not get on"
    return tokens


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
@pytest.mark.parametrize("length", [1, 4, 33, 150])
def test_a_request_gets_the_same_tokens_alone_and_in_a_mixed_batch(engine, params, length):
    alone = run(engine, [(prompt(length), params)])[0, 0]
    assert len(alone) == params.max_tokens
    others = [(prompt(n, seed=n), random.Random(n).choice([GREEDY, SEEDED, PENALISED])) for n in range(3, 60, 4)]
    engine.reset_prefix_cache()
    assert run(engine, [(prompt(length), params), *others])[0, 0] == alone


def test_requests_without_a_seed_follow_the_engines(engine, monkeypatch):
    params = dataclasses.replace(SEEDED, seed=None, n=2)
    others = [(prompt(n, seed=n), params) for n in range(3, 30, 4)]

    def drawn(seed, requests):
        monkeypatch.setattr(engine.admission, "_seeds", Seeds(seed))
        tokens = run(engine, requests)
        return [tokens[len(requests) - 1, index] for index in range(2)]

    alone = drawn(3, [(prompt(9), params)])
    assert alone[0] != alone[1] and drawn(3, [*others, (prompt(9), params)]) == alone
    assert drawn(4, [(prompt(9), params)]) != alone
    assert drawn(3, [(prompt(9), params)] * 2) != alone  # the second of two equal requests


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_a_prefix_cache_hit_changes_no_token(engine, params):
    cold = run(engine, [(prompt(90), params)])[0, 0]
    (choice,) = engine.prepare("0", Prompt(prompt(90)), params)
    engine.add([choice])
    assert collect(engine)[0, 0] == cold
    assert choice.sequence.num_cached_tokens == 88


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_a_prompt_in_chunks_gives_the_same_tokens(engine, params):
    """The budget is 64 tokens: 60 fit in one step alone, and are cut up beside others."""
    alone = run(engine, [(prompt(60), params)])[0, 0]
    engine.reset_prefix_cache()
    engine.scheduler.max_num_batched_tokens, before = 23, engine.scheduler.max_num_batched_tokens
    try:
        assert run(engine, [(prompt(60), params)])[0, 0] == alone
    finally:
        engine.scheduler.max_num_batched_tokens = before


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_a_preempted_request_goes_on_with_the_same_tokens(engine, params):
    """Pages are taken away until the newest requests must give theirs back."""
    requests = [(prompt(30, seed), dataclasses.replace(params, seed=seed)) for seed in range(8)]
    roomy = run(engine, requests)
    engine.reset_prefix_cache()
    pool = engine.scheduler.pool
    hidden = pool.take(pool.num_available - 70)
    before = engine.scheduler.num_preemptions
    tight = run(engine, requests)
    pool.release(hidden)
    assert engine.scheduler.num_preemptions > before
    assert tight == roomy


def test_choices_of_a_seeded_request_are_those_of_successive_seeds(engine):
    three = run(engine, [(prompt(20), dataclasses.replace(SEEDED, n=3))])
    for index in range(3):
        one = run(engine, [(prompt(20), dataclasses.replace(SEEDED, seed=11 + index))])
        assert three[0, index] == one[0, 0]


def test_choices_share_the_pages_of_their_prompt(engine):
    choices = engine.prepare("0", Prompt(prompt(41)), dataclasses.replace(SEEDED, n=3))
    engine.add(choices)
    for _ in range(4):
        engine.step()
    first, *others = [engine.scheduler.pages_of(choice.sequence)[:10].tolist() for choice in choices]
    assert all(pages == first for pages in others)
    collect(engine)


@pytest.mark.parametrize("step", range(0, 14))
def test_an_abort_in_any_phase_gives_every_page_back(engine, step):
    """Prompt 150 takes three chunks; the abort lands while waiting, in a chunk, and in decode."""
    quiet = run(engine, [(prompt(20), SEEDED)])[0, 0]
    engine.reset_prefix_cache()
    engine.add(engine.prepare("0", Prompt(prompt(20)), SEEDED))
    engine.add(engine.prepare("1", Prompt(prompt(150, seed=1)), GREEDY))
    tokens = []
    for _ in range(step):
        tokens += [i for gain in engine.step() if gain.choice.key == "0" for i in gain.token_ids]
    engine.abort("1")
    assert tokens + collect(engine).get((0, 0), []) == quiet
    assert engine.scheduler.pool.num_used == 0


def test_random_traffic_never_compiles_and_loses_nothing(engine):
    rng = random.Random(3)
    alive, ended, number = {}, {}, 0
    for _ in range(400):
        if rng.random() < 0.3 and number < 60:
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.5]),
                top_k=rng.choice([0, 1, 20]),
                top_p=rng.choice([1.0, 0.5]),
                min_p=rng.choice([0.0, 0.1]),
                seed=rng.choice([None, 1]),
                logprobs=rng.choice([None, 0, 5]),
                prompt_logprobs=rng.choice([None, 2]),
                min_tokens=rng.choice([0, 4]),
                stop_token_ids=rng.choice([None, [5, 6, 7]]),
                allowed_token_ids=rng.choice([None, list(range(3, 90))]),
                max_tokens=rng.randint(4, 30),
            )
            alive[str(number)] = None
            engine.add(engine.prepare(str(number), Prompt(prompt(rng.randint(1, 140), seed=number % 7)), params))
            number += 1
        if alive and rng.random() < 0.03:
            key = rng.choice(list(alive))
            engine.abort(key)
            ended[key] = alive.pop(key, "abort")
        for gain in engine.step():
            assert gain.error is None
            if gain.finish_reason:
                ended[gain.choice.key] = gain.finish_reason
                alive.pop(gain.choice.key, None)
    while engine.has_work:
        for gain in engine.step():
            if gain.finish_reason:
                ended[gain.choice.key] = gain.finish_reason
    assert number > 40 and len(ended) == number
    assert engine.num_recompiles == 0


def test_logprobs_of_the_prompt_are_those_of_its_tokens_when_generated(engine):
    """Greedy output, sent back as a prompt, has the logprobs it was generated with."""
    with_logprobs = dataclasses.replace(GREEDY, logprobs=3, max_tokens=8)
    engine.add(engine.prepare("0", Prompt(prompt(20)), with_logprobs))
    made = []
    while engine.has_work:
        for gain in engine.step():
            made += gain.logprobs
    ids = [entry.token_id for entry in made]
    again = dataclasses.replace(GREEDY, prompt_logprobs=3, max_tokens=1)
    (choice,) = engine.prepare("1", Prompt(prompt(20) + ids), again)
    engine.add([choice])
    collect(engine)
    assert choice.prompt_logprobs[0] is None and len(choice.prompt_logprobs) == 28
    for entry, original in zip(choice.prompt_logprobs[20:], made, strict=True):
        assert entry.token_id == original.token_id and entry.rank == original.rank == 1
        assert entry.logprob == pytest.approx(original.logprob, abs=1e-4)
        assert [i for i, _, _ in entry.top] == [i for i, _, _ in original.top]


def test_a_row_that_is_not_finite_fails_alone(engine, monkeypatch):
    """The step's report of one row is changed as if its logits had been NaN."""
    quiet = run(engine, [(prompt(9), GREEDY)])[0, 0]
    good, bad = (engine.prepare(str(i), Prompt(prompt(9, seed=i)), GREEDY) for i in range(2))
    engine.add(good)
    engine.add(bad)
    read = engine._read

    def faulty(flight):
        rows_OS = np.array(flight.out.rows_OS)
        for row, sequence in enumerate(flight.plan.sequences):
            rows_OS[FAULTY, row] |= sequence.owner is bad[0]
        return read(dataclasses.replace(flight, out=dataclasses.replace(flight.out, rows_OS=rows_OS)))

    monkeypatch.setattr(engine, "_read", faulty)
    tokens, errors = [], []
    while engine.has_work:
        for gain in engine.step():
            tokens += gain.token_ids
            errors += [gain] if gain.error else []
    assert tokens == quiet
    assert [gain.choice for gain in errors] == bad and isinstance(errors[0].error, StepFailed)


@pytest.mark.parametrize("poison", range(0, 6))
def test_a_request_that_makes_steps_raise_fails_alone(engine, monkeypatch, poison):
    requests = [(prompt(12 + i, seed=i), SEEDED) for i in range(6)]
    quiet = run(engine, requests)
    engine.reset_prefix_cache()
    fill = engine._fill

    def raising(plan):
        if any(sequence.owner.key == str(poison) and len(sequence.output_ids) > 3 for sequence in plan.sequences):
            raise RuntimeError("planted")
        return fill(plan)

    monkeypatch.setattr(engine, "_fill", raising)
    for i, (ids, params) in enumerate(requests):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    tokens, failed = {}, []
    for _ in range(2000):
        if not engine.has_work:
            break
        for gain in engine.step():
            if gain.error:
                failed.append(gain.choice.key)
            tokens.setdefault((int(gain.choice.key), 0), []).extend(gain.token_ids)
    assert failed == [str(poison)]
    assert {key: ids for key, ids in tokens.items() if key[0] != poison} == {
        key: ids for key, ids in quiet.items() if key[0] != poison
    }


@pytest.mark.parametrize(
    ("ids", "params", "says"),
    [
        ([], GREEDY, "cannot be empty"),
        ([3, VOCAB], GREEDY, f"Token id {VOCAB} is out of vocabulary"),
        ([-1], GREEDY, "Token id -1 is out of vocabulary"),
        ([3] * 600, GREEDY, "600"),
        ([3], dataclasses.replace(GREEDY, logprobs=21), "greater than max allowed: 20"),
        ([3], dataclasses.replace(GREEDY, logit_bias={VOCAB: 1.0}), "out-of-vocab"),
        ([3], dataclasses.replace(GREEDY, allowed_token_ids=[VOCAB]), "out-of-vocab"),
        ([3], dataclasses.replace(GREEDY, stop_token_ids=list(range(80))), "stop_token_ids"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_queued(engine, ids, params, says):
    with pytest.raises(RequestRefused, match=says):
        engine.prepare("0", Prompt(ids), params)
    assert not engine.has_work
