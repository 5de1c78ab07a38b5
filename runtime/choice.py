"""Choice: one of the n answers to a request, from its sampling settings to its text.

The engine's thread samples for it; whoever listens (a coroutine, or the notebook) turns its tokens
into text, so that the engine never waits for a tokenizer.
"""

import dataclasses
from collections.abc import Iterator

from runtime.params import SamplingParams
from runtime.request import FinishReason, Prompt, RequestOutput, TokenLogprobs
from runtime.sampling import RowSettings
from runtime.sequence import Sequence
from runtime.tokenizer import Detokenizer, Tokenizer


@dataclasses.dataclass(slots=True)
class Gain:
    """What one step gave a choice, or how it ended.

    Attributes:
        token_ids: new tokens, a stop token included.
        finish_reason, stop_reason: as in RequestOutput; set when the engine ended the choice.
        error: the choice failed; nothing else is set.
    """

    choice: "Choice"
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: Exception | None = None

    def joins(self, following: "Gain") -> bool:
        """Whether the next gain can be told together with this one."""
        goes_on = self.finish_reason is None and self.error is None
        return goes_on and following.choice is self.choice and following.error is None

    def join(self, following: "Gain") -> None:
        """Takes in the next gain of the same choice."""
        self.token_ids += following.token_ids
        if self.logprobs is not None and following.logprobs is not None:
            self.logprobs += following.logprobs
        self.finish_reason, self.stop_reason = following.finish_reason, following.stop_reason


@dataclasses.dataclass(slots=True)
class Gains:
    """What one step gave. Nearly always that is a token each to many choices: those are kept as two lists.

    Attributes:
        choices, token_ids: choices that gained this one token and go on.
        others: the rest, each spelled out.
    """

    choices: list["Choice"] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    others: list[Gain] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.choices) + len(self.others)

    def __iter__(self) -> Iterator[Gain]:
        for choice, token_id in zip(self.choices, self.token_ids, strict=True):
            yield Gain(choice, [token_id])
        yield from self.others


class Choice:
    """One answer: settings the engine reads, and the text made so far.

    Attributes:
        key: the request's name inside the engine; its choices share it.
        index: 0 to n - 1.
        settings: what the sampler is told; its tables are None when a slot's usual ones serve.
        stop_ids: tokens that end it, the model's own EOS included unless ignored.
        eos_id: the primary EOS, whose stop_reason is None.
        matcher: keeps the output inside a grammar; None for anything.
        prompt_logprobs: filled chunk by chunk when asked for.
        arrived, scheduled_at, first_token_at, last_token_at: seconds on the monotonic clock, 0 until it happens.
    """

    __slots__ = (
        "key", "index", "prompt", "params", "sequence", "settings", "stop_ids", "eos_id", "matcher", "prompt_logprobs",
        "has_spoken", "is_over", "arrived", "scheduled_at", "first_token_at", "last_token_at", "_detokenizer",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        *,
        settings: RowSettings,
        stop_ids: frozenset[int],
        eos_id: int | None,
        matcher=None,
        priority: int = 0,
    ):
        self.key, self.index, self.prompt, self.params = key, index, prompt, params
        self.settings, self.stop_ids, self.eos_id, self.matcher = settings, stop_ids, eos_id, matcher
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.has_spoken = False
        self.is_over = False
        self.arrived = self.scheduled_at = self.first_token_at = self.last_token_at = 0.0
        self.sequence = Sequence(
            f"{key}-{index}",
            prompt.token_ids,
            params.max_tokens,
            priority=priority,
            cache_salt=prompt.cache_salt,
            adapter=prompt.adapter,
            needs_token_first=matcher is not None,
            steps_singly=params.logprobs is not None,  # a window reports those of its last step only
            reuses_prefix=params.prompt_logprobs is None,
            owner=self,
        )
        self._detokenizer = tokenizer and Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            stop=params.stop or (),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            prompt_token_ids=prompt.token_ids,
        )

    @property
    def may_stop(self) -> bool:
        """Whether the model's own end would end it now."""
        return self.eos_id in self.stop_ids and len(self.sequence.output_ids) >= self.params.min_tokens

    def output(self, gain: Gain) -> RequestOutput:
        """The gain as text. Ends the choice when a stop string appears; the engine must then be told.

        Raises:
            Exception: the gain's error.
        """
        if gain.error is not None:
            raise gain.error
        token_ids, logprobs = gain.token_ids, gain.logprobs
        finish, stop = gain.finish_reason, gain.stop_reason
        text = ""
        if self._detokenizer is not None:
            end = None if finish is None else "token" if finish == "stop" and self._is_end(token_ids[-1]) else "length"
            before = self._detokenizer.num_tokens
            text, stop_string = self._detokenizer.push(token_ids, end)
            if stop_string is not None:
                finish, stop = "stop", stop_string
                taken = self._detokenizer.num_tokens - before
                token_ids = token_ids[:taken]
                logprobs = logprobs and logprobs[:taken]
        output = RequestOutput(self.index, text, token_ids, logprobs, finish, stop)
        if not self.has_spoken:
            self.has_spoken = True
            output.prompt_token_ids = self.prompt.token_ids
            output.prompt_logprobs = self.prompt_logprobs
            output.num_cached_tokens = self.sequence.num_cached_tokens
        self.is_over = finish is not None
        return output

    def _is_end(self, token_id: int) -> bool:
        """Whether a token that ended the choice says no more than that; under a grammar the last one may be text."""
        return token_id in self.stop_ids or (self.matcher is not None and self.matcher.is_end(token_id))
