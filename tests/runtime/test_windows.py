"""Several steps in one dispatch give the tokens of single steps, on a tiny float32 model."""

import dataclasses
import re

import numpy as np
import pytest
import tiny

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import RequestRefused
from runtime.grammar import Constraint
from runtime.params import SamplingParams
from runtime.request import Prompt
from runtime.step_state import COUNT

pytestmark = pytest.mark.usefixtures("fully_compiled")

VOCAB, EOS = tiny.VOCAB_SIZE, tiny.IM_END
STEPS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=26, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, top_p=0.9, top_k=40, max_tokens=26, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.8,
    seed=5,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.2,
    bad_words=["a"],
    logit_bias={7: 2.0, 9: -100.0},
    max_tokens=26,
    ignore_eos=True,
)
KINDS = {"greedy": GREEDY, "seeded": SEEDED, "penalised": PENALISED}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4, "num_gpu_blocks_override": 512}
    options = {"cache_dir": "", "dtype": "float32", "speculative_config": {"num_speculative_tokens": 0}}
    return Engine.load(EngineConfig(model=str(folder), max_decode_steps=STEPS, **options, **sizes))


@pytest.fixture
def engine(loaded):
    loaded.reset_prefix_cache()
    yield loaded
    for key in list(loaded._choices):
        loaded.abort(key)
    while loaded.has_work:
        loaded.step()
    loaded.scheduler.audit()
    assert loaded.scheduler.pool.num_used == 0
    assert loaded.num_recompiles == 0


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(8, VOCAB - 8, length).tolist()


def run(engine, requests, max_steps=STEPS):
    """{request: (token ids, finish reason, stop reason)} of (prompt ids, params) pairs, and how many dispatches."""
    engine.scheduler.max_steps = max_steps
    for i, (ids, params) in enumerate(requests):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    try:
        return collect(engine)
    finally:
        engine.scheduler.max_steps = STEPS


def collect(engine):
    tokens, ends, count = {}, {}, 0
    while engine.has_work:
        for gain in engine.step():
            if gain.error:
                raise gain.error
            tokens.setdefault(gain.choice.key, []).extend(gain.token_ids)
            if gain.finish_reason:
                ends[gain.choice.key] = gain.finish_reason, gain.stop_reason
        count += 1
        assert count < 500, "the engine does not get on"
    return {key: (ids, *ends[key]) for key, ids in sorted(tokens.items())}, count


def both(engine, requests):
    """What windows give, after single steps gave the same."""
    single, many = run(engine, requests, max_steps=1)
    engine.reset_prefix_cache()
    windows, few = run(engine, requests)
    assert windows == single
    assert few < many
    return windows


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_a_row_gets_the_tokens_of_single_steps(engine, params):
    found = both(engine, [(prompt(9), params)])
    assert len(found["0"][0]) == 26


def test_rows_of_all_kinds_stop_at_their_own_max_tokens(engine):
    """Six requests for four rows: two wait, and are admitted between windows."""
    lengths = {1: GREEDY, 3: SEEDED, 7: PENALISED, 8: GREEDY, 17: SEEDED, 26: PENALISED}
    found = both(engine, [(prompt(5 + n, n), dataclasses.replace(p, max_tokens=n)) for n, p in lengths.items()])
    assert [(len(ids), why) for ids, why, _ in (found[str(i)] for i in range(6))] == [(n, "length") for n in lengths]


def test_a_dispatch_runs_as_many_steps_as_it_was_told(engine):
    """One prompt step, then windows of 8, 8, 8 and 1; the last call only reads."""
    _, count = run(engine, [(prompt(9), GREEDY)])
    assert count == 1 + 4 + 1


@pytest.mark.parametrize("place", range(0, 12))
def test_a_stop_token_ends_its_row_in_mid_window_and_no_other(engine, place):
    (ids, *_), (other, *_) = both(engine, [(prompt(9), SEEDED), (prompt(12, 1), GREEDY)]).values()
    engine.reset_prefix_cache()
    stopping = dataclasses.replace(SEEDED, stop_token_ids=[ids[place], 3])
    found = both(engine, [(prompt(9), stopping), (prompt(12, 1), GREEDY)])
    assert found["0"] == (ids[: ids.index(ids[place]) + 1], "stop", ids[place])
    assert found["1"][0] == other


def test_the_model_s_own_end_stops_a_row(engine):
    params = [SamplingParams(seed=seed, logit_bias={EOS: 3.0}, max_tokens=26) for seed in range(6)]
    found = both(engine, [(prompt(9), p) for p in params])
    for ids, why, _ in found.values():
        assert [i for i in ids if i in (EOS, tiny.EOS)] == (ids[-1:] if why == "stop" else [])
    assert {why for _, why, _ in found.values()} == {"stop", "length"}


@pytest.mark.parametrize("min_tokens", [3, 5, 9, 20])
def test_min_tokens_holds_back_the_end_in_mid_window(engine, min_tokens):
    params = SamplingParams(seed=1, logit_bias={EOS: 100.0, 5: 90.0}, min_tokens=min_tokens, max_tokens=26)
    found = both(engine, [(prompt(9), params)])
    assert found["0"][0] == [5] * min_tokens + [EOS]


