"""The engine in a notebook: no server, no thread.

llm = LLM("path/to/model")
for answer in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8)):
    print(answer.text)
"""

import dataclasses
import itertools
import numbers
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from runtime.banner import stage_of
from runtime.chat.spelled import SpelledTokens
from runtime.chat.template import ChatTemplate
from runtime.choice import Choice, Gain
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import RequestRefused
from runtime.params import SamplingParams
from runtime.request import FinishReason, Prompt, TokenLogprobs
from runtime.router import Router


@dataclasses.dataclass
class Answer:
    """One choice of one prompt, complete.

    Attributes:
        text, token_ids: what was generated, the prompt not included.
        logprobs: one entry a token, when asked for.
        index: which of the n choices.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    index: int


@dataclasses.dataclass
class Generation:
    """All answers to one prompt. `text`, `token_ids` and `finish_reason` are the first one's.

    Attributes:
        prompt: its text; None when token ids were given.
        prompt_logprobs: one entry a prompt token, the first None, when asked for.
        num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int
    answers: list[Answer]

    @property
    def text(self) -> str:
        return self.answers[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.answers[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.answers[0].finish_reason


class LLM:
    """A model, loaded and compiled, for use from Python.

    Args:
        model: a Hugging Face folder, a .gguf file, a hub id, or None for the demo model.
        options: fields of EngineConfig, such as dtype, max_model_len, max_num_seqs.

    Raises:
        ConfigError, ConversionError: with the cause and the remedy.
    """

    def __init__(self, model: str | None = None, **options: Any):
        from runtime.demo import fetch, fetch_tokenizer

        known = {field.name for field in dataclasses.fields(EngineConfig)} - {"model"}
        if unknown := sorted(options.keys() - known):
            raise TypeError(f"LLM has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}")
        with _Bar() as bar:
            if options.get("tokenizer") is not None:
                options["tokenizer"] = str(fetch_tokenizer(options["tokenizer"]))
            config = EngineConfig(model=str(fetch(model, progress=bar)), **options)
            self.engines = Engine.load_replicas(config, progress=bar)
        self.engine = self.engines[0]  # for what is the same of all
        self._router = Router(len(self.engines), self.engine.plan.page_size)
        self.tokenizer = self.engine.tokenizer
        source = self.engine.loaded.checkpoint.chat_template
        self.template = (
            ChatTemplate(source, self.tokenizer.special_tokens if self.tokenizer else {}) if source else None
        )
        self._spelled = SpelledTokens(self.tokenizer)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: str | list[int] | dict | Sequence[str | list[int] | dict],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[Generation]:
        """Continues each prompt; all of them run in one batch, as far as they fit.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; or several of these.
            params: for all, or one for each prompt; SamplingParams() when None.

        Returns:
            One Generation a prompt, in order.

        Raises:
            RequestRefused: a prompt or parameter that can never run; none of the prompts is run then.
        """
        is_one = isinstance(prompts, str | dict) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral))
        several: Any = [prompts] if is_one else prompts
        each = itertools.repeat(params or SamplingParams()) if not isinstance(params, Sequence) else params
        if isinstance(params, Sequence) and len(params) != len(several):
            raise RequestRefused(f"{len(several)} prompts and {len(params)} params; give one, or one for each")
        requests = [
            self.engine.prepare(str(next(self._ids)), self._prompt(prompt), p)
            for prompt, p in zip(several, each, strict=False)
        ]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[Generation]:
        """Answers one conversation, or several, each a list of {"role", "content"} messages.

        Raises:
            RequestRefused: the model has no chat template, or the template refuses the messages.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        if self.template is None:
            raise RequestRefused(
                "this model has no chat template; use generate() with a prompt of your own", "messages"
            )
        endings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        prompts = [
            self._chat_ids({"messages": list(each), "tools": tools, "kwargs": chat_template_kwargs}, endings)
            for each in conversations
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def _chat_ids(self, given: dict[str, Any], endings: dict[str, bool]) -> list[int]:
        """Token ids of a conversation, in which only the template's special tokens are special."""
        hidden, stand_ins = self._spelled.hide(given)
        text = self.template.render(hidden.pop("messages"), **hidden, **endings)
        if stand_ins is None:
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode_spelled(stand_ins.unescape(text), stand_ins, add_special_tokens=False)

    def _prompt(self, prompt: str | list[int] | dict) -> Prompt:
        content: Any = prompt
        if isinstance(prompt, dict) and len(prompt) == 1:
            content = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(content, str):
            if self.tokenizer is None:
                raise RequestRefused("this model has no tokenizer; give token ids", param="prompt")
            return Prompt(self.tokenizer.encode(content), content)
        if isinstance(content, Sequence) and all(isinstance(token, numbers.Integral) for token in content):
            return Prompt([int(token) for token in content])
        forms = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
        raise RequestRefused(f"a prompt is {forms}; got {prompt!r:.200}", param="prompt")

    def _run(self, requests: list[list[Choice]], use_tqdm: bool) -> list[Generation]:
        answers: dict[Choice, Answer] = {}
        left = len(requests)
        replicas = [self._router.pick(choices[0].prompt, len(choices)) for choices in requests]
        try:
            for choices, replica in zip(requests, replicas, strict=True):
                self.engines[replica].add(choices)
            with tqdm(total=len(requests), disable=not use_tqdm, desc="prompts", unit="") as bar:
                while left:
                    # Each step of one replica is read while the others' are under way.
                    for engine in self.engines:
                        for gain in engine.step() if engine.has_work else ():
                            self._take(engine, gain, answers)
                    done = sum(all(c in answers and answers[c].finish_reason for c in choices) for choices in requests)
                    bar.update(done - bar.n)
                    left = len(requests) - done
        finally:
            for choices, replica in zip(requests, replicas, strict=True):
                self.engines[replica].abort(choices[0].key)
                self._router.done(replica, len(choices))
        return [
            Generation(
                prompt=choices[0].prompt.text,
                prompt_token_ids=choices[0].prompt.token_ids,
                prompt_logprobs=choices[0].prompt_logprobs,
                num_cached_tokens=choices[0].sequence.num_cached_tokens,
                answers=[answers[choice] for choice in choices],
            )
            for choices in requests
        ]

    def _take(self, engine: Engine, gain: Gain, answers: dict[Choice, Answer]) -> None:
        choice = gain.choice
        if choice.is_over:
            return
        output = choice.output(gain)
        if output.finish_reason and not choice.sequence.is_finished:
            engine.abort(choice.key, choice.index)
        answer = answers.setdefault(choice, Answer("", [], output.logprobs and [], None, None, choice.index))
        answer.text += output.text
        answer.token_ids += output.token_ids
        if answer.logprobs is not None and output.logprobs:
            answer.logprobs += output.logprobs
        answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason


class _Bar:
    """Progress of loading, one bar a phase; phases may run beside each other."""

    def __enter__(self):
        self._bars: dict[str, tqdm] = {}
        return self

    def __call__(self, name: str, done: int, total: int) -> None:
        phase = stage_of(name)
        if phase not in self._bars:
            self._bars[phase] = tqdm(total=total, desc=phase)
        bar = self._bars[phase]
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(phase).close()

    def __exit__(self, *_):
        for bar in self._bars.values():
            bar.close()
