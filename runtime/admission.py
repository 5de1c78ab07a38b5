"""From a request to its choices: what the model cannot do is refused, names become numbers.

Nothing is queued and nothing touches the device here, so it is safe on any thread.
"""

from runtime.choice import Choice
from runtime.errors import RequestRefused
from runtime.loading import Loaded
from runtime.params import SamplingParams
from runtime.request import Prompt
from runtime.sampling import RowSettings, row_settings
from runtime.seeds import Seeds

MAX_N = 128


class Admission:
    """Knows the model's vocabulary, its end tokens and its tokenizer.

    Args:
        loaded: the model and its plan.
    """

    def __init__(self, loaded: Loaded):
        self.plan = loaded.plan
        self.tokenizer = loaded.tokenizer
        self.eos_id, self.eos_ids = loaded.eos_id, loaded.eos_ids
        self._seeds = Seeds(loaded.plan.seed)

    def choices(self, key: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[Choice]:
        """The n choices of a request, checked against this model.

        Raises:
            RequestRefused: a token id or a parameter that this model cannot take.
        """
        self._check_prompt(prompt)
        if params.n > MAX_N:
            raise RequestRefused(f"n is {params.n}; at most {MAX_N} choices may be asked for", param="n")
        num_ids = self.tokenizer.vocab_size if self.tokenizer else None
        params.check_model(vocab_size=self.plan.vocab_size, num_tokens=num_ids, max_logprobs=self.plan.max_logprobs)
        bad_word_ids = self._bad_word_ids(params)
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self.eos_ids
        seed = self._seeds.next(prompt.token_ids) if params.seed is None else params.seed
        choices = []
        for index in range(params.n):
            # Choice i of a seeded request is what a request with seed + i would get.
            settings = self._settings(params, len(prompt.token_ids), seed + index, bad_word_ids)
            choices.append(
                Choice(
                    key,
                    index,
                    prompt,
                    params,
                    self.tokenizer,
                    settings=settings,
                    stop_ids=stop_ids,
                    eos_id=self.eos_id,
                    matcher=params.constraint.matcher() if params.constraint is not None else None,
                    priority=priority,
                )
            )
        return choices

    def _settings(self, params: SamplingParams, prompt_len: int, seed: int, bad_word_ids) -> RowSettings:
        return row_settings(
            params,
            vocab_size=self.plan.vocab_size,
            prompt_len=prompt_len,
            seed=seed,
            eos_ids=sorted(self.eos_ids),
            bad_word_ids=bad_word_ids,
            has_mask=params.constraint is not None,
        )

    def _check_prompt(self, prompt: Prompt) -> None:
        if not prompt.token_ids:
            raise RequestRefused("The decoder prompt cannot be empty", param="prompt")
        lowest, highest = min(prompt.token_ids), max(prompt.token_ids)
        for token in (lowest, highest):
            if not 0 <= token < self.plan.vocab_size:
                raise RequestRefused(f"Token id {token} is out of vocabulary", param="prompt")

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        if not params.bad_words:
            return []
        if self.tokenizer is None:
            raise RequestRefused("this model has no tokenizer, which bad_words needs", param="bad_words")
        return self.tokenizer.bad_word_ids(params.bad_words)
