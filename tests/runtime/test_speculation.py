"""Drafted tokens change nothing but the time: the tokens are those of single steps, on a tiny float32 model."""

import dataclasses
import random
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from runtime.config import EngineConfig
from runtime.drafting import propose
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.grammar import Constraint
from runtime.params import SamplingParams
from runtime.request import Prompt
from runtime.speculation import Speculation

pytestmark = pytest.mark.usefixtures("fully_compiled")

VOCAB = tiny.VOCAB_SIZE
DRAFTS, STEPS, MAX_ROWS = 3, 4, 2
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, top_p=0.9, top_k=40, max_tokens=40, ignore_eos=True)
# Of three tokens some draft is right by chance, however they are drawn.
FEW = SamplingParams(temperature=1.5, seed=3, allowed_token_ids=[20, 21, 22], max_tokens=40, ignore_eos=True)
PENALISED = dataclasses.replace(FEW, repetition_penalty=1.3, frequency_penalty=0.4)
WORDED = dataclasses.replace(FEW, bad_words=["a"])
KINDS = {"greedy": GREEDY, "seeded": SEEDED, "few": FEW, "penalised": PENALISED, "bad words": WORDED}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    wish = {"method": "ngram", "num_speculative_tokens": DRAFTS, "disable_by_batch_size": MAX_ROWS}
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4, "num_gpu_blocks_override": 512}
    options = {"cache_dir": "", "dtype": "float32", "max_decode_steps": STEPS, "speculative_config": wish}
    return Engine.load(EngineConfig(model=str(folder), **sizes, **options))


@pytest.fixture
def engine(loaded, monkeypatch):
    loaded.reset_prefix_cache()
    accept, surplus = loaded.scheduler.accept, []

    def noting(plan, token_ids, counts=None):
        surplus.extend([] if counts is None else np.maximum(counts - plan.advance_S, 0))
        return accept(plan, token_ids, counts)

    monkeypatch.setattr(loaded.scheduler, "accept", noting)
    yield loaded
    assert not any(surplus), "a row gained more than it has pages for"
    for key in list(loaded._choices):
        loaded.abort(key)
    while loaded.has_work:
        loaded.step()
    loaded.scheduler.audit()
    assert loaded.scheduler.pool.num_used == 0
    assert loaded.num_recompiles == 0


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(8, VOCAB - 8, length).tolist()


def run(engine, requests, drafts=DRAFTS, max_steps=1):
    """{request: (token ids, finish reason, stop reason)} of (prompt ids, params) pairs, and how many dispatches."""
    engine.scheduler.num_drafts, engine.scheduler.max_steps = drafts, max_steps
    for i, (ids, params) in enumerate(requests):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    try:
        return collect(engine)
    finally:
        engine.scheduler.num_drafts, engine.scheduler.max_steps = DRAFTS, STEPS


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


def drafted(engine):
    """(times, tokens, right ones) so far."""
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return np.array([engine.metrics.counters.get(f"vllm:spec_decode_{name}", 0) for name in names])


def both(engine, requests):
    """What drafting gives, in single steps and in windows, after steps without it gave the same."""
    plain, _ = run(engine, requests, drafts=0)
    for max_steps in (1, STEPS):
        engine.reset_prefix_cache()
        found, _ = run(engine, requests, max_steps=max_steps)
        assert found == plain, max_steps
    return plain


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_a_row_gets_the_tokens_of_single_steps(engine, params):
    assert len(both(engine, [(prompt(9), params)])["0"][0]) == 40


@pytest.mark.parametrize("params", [GREEDY, FEW], ids=["greedy", "few"])
def test_right_drafts_save_steps(engine, params):
    requests = [(prompt(6) * 4, params)]
    before = drafted(engine)
    found, count = run(engine, requests)
    times, tokens, right = drafted(engine) - before
    assert 0 < right <= tokens <= DRAFTS * times
    assert times < count < 42 - right / 2
    positions = [engine.metrics.counters["vllm:spec_decode_num_accepted_tokens_per_pos", i] for i in range(DRAFTS)]
    assert sum(positions) == drafted(engine)[2] and positions == sorted(positions, reverse=True)


@pytest.mark.parametrize("params", [PENALISED, WORDED], ids=["penalised", "bad words"])
def test_rows_that_look_at_their_history_draft_nothing(engine, params):
    before = drafted(engine)
    run(engine, [(prompt(6) * 4, params)])
    assert (drafted(engine) == before).all()


def test_two_rows_of_different_kinds_share_a_step(engine):
    for pair in ([FEW, PENALISED], [GREEDY, SEEDED], [SEEDED, FEW], [WORDED, GREEDY]):
        engine.reset_prefix_cache()
        both(engine, [(prompt(9 + i, i), params) for i, params in enumerate(pair)])


