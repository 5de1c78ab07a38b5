"""From the messages of a request to a prompt's text: whose template, in which format, run where."""

import asyncio
import dataclasses

from openai_api.config import ServerConfig
from openai_api.schema.chat import ChatFields
from runtime.chat.messages import Media, convert
from runtime.chat.sandbox import TemplateWorkers
from runtime.chat.spelled import SpelledTokens, StandIns
from runtime.chat.template import MAX_CHARS, ChatTemplate
from runtime.errors import RequestRefused

NOT_TRUSTED = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. "
    "Refused request with untrusted chat template."
)
INLINE_CHARS = 32_768  # shorter chats are rendered faster than a thread is reached
INLINE_MESSAGES = 64
THREAD_LIMIT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A chat as one text.

    Attributes:
        text: the prompt.
        media: what its placeholders stand for.
        hidden: the prompt with stand_ins in place of special tokens that a message spells; empty where none does.
    """

    text: str
    media: list[Media]
    hidden: str = ""
    stand_ins: StandIns | None = None


class ChatRenderer:
    """The model's template, or the server's, or with leave the request's.

    The server's own is the operator's word and is rendered here, and so is the model's where it is trusted. Any other
    runs in a worker process.

    Raises:
        ConfigError: the server's template is a file that is not there.
    """

    def __init__(self, engine, config: ServerConfig):
        self._engine, self._config = engine, config
        source = config.template_source() or engine.chat_template
        special_tokens = engine.tokenizer.special_tokens if engine.tokenizer is not None else {}
        wanted = config.chat_template_content_format
        self.template = ChatTemplate(source, special_tokens, None if wanted == "auto" else wanted)
        self._spelled = SpelledTokens(engine.tokenizer)
        limits = config.limits
        memory = limits.template_memory
        self._is_trusted = config.chat_template is not None or config.trust_model_template
        self._workers = TemplateWorkers(limit_s=limits.template_timeout_s, max_memory_bytes=memory)
        self._models_workers = TemplateWorkers(
            limit_s=limits.model_template_timeout_s, max_memory_bytes=memory, max_chars=MAX_CHARS, param="messages"
        )

    async def render(self, body: ChatFields, with_tools: bool = True) -> Rendered:
        """The prompt of these messages.

        Args:
            with_tools: False leaves the tools out of the prompt.

        Raises:
            RequestRefused: the template refuses the messages, there is none, or it may not come with a request.
        """
        body.check_sizes(self._config.limits)
        placeholder = getattr(self._engine, "placeholder", None)
        if body.mm_processor_kwargs and placeholder is None:
            raise RequestRefused(
                "mm_processor_kwargs is for models that take media; leave it out", "mm_processor_kwargs"
            )
        kwargs = body.template_kwargs
        own = body.chat_template if body.chat_template is not None else kwargs.get("chat_template")
        if own is not None and not self._config.trust_request_chat_template:
            raise RequestRefused(NOT_TRUSTED, "chat_template")
        if own is not None and not isinstance(own, str):
            raise RequestRefused("chat_template must be a string", "chat_template")
        template = self.template if own is None else self.template.with_source(own)
        tools = body.tool_dicts if with_tools else []
        messages, media = convert(body.message_dicts(), template.content_format(bool(tools)), placeholder)
        given = {"messages": messages, "tools": tools, "documents": body.documents, "kwargs": kwargs}
        options, stand_ins = self._spelled.hide(given)
        messages = options.pop("messages")
        options |= {
            "add_generation_prompt": body.add_generation_prompt,
            "continue_final_message": body.continue_final_message,
        }
        if own is not None or not self._is_trusted:
            workers = self._workers if own is not None else self._models_workers
            variables = template.variables(messages, **options)
            text = await workers.render(template.pick(bool(tools)), variables)
            text = template.finish(text, variables)
        elif len(messages) <= INLINE_MESSAGES and sum(len(str(m["content"])) for m in messages) <= INLINE_CHARS:
            text = template.render(messages, **options)
        else:
            text = await self._in_thread(template, messages, options)
        if stand_ins is None:
            return Rendered(text, media)
        text = stand_ins.unescape(text)
        return Rendered(stand_ins.restore(text), media, text, stand_ins)

    async def start(self) -> None:
        """Starts a worker, where the first chat would have to wait for one."""
        if not self._is_trusted and self.template.has_any:
            await self._models_workers.start()

    async def close(self) -> None:
        await self._workers.close()
        await self._models_workers.close()

    async def _in_thread(self, template, messages, options):
        try:
            async with asyncio.timeout(THREAD_LIMIT_S):
                return await asyncio.to_thread(template.render, messages, **options)
        except TimeoutError:
            raise RequestRefused(f"the chat template ran longer than {THREAD_LIMIT_S:g} s", "messages") from None
