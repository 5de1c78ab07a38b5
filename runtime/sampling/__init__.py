"""Sampling, all of it, on the device: one function inside the compiled step, for any mix of settings."""

from runtime.sampling.adjust import looks_back_S
from runtime.sampling.knobs import KNOB_FIELDS, Knobs, advance, pack
from runtime.sampling.logprobs import nothing, score_tokens
from runtime.sampling.sampler import Sampled, finished, sample
from runtime.sampling.spread import sample_states, whole_scores
from runtime.sampling.tables import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_EOS_IDS,
    MAX_LOGIT_BIAS_IDS,
    MAX_STOP_IDS,
    RowSettings,
    Tables,
    empty_row,
    empty_tables,
    mask_words,
    num_mask_words,
    row_settings,
)

__all__ = [
    "KNOB_FIELDS",
    "MAX_BAD_WORDS",
    "MAX_BAD_WORD_TOKENS",
    "MAX_EOS_IDS",
    "MAX_LOGIT_BIAS_IDS",
    "MAX_STOP_IDS",
    "Knobs",
    "RowSettings",
    "Sampled",
    "Tables",
    "advance",
    "empty_row",
    "empty_tables",
    "finished",
    "looks_back_S",
    "mask_words",
    "nothing",
    "num_mask_words",
    "pack",
    "row_settings",
    "sample",
    "sample_states",
    "score_tokens",
    "whole_scores",
]