def test_above_its_limit_of_rows_nothing_is_drafted(engine):
    """Four rows end one after another; drafting begins when two are left."""
    before, seen = drafted(engine), []
    requests = [(prompt(5 + i, i), dataclasses.replace(FEW, max_tokens=12 * (1 + i))) for i in range(4)]
    for i, (ids, params) in enumerate(requests):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    plan = engine.scheduler.plan

    def noting():
        made = plan()
        seen.append((len(made.sequences), made.num_drafts))
        return made

    engine.scheduler.plan = noting
    try:
        tokens, _ = collect(engine)
    finally:
        del engine.scheduler.plan
    assert {rows for rows, drafts in seen if drafts} == {1, 2} and (4, 0) in seen
    assert (drafted(engine) > before).all()
    engine.reset_prefix_cache()
    assert both(engine, requests) == tokens


@pytest.mark.parametrize("length", [1, 2, 3, 5, 12, 13, 14])
def test_max_tokens_is_kept_whatever_is_drafted(engine, length):
    params = dataclasses.replace(FEW, allowed_token_ids=[20], max_tokens=length)
    assert both(engine, [(prompt(9), params)])["0"] == ([20] * length, "length", None)


@pytest.mark.parametrize("length", [10, 11, 15, 18, 19, 23])
def test_no_row_gains_more_than_was_planned(engine, length):
    """Plans are made from upper bounds: near its end a row may be given less than it still lacks."""
    both(engine, [(prompt(9), dataclasses.replace(FEW, max_tokens=length))])


