"""An engine whose tokens are written down beforehand: the face of AsyncEngine, with no model behind it."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import tiny_tokenizers

from runtime.errors import Busy, EngineStopped
from runtime.metrics import EngineMetrics
from runtime.params import SamplingParams
from runtime.request import Prompt, RequestOutput, TokenLogprobs
from runtime.tokenizer import Detokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class FakePlan:
    max_model_len: int
    page_size: int = 16
    num_pages: int = 64
    kv_dtype: str = "bfloat16"
    enable_prefix_caching: bool = True


class FakeEngine:
    """Answers each request with scripted tokens, one a step, then EOS.

    Args:
        script: text to answer with, or a function (prompt, params, index) -> text or token ids.
        step_s: seconds a token takes; 0 only lets other coroutines run.

    Attributes:
        seen: (prompt, params, request_id, priority) of each request.
        aborted: ids of requests closed before their end.
        gate: cleared, no further token is made until it is set.
        failure: an exception that is raised in place of the token numbered `fails_at`.
    """

    def __init__(
        self,
        script: str | Callable = "Hello world, this is a test.",
        *,
        tokenizer: Tokenizer | None = None,
        chat_template: str | dict | None = tiny_tokenizers.CHATML,
        max_model_len: int = 512,
        max_logprobs: int = 20,
        step_s: float = 0.0,
    ):
        self.tokenizer = tokenizer or tiny_tokenizers.byte_level()
        self.chat_template = chat_template
        self.model_names = ["tiny"]
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.vocab_size = self.tokenizer.vocab_size
        self.default_sampling: dict = {}
        self.compiler = None
        self.plan = FakePlan(max_model_len)
        self.metrics = EngineMetrics(self.plan)
        self.script, self.step_s = script, step_s
        self.is_healthy = self.is_accepting = True
        self.is_full = False
        self.num_in_flight = 0
        self.num_cached_tokens = 0
        self.seen: list[tuple[Prompt, SamplingParams, str, int]] = []
        self.aborted: list[str] = []
        self.num_resets = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.fails_at = 0

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        params.check_model(vocab_size=self.vocab_size, max_logprobs=self.max_logprobs)
        if self.is_full:
            raise Busy(retry_after_s=3.0)
        if not self.is_healthy:
            raise EngineStopped()
        self.seen.append((prompt, params, request_id, priority))
        self.num_in_flight += 1
        is_over = False
        try:
            choices = [FakeChoice(self, prompt, params, index) for index in range(params.n)]
            is_first = True
            while left := [choice for choice in choices if not choice.is_over]:
                await asyncio.sleep(self.step_s)
                await self.gate.wait()
                for choice in left:
                    output = choice.step()
                    if is_first:
                        is_first = False
                        output.prompt_token_ids = prompt.token_ids
                        output.num_cached_tokens = self.num_cached_tokens
                        if params.prompt_logprobs is not None:
                            output.prompt_logprobs = [
                                None,
                                *self.logprobs(prompt.token_ids[1:], params.prompt_logprobs),
                            ]
                    yield output
            is_over = True
        finally:
            self.num_in_flight -= 1
            if not is_over:
                self.aborted.append(request_id)

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def logprobs(self, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
        """Each token is second to the id after it; the logprob of rank r is -r."""
        return [
            TokenLogprobs(
                i, -2.0, 2, [(i + 1, -1.0, 1), (i, -2.0, 2), *((i + r, -float(r), r) for r in range(3, 40))][:count]
            )
            for i in token_ids
        ]


class FakeChoice:
    def __init__(self, engine: FakeEngine, prompt: Prompt, params: SamplingParams, index: int):
        self.engine, self.params, self.index = engine, params, index
        script = engine.script if isinstance(engine.script, str) else engine.script(prompt, params, index)
        self.ids = engine.tokenizer.encode(script, False) if isinstance(script, str) else list(script)
        self.num_made = 0
        self.is_over = False
        self.detokenizer = Detokenizer(
            engine.tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def step(self) -> RequestOutput:
        engine, params = self.engine, self.params
        if engine.failure is not None and self.num_made >= engine.fails_at:
            raise engine.failure
        at_end = self.num_made >= len(self.ids)
        token_id = engine.tokenizer.eos_token_id if at_end else self.ids[self.num_made]
        self.num_made += 1
        finish = stop_reason = None
        if at_end or token_id in params.stop_token_ids:
            finish, stop_reason = "stop", None if at_end else token_id
        elif self.num_made >= params.max_tokens:
            finish = "length"
        text, stop = self.detokenizer.push([token_id], {"stop": "token", "length": "length", None: None}[finish])
        if stop is not None:
            finish, stop_reason = "stop", stop
        self.is_over = finish is not None
        logprobs = None if params.logprobs is None else engine.logprobs([token_id], params.logprobs)
        return RequestOutput(self.index, text, [token_id], logprobs, finish, stop_reason)
