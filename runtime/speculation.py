"""What was asked of speculation: `--speculative-config`, under the names that vLLM gives its keys. No jax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from runtime.errors import ConfigError

KEYS = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "disable_by_batch_size")
MAX_DRAFTS = 32
# Measured on two cores with 135M parameters: alone, a request that repeats its text gets 3.8 times as many tokens a
# second, and prose loses nothing; with four at once prose loses a tenth.
ON_CPU = {"method": "ngram", "num_speculative_tokens": 4, "disable_by_batch_size": 1}


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Drafts are the tokens that followed the last ones at their latest earlier place in the request's own text.

    Attributes:
        num_drafts: tokens drafted for a row in a step; 0 is off.
        longest, shortest: how many last tokens are looked for, longest first.
        max_rows: with more rows decoding nothing is drafted.
    """

    num_drafts: int = 0
    longest: int = 3
    shortest: int = 2
    max_rows: int = 0

    @classmethod
    def read(cls, config: Mapping[str, Any] | None, usual_max_rows: int) -> "Speculation":
        """Checks a speculative config; None is no speculation, and so is one with no tokens to draft.

        Args:
            usual_max_rows: max_rows when disable_by_batch_size is not given.

        Raises:
            ConfigError: another method, an unknown key or a number out of bounds.
        """
        if config is None:
            return cls()
        where = "speculative_config"
        if unknown := sorted(config.keys() - set(KEYS)):
            raise ConfigError(f"{where} key {unknown[0]!r} is not known; its keys are {', '.join(KEYS)}")
        method = config.get("method", "ngram")
        if method != "ngram":
            raise ConfigError(f"{where} method {method!r} cannot be had; the one there is is 'ngram'")
        if "num_speculative_tokens" not in config:
            raise ConfigError(f"{where} lacks num_speculative_tokens, how many tokens to draft, such as 4")
        for key, value in config.items():
            least = 0 if key == "num_speculative_tokens" else 1
            if key != "method" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{where} {key} is {value!r}; it must be an integer from {least} up")
        if not config["num_speculative_tokens"]:
            return cls()
        if (num_drafts := config["num_speculative_tokens"]) > MAX_DRAFTS:
            raise ConfigError(f"{where} num_speculative_tokens is {num_drafts}; at most {MAX_DRAFTS} can be drafted")
        longest = config.get("prompt_lookup_max", max(3, config.get("prompt_lookup_min", 1)))
        shortest = config.get("prompt_lookup_min", min(2, longest))
        if shortest > longest:
            raise ConfigError(f"{where} prompt_lookup_min {shortest} is above prompt_lookup_max {longest}; swap them")
        return cls(num_drafts, longest, shortest, config.get("disable_by_batch_size", usual_max_rows))

    def __str__(self):
        return f"{self.num_drafts} by {self.longest} to {self.shortest} tokens" if self.num_drafts else "off"
