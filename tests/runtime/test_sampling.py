"""The sampler inside the step: settings, order, history, seeds, logprobs; against a sampler in plain NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_sampler as ref
from jax.extend.random import threefry_2x32

from runtime.errors import RequestRefused
from runtime.params import SamplingParams
from runtime.sampling import (
    KNOB_FIELDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS_IDS,
    MAX_STOP_IDS,
    Knobs,
    Tables,
    advance,
    empty_tables,
    finished,
    mask_words,
    num_mask_words,
    pack,
    row_settings,
    sampler,
    score_tokens,
    spread,
)
from runtime.sampling import adjust as adjusting
from runtime.sampling.adjust import adjust
from runtime.sampling.noise import random_bits
from runtime.sampling.spread import sample_in_turns

V, S, U = 97, 8, 1300  # a vocabulary that no block divides; a history of more than two chunks, and not whole ones
EOS = [2, 5]


@dataclasses.dataclass
class Row:
    """One request in the middle of its answer."""

    params: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(temperature=0))
    prompt: list = dataclasses.field(default_factory=lambda: [1, 2, 3])
    generated: list = dataclasses.field(default_factory=list)
    bad_words: list = dataclasses.field(default_factory=list)
    mask: set | None = None
    seed: int = 0

    @property
    def settings(self):
        return row_settings(
            self.params,
            vocab_size=V,
            prompt_len=len(self.prompt),
            seed=self.seed,
            eos_ids=EOS,
            bad_word_ids=self.bad_words,
            has_mask=self.mask is not None,
        )

    @property
    def wish(self):
        p = self.params
        return ref.Wish(
            p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
            None if p.allowed_token_ids is None else set(p.allowed_token_ids), self.mask, self.bad_words,
            p.logit_bias or {}, p.stop_token_ids, EOS, p.min_tokens,
        )  # fmt: skip


@functools.cache
def compiled(mode, num_at_once=S, platform="cpu"):
    """The sampler in the form that it has on a platform, which is patched in while this is first called."""

    def call(logits_SV, words_QS, known_S, tables, slots_S, history_XU, mask_SW):
        knobs = Knobs.unpack(words_QS, known_S)
        args = tables, slots_S, history_XU, mask_SW
        sampled = sample_in_turns(logits_SV, knobs, *args, rows=num_at_once, max_logprobs=5, logprobs_mode=mode)
        return sampled, adjust(logits_SV, knobs, *args), finished(sampled.token_S, knobs, tables, slots_S)

    return jax.jit(call)


def run(logits_SV, rows, mode="raw_logprobs", slots=None, num_at_once=S, platform="cpu"):
    """Samples for up to S rows, the rest padding; slots that are not used are full of other people's settings."""
    rng = np.random.default_rng(1)
    slots = rng.permutation(S)[: len(rows)] if slots is None else slots
    history_XU = rng.integers(0, V, (S, U), dtype=np.int32)
    stale = row_settings(
        SamplingParams(allowed_token_ids=[0], logit_bias={0: 50}, stop_token_ids=[7, 8], min_tokens=1),
        vocab_size=V, prompt_len=0, seed=0, eos_ids=EOS, bad_word_ids=[[i] for i in range(V)],
    ).tables  # fmt: skip
    tables = jax.tree.map(lambda row: np.stack([row] * S), stale)
    mask_SW = np.zeros((S, num_mask_words(V)), np.uint32)
    words_QS, known_S = np.zeros((len(KNOB_FIELDS), S), np.int32), np.zeros(S, np.int32)
    for s, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        words_QS[:, s] = row.settings.knobs_Q
        tokens = row.prompt + row.generated
        known_S[s] = len(tokens)
        if row.settings.needs_history:
            history_XU[slot, : len(tokens)] = tokens
        if row.settings.tables is not None:
            for name in (field.name for field in dataclasses.fields(Tables)):
                getattr(tables, name)[slot] = getattr(row.settings.tables, name)
        if row.mask is not None:
            mask_SW[s] = mask_words(row.mask, V)
    padded_SV = np.zeros((S, V), np.float32)
    padded_SV[: len(rows)] = logits_SV
    slots_S = np.zeros(S, np.int32)
    slots_S[: len(rows)] = slots
    out = compiled(mode, num_at_once, platform)(padded_SV, words_QS, known_S, tables, slots_S, history_XU, mask_SW)
    return jax.tree.map(np.asarray, out)


def logits(seed, num_rows=S):
    return (np.random.default_rng(seed).standard_normal((num_rows, V)) * 3).astype(np.float32)


