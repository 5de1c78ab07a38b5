"""Beam search over any engine: several continuations at once, each grown by its likeliest tokens.

Every step asks the engine for one token of every beam with the 2 n likeliest beside it; the prefix cache makes that
cheap. Sampling parameters other than those of BeamParams play no part.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncGenerator

from runtime.errors import RequestRefused
from runtime.params import SamplingParams
from runtime.request import Prompt, RequestOutput, TokenLogprobs
from runtime.tokenizer import Detokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamParams:
    """n: beams kept, and choices given. length_penalty: above 1 favours long answers. The rest as SamplingParams."""

    n: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0

    def __post_init__(self):
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise RequestRefused(f"{name} must be at least 1, got {getattr(self, name)}.", name)


@dataclasses.dataclass(frozen=True, slots=True)
class Beam:
    """A continuation so far. `end` is the EOS id that ended it, which token_ids may leave out."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    total: float = 0.0
    end: int | None = None

    def rank(self, num_prompt: int, length_penalty: float) -> float:
        """Grows with the logprob of all tokens over a power of the length, prompt included and EOS not.

        It is minus the logarithm of minus that quotient, so that no penalty is too large or too small.
        """
        has_eos = self.end is not None and self.token_ids[-1:] == (self.end,)
        length = num_prompt + len(self.token_ids) - has_eos
        return length_penalty * math.log(length) - math.log(-self.total) if self.total < 0 else math.inf


async def beam_search(
    engine, prompt: Prompt, params: BeamParams, request_id: str
) -> AsyncGenerator[RequestOutput, None]:
    """Yields the n best continuations, the best first, each as one whole output.

    Raises:
        RequestRefused: 2 n logprobs are more than the engine gives.
    """
    one_token = SamplingParams(
        temperature=0, max_tokens=1, logprobs=2 * params.n, ignore_eos=True, priority=params.priority
    )
    eos_id = None if params.ignore_eos else engine.tokenizer.eos_token_id
    num_prompt = len(prompt.token_ids)
    beams, ended, num_cached = [Beam()], list[Beam](), 0

    def best_of(candidates):
        return sorted(candidates, key=lambda b: b.rank(num_prompt, params.length_penalty), reverse=True)[: params.n]

    for _ in range(params.max_tokens):
        steps = [_next(engine, prompt, beam, one_token, f"{request_id}-{i}") for i, beam in enumerate(beams)]
        try:
            entries = await asyncio.gather(*steps)
        except RequestRefused as error:
            if error.param == "logprobs":
                raise RequestRefused(f"{error}. Beam search asks for twice n", "n") from None
            raise
        num_cached = num_cached or entries[0][1]
        grown: list[Beam] = []
        for beam, (entry, _) in zip(beams, entries, strict=True):
            grown += _grown(beam, entry, eos_id, params)
        ended = best_of([*ended, *(beam for beam in grown if beam.end is not None)])
        beams = best_of(beam for beam in grown if beam.end is None)
        if not beams:
            break
    best = best_of(ended + beams)
    for index, beam in enumerate(best):
        detokenizer = Detokenizer(
            engine.tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_token_ids=prompt.token_ids
        )
        text, _ = detokenizer.push(beam.token_ids, end="length")
        reason = "length" if beam.end is None else "stop"
        output = RequestOutput(index, text, list(beam.token_ids), list(beam.logprobs), reason, beam.end)
        if index == 0:
            output.prompt_token_ids, output.num_cached_tokens = prompt.token_ids, num_cached
        yield output


async def _next(engine, prompt, beam, params, request_id):
    """(the likeliest tokens after a beam, prompt tokens that were cached)."""
    longer = dataclasses.replace(prompt, token_ids=[*prompt.token_ids, *beam.token_ids], text=None)
    async with contextlib.aclosing(engine.generate(longer, params, request_id, priority=params.priority)) as outputs:
        async for output in outputs:
            if output.logprobs:
                return output.logprobs[0], output.num_cached_tokens
    raise RequestRefused("the engine gave no logprobs, which beam search needs", "use_beam_search")


def _grown(beam, entry, eos_id, params):
    """A beam with each of the likeliest tokens after it."""
    for token_id, logprob, rank in entry.top:
        is_end = token_id == eos_id
        kept = not is_end or params.include_stop_str_in_output
        chosen = TokenLogprobs(token_id, logprob, rank, entry.top)
        yield Beam(
            (*beam.token_ids, token_id) if kept else beam.token_ids,
            (*beam.logprobs, chosen) if kept else beam.logprobs,
            beam.total + logprob,
            eos_id if is_end else None,
        )
