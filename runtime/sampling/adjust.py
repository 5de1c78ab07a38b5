"""Logits as the model gave them -> logits as the request wants them: bans, biases, penalties.

The order is fixed: allowed tokens and mask, bad words, bias, stop tokens held back, penalties. Each
part costs nothing in a step where no row asks for it.

Source: repetition penalty: Keskar et al. 2019, arXiv 1909.05858, section 4.1, with negative logits
multiplied rather than divided. Frequency and presence penalty: the OpenAI API reference.

Dimension key
    S  rows    V  vocabulary    W  mask words    X  slots    U  tokens a slot's history holds
    N  biased tokens    B  bad words    L  tokens of a bad word    E  stop tokens    I  shifts of all kinds
    C  tokens of history counted at a time
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.platform import current_platform
from runtime.sampling.knobs import ALLOWED, BAD_WORDS, BIAS, MASK, Knobs
from runtime.sampling.tables import Tables

BANNED = -jnp.inf
IN_PROMPT = 1 << 24  # above any count of generated tokens
HISTORY_CHUNK = 512  # C


def needs_adjusting_S(knobs: Knobs) -> jax.Array:
    """Which rows change their logits at all: bool[S]."""
    return knobs.has(ALLOWED | MASK) | _shifts_S(knobs) | _penalises_S(knobs)


def only_holds_stops_S(knobs: Knobs) -> jax.Array:
    """Which rows change nothing but that their stop tokens may not come yet: bool[S]."""
    return _holds_stops_S(knobs) & ~knobs.has(ALLOWED | MASK | BAD_WORDS | BIAS) & ~_penalises_S(knobs)


def is_held_S(token_S, knobs: Knobs, tables: Tables, slots_S) -> jax.Array:
    """Whether a token is one that ends its row and may not come yet: bool[S]."""
    return (_stops_SE(knobs, tables, slots_S) == token_S[:, None]).any(-1) & _holds_stops_S(knobs)


def looks_back_S(knobs: Knobs) -> jax.Array:
    """Which rows choose by their earlier tokens: bool[S]."""
    return knobs.has(BAD_WORDS) | _penalises_S(knobs)


def adjust(logits_SV, knobs: Knobs, tables: Tables, slots_S, history_XU, mask_SW) -> jax.Array:
    """Applies everything that comes before the temperature.

    Args:
        logits_SV: float32.
        slots_S: int32, the row's place in tables and history.
        history_XU: int32 token ids by position; read up to num_known_S.
        mask_SW: uint32 bits of allowed tokens, for rows with the MASK flag.

    Returns:
        float32[S, V]; -inf marks a banned token.
    """
    parts = (
        (knobs.has(ALLOWED | MASK), functools.partial(_keep_allowed, mask_SW=mask_SW)),
        (_shifts_S(knobs), functools.partial(_shift, history_XU=history_XU)),
        (_penalises_S(knobs), functools.partial(_penalise, history_XU=history_XU)),
    )
    for wanted_S, part in parts:
        change = functools.partial(part, knobs=knobs, tables=tables, slots_S=slots_S)
        logits_SV = _if_any(wanted_S, change, logits_SV)
    return logits_SV


def _if_any(wanted_S, change, x_SV):
    """change(x_SV) when it is wanted, else x_SV."""
    if current_platform() == "cpu":
        return lax.cond(wanted_S.any(), change, lambda x_SV: x_SV, x_SV)
    # A loop of one turn or none changes its array in place; a cond that may give its own back keeps two.
    return lax.fori_loop(0, wanted_S.any().astype(jnp.int32), lambda _, x_SV: change(x_SV), x_SV)


def _keep_allowed(logits_SV, *, knobs, tables, slots_S, mask_SW):
    S, V = logits_SV.shape
    every = jnp.uint32(0xFFFFFFFF)
    words_SW = jnp.where(knobs.has(ALLOWED)[:, None], tables.allowed_XW[slots_S], every)
    words_SW &= jnp.where(knobs.has(MASK)[:, None], mask_SW, every)

    def keep(words_xW, logits_xV):
        bits_xV = ((words_xW[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1).reshape(*words_xW.shape[:-1], -1)
        return jnp.where(bits_xV[..., :V] != 0, logits_xV, BANNED)

    if current_platform() != "tpu":
        return keep(words_SW, logits_SV)
    # A row at a time: a TPU lays 32 columns out as 128, four times the room of the scores.
    one_S = lambda i, x_SV: lax.dynamic_update_index_in_dim(x_SV, keep(words_SW[i], x_SV[i]), i, 0)
    return lax.fori_loop(0, S, one_S, logits_SV)


def _shift(logits_SV, *, knobs, tables, slots_S, history_XU):
    """Bans words and stop tokens and adds biases, in one scatter: a ban is a bias of -inf.

    One, because a TPU's compiler takes seconds over each.
    """
    words_SBL, held_S1 = tables.bad_words_XBL[slots_S], _holds_stops_S(knobs)[:, None]
    parts = (
        (words_SBL[:, :, -1], _is_said(words_SBL, knobs, slots_S, history_XU), BANNED),
        (tables.bias_ids_XN[slots_S], knobs.has(BIAS)[:, None], tables.bias_values_XN[slots_S]),
        (_stops_SE(knobs, tables, slots_S), held_S1, BANNED),
    )
    ids_SI = jnp.concatenate([_or_outside(ids, wanted, logits_SV.shape[1]) for ids, wanted, _ in parts], axis=1)
    values_SI = jnp.concatenate([jnp.broadcast_to(value, ids.shape) for ids, _, value in parts], axis=1)
    return _scatter_add(logits_SV, ids_SI, values_SI)


def own_stops_SE(knobs: Knobs, tables: Tables, slots_S) -> jax.Array:
    """The ids that end a row by its request's wish; below 0 is none, whatever the slot's last user left there."""
    own_SE = tables.stop_ids_XE[slots_S]
    return jnp.where(jnp.arange(own_SE.shape[1]) < knobs.num_stop_ids_S[:, None], own_SE, -1)


def _stops_SE(knobs, tables, slots_S):
    """The ids that end a row, its own and the model's."""
    return jnp.concatenate([own_stops_SE(knobs, tables, slots_S), tables.eos_ids_XE[slots_S]], axis=1)


