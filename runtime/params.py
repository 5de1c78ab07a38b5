"""What a user chose for one request, checked on construction.

Field names are those of the HTTP API, so a message that names a field names the one the caller sent.
"""

import dataclasses
import functools
import logging
import math
from typing import Any

from runtime.errors import RequestRefused

log = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
LOWEST_TEMPERATURE = 1e-2  # below this, logits divided by the temperature overflow in bfloat16 and gain nothing
MAX_LOGIT_BIAS = 100.0
INT64 = 2**63


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue one prompt.

    n: how many choices. Choice i is drawn with seed + i when a seed is given.
    presence_penalty, frequency_penalty: over generated tokens, -2 to 2.
    repetition_penalty: over prompt and generated tokens, above 0; 1 is off.
    temperature: 0 is greedy. top_p in (0, 1]; top_k 0 or -1 is off; min_p in [0, 1], relative to the likeliest token.
    seed: int64; the same seed gives the same tokens whatever else runs. None or -1 draws one.
    stop: text that ends the answer; cut off unless include_stop_str_in_output.
    stop_token_ids: ids that end the answer. ignore_eos: the model's own end does not.
    min_tokens: no end before that many. max_tokens: None is as many as fit.
    logit_bias: token id to a number added to its logit, clamped to [-100, 100]. allowed_token_ids: all others are
        banned. bad_words: texts that must not be written.
    logprobs, prompt_logprobs: how many of the likeliest tokens to report beside the actual one; -1 is all of them.
    skip_special_tokens, spaces_between_special_tokens: how ids become text.
    truncate_prompt_tokens: keep only the last that many prompt tokens; -1 is as many as the model holds.
    constraint: what the text must match; None is anything.
    priority: lower runs earlier. cache_salt: prefixes are shared only under the same salt.

    Raises:
        RequestRefused: a value is out of bounds; `param` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None  # a list from construction on
    stop_token_ids: list[int] | None = None  # a list from construction on
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None  # a list from construction on
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    constraint: Any = None
    priority: int = 0
    cache_salt: str | None = None

    def __post_init__(self):
        put = object.__setattr__  # the class is frozen for everyone else
        put(self, "stop", [self.stop] if isinstance(self.stop, str) else list(self.stop or ()))
        put(self, "stop_token_ids", list(self.stop_token_ids or ()))
        put(self, "bad_words", list(self.bad_words or ()))
        self._check_numbers()
        self._check_lengths()
        self._check_lists()
        self._settle()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def bans_tokens(self) -> bool:
        """Whether some tokens may be forbidden, and so, at some place, all of them."""
        return bool(self.constraint or self.allowed_token_ids or self.bad_words or self.min_tokens)

    def check_model(self, *, vocab_size: int, num_tokens: int | None = None, max_logprobs: int = 20) -> None:
        """Refuses what this model cannot do.

        Args:
            vocab_size: the width of the logits.
            num_tokens: how many ids the tokenizer has; None for vocab_size.
            max_logprobs: the most that may be asked for; -1 is no limit.

        Raises:
            RequestRefused: an id past the vocabulary, or too many logprobs.
        """
        num_tokens = min(num_tokens or vocab_size, vocab_size)
        if bad := [i for i in self.logit_bias or () if not 0 <= i < vocab_size]:
            _refuse(
                "logit_bias",
                f"token_id(s) {bad[:8]} in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocab_size}",
            )
        if any(not 0 <= i < num_tokens for i in self.allowed_token_ids or ()):
            _refuse("allowed_token_ids", "allowed_token_ids contains out-of-vocab token id!")
        if bad := [i for i in self.stop_token_ids if not 0 <= i < vocab_size]:
            _refuse("stop_token_ids", f"stop_token_ids {bad[:8]} are out of vocabulary. Vocabulary size: {vocab_size}")
        for kind, name, asked in (
            ("sample", "logprobs", self.logprobs),
            ("prompt", "prompt_logprobs", self.prompt_logprobs),
        ):
            asked = vocab_size if asked == -1 else asked or 0
            if max_logprobs != -1 and asked > max_logprobs:
                message = f"Requested {kind} logprobs of {asked}, which is greater than max allowed: {max_logprobs}"
                _refuse(name, message)

    def _check_numbers(self):
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"):
            if not math.isfinite(getattr(self, name)):
                _refuse(name, f"{name} must be a finite number, got {getattr(self, name)}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                _refuse(name, f"{name} must be in [-2, 2], got {getattr(self, name)}.")
        if self.repetition_penalty <= 0:
            _refuse(
                "repetition_penalty", f"repetition_penalty must be greater than zero, got {self.repetition_penalty}."
            )
        if self.temperature < 0:
            _refuse("temperature", f"temperature must be non-negative, got {self.temperature}. Use 0 for greedy.")
        if not 0 < self.top_p <= 1:
            _refuse("top_p", f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k < -1:
            _refuse("top_k", f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        if not 0 <= self.min_p <= 1:
            _refuse("min_p", f"min_p must be in [0, 1], got {self.min_p}.")
        if self.n < 1:
            _refuse("n", f"n must be at least 1, got {self.n}.")
        if self.n > 1 and self.is_greedy:
            _refuse("n", f"n must be 1 when using greedy sampling, got {self.n}.")
        if self.seed is not None and not -INT64 <= self.seed < INT64:
            _refuse("seed", f"seed must be a 64-bit integer, got {self.seed}.")

    def _check_lengths(self):
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.min_tokens < 0:
            _refuse("min_tokens", f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse(
                "min_tokens",
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}.",
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (asked := getattr(self, name)) is not None and asked < -1:
                _refuse(name, f"{name} must be non-negative or -1, got {asked}.")
        truncate = self.truncate_prompt_tokens
        if truncate is not None and (truncate < -1 or truncate == 0):
            _refuse("truncate_prompt_tokens", f"truncate_prompt_tokens must be an integer >= 1 or -1, got {truncate}")

    def _check_lists(self):
        if any(not text for text in self.stop):
            _refuse("stop", "stop cannot contain an empty string.")
        if any(not text for text in self.bad_words):
            _refuse("bad_words", "bad_words cannot contain an empty string.")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _refuse("allowed_token_ids", "allowed_token_ids is not None and empty!")
        for token_id, bias in (self.logit_bias or {}).items():
            if not math.isfinite(bias):
                _refuse("logit_bias", f"logit_bias of token {token_id} must be a finite number, got {bias}.")
        if self.cache_salt is not None and not self.cache_salt:
            _refuse("cache_salt", "Parameter 'cache_salt' must be a non-empty string if provided.")

    def _settle(self):
        """Gives each meaning one spelling, so that nobody downstream handles two."""
        put = object.__setattr__
        if self.is_greedy:
            for name, off in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                put(self, name, off)
        elif self.temperature < LOWEST_TEMPERATURE:
            _say_raised()
            put(self, "temperature", LOWEST_TEMPERATURE)
        put(self, "top_k", max(self.top_k, 0))
        put(self, "seed", None if self.seed == -1 else self.seed)
        if self.logit_bias is not None:
            bias = {int(i): min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, float(b))) for i, b in self.logit_bias.items()}
            put(self, "logit_bias", bias)


@functools.cache
def _say_raised() -> None:
    """Once a process: whoever asks so asks with every request."""
    log.warning("a temperature between 0 and %g is raised to %g", LOWEST_TEMPERATURE, LOWEST_TEMPERATURE)


def _refuse(param: str, message: str):
    raise RequestRefused(message, param)