def random_row(rng):
    """Any mix of settings, each present about half the time."""

    def maybe(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    def some_ids(n):
        return [int(i) for i in rng.choice(V, n, replace=False)]

    tokens = [int(i) for i in rng.integers(0, rng.choice([4, V]), rng.integers(1, U))]
    cut = int(rng.integers(1, len(tokens) + 1))
    generated = tokens[cut:]
    words = [[int(i) for i in rng.integers(0, V, rng.integers(1, 5))] for _ in range(3)]
    for n in range(min(len(generated), MAX_BAD_WORD_TOKENS - 1)):
        words.append(generated[len(generated) - n :] + some_ids(1))  # words that really are about to be said
    params = SamplingParams(
        temperature=float(rng.choice([0, 0.6, 1.3])),
        top_k=maybe(int(rng.integers(1, 40)), 0),
        top_p=maybe(float(rng.uniform(0.1, 1)), 1.0),
        min_p=maybe(float(rng.uniform(0, 0.3)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.7, 2)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        allowed_token_ids=maybe(some_ids(60), None),
        logit_bias=maybe({i: float(rng.uniform(-100, 100)) for i in some_ids(20)}, None),
        stop_token_ids=maybe(some_ids(3), None),
        min_tokens=maybe(int(rng.integers(0, 2 * len(generated) + 2)), 0),
        max_tokens=5000,
    )
    seed = int(rng.integers(-(2**63), 2**63))
    return Row(params, tokens[:cut], generated, maybe(words, []), maybe(set(some_ids(80)), None), seed)


def test_random_settings_give_what_a_plain_sampler_gives():
    rng = np.random.default_rng(3)
    compared = 0
    for _ in range(30):
        rows, logits_SV = [random_row(rng) for _ in range(S)], logits(rng)
        sampled, adjusted_SV, _ = run(logits_SV, rows)
        for s, row in enumerate(rows):
            expected_V = ref.adjust(logits_SV[s], row.wish, row.prompt, row.generated)
            np.testing.assert_allclose(adjusted_SV[s], expected_V, rtol=2e-6, atol=2e-4, err_msg=str(row.params))
            assert sampled.is_faulty_S[s] == ~np.isfinite(expected_V).any()
            if sampled.is_faulty_S[s]:
                continue
            if row.params.temperature == 0:
                assert sampled.token_S[s] == adjusted_SV[s].argmax()
                continue
            kept_V, is_blurred = ref.kept(adjusted_SV[s], row.wish)
            bits = int(random_bits(*halves(row.seed), jnp.int32([len(row.generated)]))[0])
            if not is_blurred:
                assert sampled.token_S[s] in ref.drawn(adjusted_SV[s], kept_V, row.params.temperature, bits)
                compared += 1
    assert compared > 100


def halves(seed):
    return jnp.uint32([(seed >> 32) & 0xFFFFFFFF]), jnp.uint32([seed & 0xFFFFFFFF])


def test_the_random_numbers_are_threefry():
    # Known answers of the Random123 distribution for threefry2x32, 20 rounds, and jax's own for the rest.
    assert int(random_bits(jnp.uint32([0]), jnp.uint32([0]), jnp.int32([0]))[0]) == 0x6B200159
    for seed, index in ((0x13198A2E03707344, 0), (2**64 - 1, 77), (1, 2**31 - 1)):
        key, counter = jnp.concatenate(halves(seed)), jnp.uint32([index, 0])
        expected = threefry_2x32(key, counter)[0]
        assert int(random_bits(*halves(seed), jnp.int32([index]))[0]) == int(expected)


def test_a_seed_gives_the_same_tokens_beside_anyone():
    rng = np.random.default_rng(4)
    mine, logits_V = Row(SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.3), seed=-5), logits(1, 1)[0]
    told = []
    for place in (0, 3, 7):
        rows = [random_row(rng) for _ in range(S)]
        rows[place] = mine
        others_SV = logits(rng)
        others_SV[place] = logits_V
        told.append(run(others_SV, rows, slots=rng.permutation(S))[0].token_S[place])
    told.append(run(logits_V[None], [mine])[0].token_S[0])
    assert len(set(told)) == 1


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_rows_sampled_in_turns_get_what_they_get_at_once(platform, mode, monkeypatch):
    """Each platform has the sampler's parts put together in another way; they sample the same."""
    rng = np.random.default_rng(7)
    rows, logits_SV, slots = [random_row(rng) for _ in range(S)], logits(8), rng.permutation(S)
    rows[3].params = dataclasses.replace(rows[3].params, logprobs=5)
    at_once = run(logits_SV, rows, mode, slots=slots)[0]
    for module in (adjusting, sampler, spread):
        monkeypatch.setattr(module, "current_platform", lambda: platform)
    in_turns = run(logits_SV, rows, mode, slots=slots, num_at_once=2, platform=platform)[0]
    for name in (field.name for field in dataclasses.fields(at_once)):
        got, expected = getattr(in_turns, name), getattr(at_once, name)
        # Another program may fuse a product with its sum, which rounds once where another rounds twice.
        rtol = 2.0**-22 if platform != "cpu" and got.dtype == np.float32 else 0
        np.testing.assert_allclose(got, expected, rtol=rtol, err_msg=name)
    assert len(set(at_once.token_S)) > 1 and at_once.rank_S.any()


def test_rows_that_want_their_likeliest_token_are_not_sampled_in_turns():
    logits_SV = logits(9)
    logits_SV[1, 5], logits_SV[2, 6] = np.nan, np.inf
    rows = [Row() for _ in range(S)]
    at_once, in_turns = (run(logits_SV, rows, num_at_once=num)[0] for num in (S, 2))
    is_faulty_S = np.array([False, True, True] + [False] * 5)
    for sampled in (at_once, in_turns):
        assert np.array_equal(sampled.is_faulty_S, is_faulty_S)
        assert np.array_equal(sampled.token_S[~is_faulty_S], logits_SV.argmax(-1)[~is_faulty_S])
        assert not sampled.top_logprobs_SJ.any()


def test_seeds_and_positions_differ():
    rows = [
        Row(SamplingParams(temperature=5.0, max_tokens=99), seed=seed) for seed in (0, 1, 2**32, 2**63 - 1, -(2**63))
    ]
    rows += [Row(SamplingParams(temperature=5.0), generated=[1] * n) for n in (1, 2, 3)]
    tokens = run(np.zeros((S, V), np.float32), rows)[0].token_S
    assert len(set(tokens.tolist())) > 5


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_ends_are_held_back_until_min_tokens(ignore_eos):
    params = SamplingParams(temperature=0, stop_token_ids=[11], min_tokens=3, max_tokens=9, ignore_eos=ignore_eos)
    logits_SV = np.zeros((S, V), np.float32)
    logits_SV[:, [2, 5, 11]] = 9, 8, 7
    logits_SV[:, 50] = 6
    rows = [Row(params, generated=[1] * n) for n in (0, 2, 3, 4)]
    assert run(logits_SV[:4], rows)[0].token_S[:4].tolist() == [50, 50, 2, 2]


@pytest.mark.parametrize(
    "wish",
    [
        dict(temperature=0, min_tokens=1),
        dict(temperature=1, min_tokens=1),
        dict(temperature=0, logit_bias={2: -50}),
        dict(temperature=0, allowed_token_ids=[5, 50]),
        dict(temperature=0, frequency_penalty=2.0),
    ],
    ids=str,
)
def test_a_setting_is_obeyed_though_no_other_row_has_one(wish):
    logits_SV = np.full((S, V), -50.0, np.float32)
    logits_SV[:, [2, 50]] = 9, 6
    plain = Row(SamplingParams(temperature=0))
    odd = Row(SamplingParams(**wish), generated=[2, 2] if "frequency_penalty" in wish else [])
    assert run(logits_SV[:3], [plain, odd, plain])[0].token_S[:3].tolist() == [2, 50, 2]


def test_random_rows_that_hold_their_ends_back_are_drawn_all_the_same():
    rows = [Row(SamplingParams(temperature=1, min_tokens=1), seed=seed) for seed in range(S)]
    tokens = run(np.zeros((S, V), np.float32), rows)[0].token_S.tolist()
    assert len(set(tokens)) > 2 and not set(tokens) & set(EOS)


def test_what_ends_a_row():
    cases = [
        (dict(), 0, 2, True),  # EOS
        (dict(ignore_eos=True), 0, 2, False),
        (dict(ignore_eos=True, stop_token_ids=[2]), 0, 2, True),
        (dict(stop_token_ids=[11]), 0, 11, True),
        (dict(stop_token_ids=[11]), 0, 12, False),
        (dict(), 0, 7, False),  # a stale stop id of the slot's last user
        (dict(max_tokens=4), 2, 12, False),
        (dict(max_tokens=4), 3, 12, True),
    ]
    rows = [Row(SamplingParams(temperature=0, **wish), generated=[1] * n) for wish, n, _, _ in cases]
    logits_SV = np.zeros((S, V), np.float32)
    logits_SV[range(S), [token for _, _, token, _ in cases]] = 5
    _, _, finished_S = run(logits_SV, rows)
    assert finished_S.tolist() == [ends for *_, ends in cases]


def test_a_bad_word_is_one_that_was_generated_up_to_its_end():
    long = list(range(20, 20 + MAX_BAD_WORD_TOKENS))
    cases = [
        ([], [], [[9]], True),
        ([], [4], [[4, 9]], True),
        ([4], [], [[4, 9]], False),  # the prompt is not the answer
        ([3], [4], [[3, 4, 9]], False),
        ([], [4, 3], [[4, 9]], False),
        ([], [1, *long[:-1]], [[*long[:-1], 9]], True),
        ([], [1, *long[1:-1]], [[*long[:-1], 9]], False),
        ([], [4], [[5, 9], [6, 9], [4, 9]], True),
    ]
    rows = [Row(prompt=[1, *prompt], generated=generated, bad_words=words) for prompt, generated, words, _ in cases]
    logits_SV = np.zeros((S, V), np.float32)
    logits_SV[:, 9] = 5
    _, adjusted_SV, _ = run(logits_SV, rows)
    assert (adjusted_SV[:, 9] == -np.inf).tolist() == [banned for *_, banned in cases]
    assert np.isfinite(np.delete(adjusted_SV, 9, axis=1)).all()


def test_faulty_rows_are_flagged_and_the_others_exact():
    rows = [Row(SamplingParams(temperature=t, logprobs=2), seed=3) for t in (0, 1.0, 0, 1.0, 0, 1.0, 0, 1.0)]
    rows[4] = Row(SamplingParams(temperature=0, allowed_token_ids=[6]), bad_words=[[6]])  # everything banned
    rows[5] = Row(SamplingParams(temperature=1, allowed_token_ids=[6]), mask={7, 8})
    clean_SV = logits(8)
    clean, _, _ = run(clean_SV, rows)
    dirty_SV = clean_SV.copy()
    dirty_SV[1], dirty_SV[2, 3], dirty_SV[3, 0] = np.nan, np.inf, -np.inf
    dirty, _, _ = run(dirty_SV, rows)
    assert clean.is_faulty_S.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert dirty.is_faulty_S.tolist() == [False] + [True] * 5 + [False] * 2
    for field in ("token_S", "logprob_S", "rank_S", "top_ids_SJ", "top_logprobs_SJ"):
        np.testing.assert_array_equal(getattr(dirty, field)[[0, 6, 7]], getattr(clean, field)[[0, 6, 7]])


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_logprobs_say_what_their_mode_promises(mode):
    params = dict(logprobs=5, frequency_penalty=1.5, allowed_token_ids=list(range(90)))
    rows = [
        Row(SamplingParams(temperature=t, top_k=k, **params), generated=[8, 8], seed=4) for t, k in ((0, 0), (0.5, 9))
    ]
    logits_SV = logits(2, 2)
    logits_SV[:, 90:] += 20  # banned, and so likely that raw and processed numbers are far apart
    sampled, adjusted_SV, _ = run(logits_SV, rows, mode)
    for s, row in enumerate(rows):
        expected_V = logits_SV[s].astype(np.float64)
        if mode.startswith("processed"):
            expected_V = adjusted_SV[s].astype(np.float64)
            if s == 1:
                expected_V = np.where(ref.kept(adjusted_SV[s], row.wish)[0], expected_V / 0.5, -np.inf)
        if mode.endswith("logprobs"):
            expected_V = ref.logprobs(expected_V)
        token = sampled.token_S[s]
        assert token < 90
        np.testing.assert_allclose(sampled.logprob_S[s], expected_V[token], atol=2e-5)
        assert sampled.rank_S[s] == 1 + (expected_V > expected_V[token]).sum()
        np.testing.assert_array_equal(sampled.top_ids_SJ[s], np.argsort(-expected_V, kind="stable")[:5])
        np.testing.assert_allclose(sampled.top_logprobs_SJ[s], np.sort(expected_V)[::-1][:5], atol=2e-5)


def test_an_unknown_logprobs_mode_is_refused():
    with pytest.raises(ValueError, match="raw_logprobs"):
        run(logits(0), [Row() for _ in range(S)], mode="cooked")


def test_logprobs_nobody_asked_for_are_zero():
    sampled, _, _ = run(logits(2), [Row() for _ in range(S)])
    assert not sampled.top_logprobs_SJ.any() and not sampled.logprob_S.any()


@pytest.mark.parametrize("num", [0, 5, 32, 37, 50])
def test_prompt_tokens_are_scored_in_blocks(num):
    rng = np.random.default_rng(0)
    T, D = 50, 16
    hidden_TD, head_VD = rng.standard_normal((T, D)).astype(np.float32), rng.standard_normal((V, D)).astype(np.float32)
    next_T = rng.integers(0, V, T, dtype=np.int32)

    def score(hidden_TD, next_T, num):
        return score_tokens(hidden_TD, next_T, num, lambda x: jnp.einsum("RD,VD->RV", x, head_VD), max_logprobs=4)

    program = jax.jit(score).lower(hidden_TD, next_T, jnp.int32(num)).compile()
    assert f"f32[{T},{V}]" not in program.as_text()
    value_T, rank_T, ids_TJ, top_TJ = map(np.asarray, program(hidden_TD, next_T, jnp.int32(num)))
    for t in range(num):
        expected_V = ref.logprobs(hidden_TD[t] @ head_VD.T)
        np.testing.assert_allclose(value_T[t], expected_V[next_T[t]], atol=1e-4)
        assert rank_T[t] == 1 + (expected_V > expected_V[next_T[t]] + 1e-6).sum()
        assert ids_TJ[t].tolist() == np.argsort(-expected_V, kind="stable")[:4].tolist()
        np.testing.assert_allclose(top_TJ[t], np.sort(expected_V)[::-1][:4], atol=1e-4)
    assert num or not value_T.any()


@pytest.mark.parametrize(
    "params, words, param",
    [
        (dict(stop_token_ids=list(range(MAX_STOP_IDS + 1))), [], "stop_token_ids"),
        (dict(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS_IDS + 1), 1.0)), [], "logit_bias"),
        (dict(), [[1]] * (MAX_BAD_WORDS + 1), "bad_words"),
        (dict(), [[1] * (MAX_BAD_WORD_TOKENS + 1)], "bad_words"),
    ],
)
def test_more_than_the_tables_hold_is_refused(params, words, param):
    with pytest.raises(RequestRefused, match="at most") as refusal:
        row_settings(SamplingParams(**params), vocab_size=5000, prompt_len=1, seed=0, bad_word_ids=words)
    assert refusal.value.param == param