def _is_said(words_SBL, knobs, slots_S, history_XU):
    """Whether the generated tokens end with all of a word but its last: bool[S, B]."""
    num_before = words_SBL.shape[2] - 1
    position_SL = knobs.num_known_S[:, None] - num_before + jnp.arange(num_before)
    last_SL = history_XU[slots_S[:, None], jnp.maximum(position_SL, 0)]
    last_SL = jnp.where(position_SL >= knobs.prompt_len_S[:, None], last_SL, -2)  # -2 equals no token and no padding
    before_SBL = words_SBL[:, :, :-1]
    return ((before_SBL == last_SL[:, None]) | (before_SBL < 0)).all(-1) & knobs.has(BAD_WORDS)[:, None]


def _penalise(logits_SV, *, knobs, tables, slots_S, history_XU):
    del tables
    counts_SV = token_counts(knobs, slots_S, history_XU, logits_SV.shape[1])
    count_SV = (counts_SV & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition_S1 = jnp.where(_repeats_S(knobs), knobs.repetition_S, 1.0)[:, None]
    repeated_SV = jnp.where(logits_SV > 0, logits_SV / repetition_S1, logits_SV * repetition_S1)
    # Not "> 0": those zeros would be taken for the ones that counting starts from, and be kept beside the counts.
    logits_SV = jnp.where(counts_SV >= 1, repeated_SV, logits_SV)
    return logits_SV - knobs.frequency_S[:, None] * count_SV - knobs.presence_S[:, None] * (count_SV > 0)


def token_counts(knobs: Knobs, slots_S, history_XU, vocab_size: int) -> jax.Array:
    """How often each token was generated, plus IN_PROMPT where the prompt has it: int32[S, V].

    The prompt is looked at for rows with a repetition penalty, the rest for rows with any penalty.
    """
    S, U = slots_S.shape[0], history_XU.shape[1]
    chunk = min(HISTORY_CHUNK, U)
    prompt_end_S = jnp.where(_repeats_S(knobs), knobs.prompt_len_S, 0)
    end_S = jnp.where(_penalises_S(knobs), knobs.num_known_S, 0)

    def count(start_S, stop_S, counts_SV):
        def body(i, counts_SV):
            start = jnp.minimum(i * chunk, U - chunk)  # the last chunk is pushed back to fit
            position_C = start + jnp.arange(chunk)
            ids_SC = history_XU[slots_S[:, None], position_C]
            live_SC = (position_C >= i * chunk) & (position_C >= start_S[:, None]) & (position_C < stop_S[:, None])
            return _scatter_add(counts_SV, _or_outside(ids_SC, live_SC, vocab_size), jnp.ones_like(ids_SC))

        first = jnp.where(stop_S > 0, start_S, U).min()
        return lax.fori_loop(first // chunk, -(-stop_S.max() // chunk), body, counts_SV)

    def prompt_then_rest(turn, counts_SV):  # a loop of two turns, so that its body is compiled once
        is_rest = turn == 1
        counts_SV = jnp.where(counts_SV > 0, IN_PROMPT, 0)
        start_S = jnp.where(is_rest, knobs.prompt_len_S, 0)
        return count(start_S, jnp.where(is_rest, end_S, prompt_end_S), counts_SV)

    return lax.fori_loop(0, 2, prompt_then_rest, jnp.zeros((S, vocab_size), jnp.int32))


def _scatter_add(x_SV, ids_SI, values_SI):
    return jax.vmap(lambda x_V, ids_I, values_I: x_V.at[ids_I].add(values_I, mode="drop"))(x_SV, ids_SI, values_SI)


def _or_outside(ids, wanted, vocab_size):
    """Ids that are not wanted point past the vocabulary, where a scatter drops them; a negative id would wrap."""
    return jnp.where(wanted & (ids >= 0), ids, vocab_size)


def _repeats_S(knobs):
    return (knobs.repetition_S != 0) & (knobs.repetition_S != 1)


def _penalises_S(knobs):
    return _repeats_S(knobs) | (knobs.frequency_S != 0) | (knobs.presence_S != 0)


def _shifts_S(knobs):
    return knobs.has(BAD_WORDS | BIAS) | _holds_stops_S(knobs)


def _holds_stops_S(knobs):
    return knobs.num_generated_S < knobs.min_tokens_S