def test_a_request_that_ended_in_a_window_runs_no_step_of_the_next(engine, monkeypatch):
    """The next window is dispatched before the host knows; it finds nothing to do on the device."""
    (ids, *_), *_ = run(engine, [(prompt(9), GREEDY)])[0].values()
    counts, read = [], engine._read

    def noting(flight):
        counts.append(np.asarray(flight.out.rows_OS)[COUNT, 0].item())
        return read(flight)

    monkeypatch.setattr(engine, "_read", noting)
    engine.reset_prefix_cache()
    stop = next(i for i in range(2, 9) if ids[i] not in ids[:i])
    run(engine, [(prompt(9), dataclasses.replace(GREEDY, stop_token_ids=[ids[stop]]))])
    assert counts == [1, stop, 0]


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_a_preempted_request_goes_on_with_the_same_tokens(engine, params):
    requests = [(prompt(20, seed), dataclasses.replace(params, seed=seed)) for seed in range(5)]
    roomy = both(engine, requests)
    engine.reset_prefix_cache()
    pool, before = engine.scheduler.pool, engine.scheduler.num_preemptions
    hidden = pool.take(pool.num_available - 28)
    tight, _ = run(engine, requests)
    pool.release(hidden)
    assert engine.scheduler.num_preemptions > before
    assert tight == roomy


@pytest.mark.parametrize("step", range(0, 6))
def test_an_abort_between_windows_gives_every_page_back(engine, step):
    quiet = run(engine, [(prompt(9), SEEDED)])[0]["0"]
    engine.reset_prefix_cache()
    engine.add(engine.prepare("0", Prompt(prompt(9)), SEEDED))
    engine.add(engine.prepare("1", Prompt(prompt(12, seed=1)), GREEDY))
    tokens = [i for _ in range(step) for gain in engine.step() if gain.choice.key == "0" for i in gain.token_ids]
    engine.abort("1")
    rest = collect(engine)[0]
    assert tokens + rest["0"][0] == quiet[0]
    assert engine.scheduler.pool.num_used == 0


def test_pages_written_in_windows_are_found_again(engine):
    first = run(engine, [(prompt(9), GREEDY)])[0]["0"][0]
    longer = prompt(9) + first[:-1] + prompt(3, seed=2)
    engine.reset_prefix_cache()
    cold = run(engine, [(longer, GREEDY)])[0]
    engine.reset_prefix_cache()
    run(engine, [(prompt(9), GREEDY)])
    (choice,) = engine.prepare("0", Prompt(longer), GREEDY)
    engine.add([choice])
    assert collect(engine)[0] == cold
    assert choice.sequence.num_cached_tokens == 32


def test_a_row_that_reports_logprobs_keeps_all_to_single_steps(engine):
    asking = dataclasses.replace(GREEDY, logprobs=2, max_tokens=9)
    plain, _ = run(engine, [(prompt(9), GREEDY), (prompt(12, 1), SEEDED)], max_steps=1)
    engine.reset_prefix_cache()
    for i, (ids, params) in enumerate([(prompt(9), asking), (prompt(12, 1), SEEDED)]):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    tokens, sizes, logprobs = {"0": [], "1": []}, [], []
    while engine.has_work:
        for gain in engine.step():
            tokens[gain.choice.key] += gain.token_ids
            logprobs += gain.logprobs or []
            sizes.append((len(tokens["0"]), len(gain.token_ids)))
    assert tokens["0"] == plain["0"][0][:9] == [entry.token_id for entry in logprobs]
    assert tokens["1"] == plain["1"][0]
    assert all(size == 1 for done, size in sizes if done < 9)
    assert max(size for _, size in sizes) == STEPS


def test_a_row_under_a_grammar_shares_steps_with_one_that_is_not(engine):
    compiler = engine.grammar_compiler()
    constraint = compiler.compile_now(Constraint.from_request({"regex": "[ab]{3}(cd){4}e"}))
    compiler.close()
    params = SamplingParams(seed=4, constraint=constraint, max_tokens=26)
    found = both(engine, [(prompt(9), params), (prompt(12, 1), dataclasses.replace(SEEDED, max_tokens=60))])
    assert re.fullmatch("[ab]{3}(cd){4}e", engine.tokenizer.decode(found["0"][0], skip_special_tokens=True))


def test_a_row_that_turns_faulty_in_mid_window_fails_alone_and_keeps_its_tokens(engine):
    """Only "z" is allowed and four of them are a bad word: the fourth token has nothing to be chosen from."""
    (z,) = engine.tokenizer.encode("z", add_special_tokens=False)
    banned = SamplingParams(temperature=0, allowed_token_ids=[z], bad_words=["zzzz"], max_tokens=26)
    quiet = run(engine, [(prompt(12, 1), SEEDED)])[0]["0"][0]
    engine.reset_prefix_cache()
    for i, (ids, params) in enumerate([(prompt(9), banned), (prompt(12, 1), SEEDED)]):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    tokens, errors = {"0": [], "1": []}, []
    while engine.has_work:
        for gain in engine.step():
            tokens[gain.choice.key] += gain.token_ids
            errors += [(gain.choice.key, gain.error)] if gain.error else []
    assert tokens == {"0": [z] * 3, "1": quiet}
    ((key, error),) = errors
    assert key == "0" and isinstance(error, RequestRefused) and "after 3 tokens there is none left" in str(error)


def test_pages_stay_in_place_through_a_window(engine):
    """No second copy of a layer's pages, inside the loop or beside it."""
    caches = engine._state.caches
    shape = f"[{','.join(map(str, caches[0].shape))}]"
    for bucket, run_step in engine.loaded.steps.items():
        assert run_step.memory_analysis().alias_size_in_bytes >= sum(cache.nbytes for cache in caches), bucket
        made = [line for line in run_step.as_text().splitlines() if shape in line and " copy(" in line]
        assert not made, bucket