def test_plain_requests_need_no_tables_and_no_history():
    plain = row_settings(SamplingParams(temperature=0.7, top_p=0.9), vocab_size=V, prompt_len=1, seed=0, eos_ids=EOS)
    assert plain.tables is None and not plain.needs_history
    held = row_settings(SamplingParams(min_tokens=1), vocab_size=V, prompt_len=1, seed=0, eos_ids=EOS)
    assert held.tables.eos_ids_XE[:2].tolist() == EOS


def test_small_numbers_are_not_mistaken_for_off():
    settings = row_settings(
        SamplingParams(temperature=1e300, top_p=1e-60, repetition_penalty=1e-60), vocab_size=V, prompt_len=1, seed=-1
    )
    knobs = Knobs.unpack(jnp.asarray(settings.knobs_Q)[:, None], jnp.int32([4]))
    assert knobs.top_p_S[0] > 0 and knobs.repetition_S[0] > 0 and np.isfinite(knobs.temperature_S[0])
    assert int(knobs.seed_high_S[0]) == int(knobs.seed_low_S[0]) == 2**32 - 1


def test_words_carry_every_knob():
    values = {name.removesuffix("_S"): dtype(q + 1) for q, (name, dtype) in enumerate(KNOB_FIELDS)}
    knobs = Knobs.unpack(jnp.asarray(pack(**values))[:, None], jnp.int32([40]))
    for name, dtype in KNOB_FIELDS:
        assert getattr(knobs, name).dtype == dtype and getattr(knobs, name)[0] == values[name.removesuffix("_S")]
    assert advance(knobs).num_known_S[0] == 41
    with pytest.raises(TypeError, match="temprature"):
        pack(temprature=1)


def test_empty_tables_have_a_slots_shape():
    tables = empty_tables(3, V, EOS)
    row = row_settings(SamplingParams(min_tokens=1), vocab_size=V, prompt_len=1, seed=0, eos_ids=EOS).tables
    assert jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), tables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), row
    )
    assert tables.eos_ids_XE[2, :2].tolist() == EOS
    with pytest.raises(ValueError, match="EOS"):
        empty_tables(1, V, range(17))