@pytest.mark.parametrize("place", range(0, 12))
def test_right_drafts_past_a_stop_token_do_not_count(engine, place):
    """The text goes round in a circle, which the prompt holds already: what follows the stop is drafted with it."""
    start = prompt(6) * 4
    start += run(engine, [(start, GREEDY)])[0]["0"][0]
    (ids, *_), *_ = run(engine, [(start, GREEDY)])[0].values()
    before = drafted(engine)
    found = both(engine, [(start, dataclasses.replace(GREEDY, stop_token_ids=[ids[place]]))])
    assert found["0"] == (ids[: ids.index(ids[place]) + 1], "stop", ids[place])
    assert drafted(engine)[2] > before[2] or ids.index(ids[place]) < 2


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_a_stop_token_among_the_drafts_ends_its_row(engine, place):
    few = dataclasses.replace(FEW, allowed_token_ids=[20, 21, 22, 23, 24, 25], temperature=0.7)
    (ids, *_), *_ = run(engine, [(prompt(9), few)], drafts=0)[0].values()
    engine.reset_prefix_cache()
    stopping = dataclasses.replace(few, stop_token_ids=[ids[place]], min_tokens=place // 2)
    found = both(engine, [(prompt(9), stopping), (prompt(12, 1), FEW)])
    assert found["0"][1:] in [("stop", ids[place]), ("length", None)]


def test_a_preempted_request_goes_on_with_the_same_tokens(engine):
    requests = [(prompt(20, seed), dataclasses.replace(FEW, seed=seed)) for seed in range(2)]
    roomy = both(engine, requests)
    engine.reset_prefix_cache()
    pool, before = engine.scheduler.pool, engine.scheduler.num_preemptions
    hidden = pool.take(pool.num_available - 24)
    tight, _ = run(engine, requests)
    pool.release(hidden)
    assert engine.scheduler.num_preemptions > before
    assert tight == roomy


@pytest.mark.parametrize("step", range(0, 6))
def test_an_abort_gives_every_page_back(engine, step):
    quiet = run(engine, [(prompt(9), FEW)], drafts=0)[0]["0"]
    engine.reset_prefix_cache()
    engine.add(engine.prepare("0", Prompt(prompt(9)), FEW))
    engine.add(engine.prepare("1", Prompt(prompt(12, seed=1)), GREEDY))
    tokens = [i for _ in range(step) for gain in engine.step() if gain.choice.key == "0" for i in gain.token_ids]
    engine.abort("1")
    rest = collect(engine)[0].get("0", [[]])
    assert tokens + rest[0] == quiet[0]


def test_tokens_found_in_the_prefix_cache_are_drafted_from(engine):
    """The text that repeats was computed for somebody else; another's history was in the slot meanwhile."""
    text = prompt(9) * 3
    cold, _ = run(engine, [(text, FEW)], drafts=0)
    engine.reset_prefix_cache()
    run(engine, [(text, GREEDY)])
    run(engine, [(prompt(30, 5), GREEDY)])
    assert run(engine, [(text, FEW)])[0] == cold
    params = dataclasses.replace(FEW, allowed_token_ids=None, logit_bias={text[i]: 60.0 for i in range(9)})
    (choice,) = engine.prepare("0", Prompt(text), params)
    engine.add([choice])
    before = drafted(engine)
    while len(choice.sequence.output_ids) < 3:
        engine.step()
    assert choice.sequence.num_cached_tokens == 24
    assert drafted(engine)[0] > before[0], "the prompt's own end is found in the prompt"


def test_a_row_that_reports_logprobs_stops_the_drafting(engine):
    asking = dataclasses.replace(FEW, logprobs=2, max_tokens=9)
    plain = run(engine, [(prompt(9), FEW), (prompt(12, 1), FEW)], drafts=0)[0]
    engine.reset_prefix_cache()
    for i, (ids, params) in enumerate([(prompt(9), asking), (prompt(12, 1), FEW)]):
        engine.add(engine.prepare(str(i), Prompt(ids), params))
    tokens, logprobs = {"0": [], "1": []}, []
    while engine.has_work:
        for gain in engine.step():
            tokens[gain.choice.key] += gain.token_ids
            logprobs += gain.logprobs or []
    assert tokens == {"0": plain["0"][0][:9], "1": plain["1"][0]}
    assert [entry.token_id for entry in logprobs] == tokens["0"]


def test_a_row_under_a_grammar_shares_steps_with_one_that_is_not(engine):
    compiler = engine.grammar_compiler()
    constraint = compiler.compile_now(Constraint.from_request({"regex": "[ab]{3}(cd){4}e"}))
    compiler.close()
    params = SamplingParams(seed=4, constraint=constraint, max_tokens=26)
    found = both(engine, [(prompt(9), params), (prompt(12, 1), FEW)])
    assert re.fullmatch("[ab]{3}(cd){4}e", engine.tokenizer.decode(found["0"][0], skip_special_tokens=True))


# ---- what is proposed ------------------------------------------------------------------------------------------------


def plainly(tokens, speculation):
    """The same search by hand: longest match first, then the latest; the text repeats past its end."""
    end = len(tokens) - 1
    for n in range(speculation.longest, speculation.shortest - 1, -1):
        for place in range(end - 1, n - 2, -1):
            if end >= n and tokens[place - n + 1 : place + 1] == tokens[end - n + 1 :]:
                longer = tokens[place + 1 :]
                return [longer[j % len(longer)] for j in range(speculation.num_drafts)]
    return None


@pytest.mark.parametrize(("longest", "shortest"), [(3, 2), (1, 1), (4, 1), (3, 3)])
def test_drafts_are_what_followed_the_latest_longest_match(longest, shortest):
    speculation, rng, length = Speculation(4, longest, shortest, 8), random.Random(longest), 24
    texts = [[rng.randrange(3) for _ in range(rng.randrange(1, length + 1))] for _ in range(64)]
    history_XU = np.full((64, length), 1, np.int32)  # what lies past a text must not count
    for row, text in enumerate(texts):
        history_XU[row, : len(text)] = text
    known_S = jnp.array([len(text) for text in texts])
    drafts_DS, found_S = map(np.asarray, propose(jnp.asarray(history_XU), jnp.arange(64), known_S, speculation))
    expected = [plainly(text, speculation) for text in texts]
    assert found_S.tolist() == [drafts is not None for drafts in expected]
    assert [drafts_DS[:, row].tolist() for row in np.flatnonzero(found_S)] == [d for d in expected if d]
    assert 5 < found_S.sum() < 64


def test_a_row_without_tokens_drafts_nothing():
    _, found_S = propose(jnp.zeros((2, 8), jnp.int32), jnp.arange(2), jnp.array([0, 1]), Speculation(2, 2, 1, 8))
    assert not found_S.any()


# ---- what may be asked -----------------------------------------------------------------------------------------------


def test_a_config_is_read_under_the_names_of_its_keys():
    assert Speculation.read(None, 8).num_drafts == 0
    assert Speculation.read({"method": "ngram", "num_speculative_tokens": 4}, 8) == Speculation(4, 3, 2, 8)
    full = {"num_speculative_tokens": 2, "prompt_lookup_max": 5, "prompt_lookup_min": 4, "disable_by_batch_size": 7}
    assert Speculation.read(full, 8) == Speculation(2, 5, 4, 7)
    assert Speculation.read({"num_speculative_tokens": 2, "prompt_lookup_min": 4}, 8) == Speculation(2, 4, 4, 8)
    assert Speculation.read({"num_speculative_tokens": 2, "prompt_lookup_max": 1}, 8) == Speculation(2, 1, 1, 8)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"method": "eagle", "num_speculative_tokens": 4}, "'eagle'.*'ngram'"),
        ({"method": "ngram"}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 4, "draft_model": "x"}, "'draft_model' is not known"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens is -1"),
        ({"num_speculative_tokens": True}, "is True"),
        ({"num_speculative_tokens": "4"}, "is '4'"),
        ({"num_speculative_tokens": 33}, "at most 32"),
        ({"num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "3 is above .* 2"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(config, says):
    with pytest.raises(ConfigError, match=says):
        EngineConfig(model="x", speculative_config=config)


def test_no_tokens_to_draft_is_no_speculation():
    assert Speculation.read({"num_speculative_tokens": 0}, usual_max_rows=4) == Speculation()
