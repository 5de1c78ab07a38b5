"""Text and token ids to prompts that fit the model; what does not fit is refused before any work."""

import asyncio
from collections.abc import Sequence

from openai_api.chat_rendering import Rendered
from runtime.errors import RequestRefused
from runtime.request import Prompt
from runtime.tokenizer import Tokenizer

INLINE_CHARS = 4096  # a shorter text is tokenised faster than a thread is reached

SHORTEN = "Please reduce the length of the input messages."


def too_long(limit: int, length: int, field: str, at_least: bool = False) -> RequestRefused:
    has = f"at least {length}" if at_least else f"{length}"
    message = f"This model's maximum context length is {limit} tokens. However, your request has {has} input tokens."
    return RequestRefused(f"{message} {SHORTEN}", field)


async def encode(
    tokenizer: Tokenizer,
    text: str,
    *,
    add_special_tokens: bool,
    limit: int | None = None,
    keep: int | None = None,
    field: str = "prompt",
) -> list[int]:
    """Token ids of a text, off the event loop where it is long.

    Args:
        limit: the most there may be; a text that is surely longer is refused unread. None is no limit.
        keep: only the last that many are wanted, so a longer text is cut before it is read.
        field: of the request, that the text came from.

    Raises:
        RequestRefused: the text is surely over the limit.
    """
    if keep is not None and len(text) > (room := (keep + 16) * tokenizer.longest_piece):
        text = text[-room:]
    if limit is not None and keep is None and (fewest := tokenizer.fewest_tokens(text)) > limit:
        raise too_long(limit, fewest, field, at_least=True)
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


def check_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Refuses ids that the model has no row for, and an empty prompt."""
    if not token_ids:
        raise RequestRefused("The decoder prompt cannot be empty", field)
    if max(token_ids) >= vocab_size or min(token_ids) < 0:
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise RequestRefused(f"Token id {bad} is out of vocabulary", field)


async def completion_prompt(engine, item: str | list[int], body, adapter: str | None = None) -> Prompt:
    """One prompt of a completion request.

    Raises:
        RequestRefused: it is empty, too long, or has unknown ids.
    """
    limit = engine.max_model_len - (body.max_tokens or 0)
    if limit <= 0:
        message = (
            f"This model's maximum context length is {engine.max_model_len} tokens, prompt and answer together, and "
        )
        raise RequestRefused(
            f"{message}max_tokens={body.max_tokens} leaves no room for a prompt. Lower it.", "max_tokens"
        )
    keep = body.truncate_prompt_tokens
    if keep is not None and keep > limit:
        raise RequestRefused(
            f"truncate_prompt_tokens={keep} cannot be greater than max_length={limit}. "
            "Please select a smaller truncation size.",
            "truncate_prompt_tokens",
        )
    keep = limit if keep == -1 else keep
    text = item if isinstance(item, str) else None
    if text is not None:
        add = body.add_special_tokens
        token_ids = await encode(engine.tokenizer, text, add_special_tokens=add, limit=limit, keep=keep)
    else:
        token_ids = [i for i in item if isinstance(i, int)]  # all are
    if keep is not None:
        token_ids = token_ids[-keep:] if keep > 0 else []
    if len(token_ids) > limit or (len(token_ids) == engine.max_model_len and not body.hides_text):
        raise too_long(limit, len(token_ids), "prompt")
    check_ids(token_ids, engine.vocab_size, "prompt")
    return Prompt(token_ids, text, cache_salt=body.cache_salt, adapter=adapter)


async def encode_chat(
    tokenizer: Tokenizer, chat: Rendered, *, add_special_tokens: bool, limit: int | None = None, keep: int | None = None
) -> list[int]:
    """Token ids of a rendered chat, in which what people spell is no special token; otherwise as encode()."""
    if chat.stand_ins is None:
        limits = {"limit": limit, "keep": keep}
        return await encode(tokenizer, chat.text, add_special_tokens=add_special_tokens, field="messages", **limits)
    if limit is not None and keep is None and (fewest := tokenizer.fewest_tokens(chat.text)) > limit:
        raise too_long(limit, fewest, "messages", at_least=True)
    return await asyncio.to_thread(tokenizer.encode_spelled, chat.hidden, chat.stand_ins, add_special_tokens)


async def chat_prompt(engine, chat: Rendered, body, adapter: str | None = None, media=None) -> Prompt:
    """The prompt of a rendered chat.

    Raises:
        RequestRefused: it is empty or too long, alone or with max_tokens.
    """
    most, keep = engine.max_model_len, body.truncate_prompt_tokens
    if keep is not None and (keep == 0 or keep > most):
        message = f"truncate_prompt_tokens must be an integer >= 1 or -1, got {keep}"
        if keep:
            message = f"truncate_prompt_tokens={keep} cannot be greater than max_length={most}."
        raise RequestRefused(message, "truncate_prompt_tokens")
    keep = most if keep == -1 else keep
    add = body.add_special_tokens
    token_ids = await encode_chat(engine.tokenizer, chat, add_special_tokens=add, limit=most, keep=keep)
    if keep is not None:
        token_ids = token_ids[-keep:]
    length, asked = len(token_ids), body.limit
    if length >= most:
        raise too_long(most, length, "messages")
    if asked is not None and length + asked > most:
        raise RequestRefused(
            f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is "
            f"{most} tokens and your request has {length} input tokens ({asked} > {most} - {length}).",
            "max_tokens",
        )
    check_ids(token_ids, engine.vocab_size, "messages")
    return Prompt(token_ids, chat.text, media=media, cache_salt=body.cache_salt, adapter=adapter)


def room_for(engine, prompt: Prompt, asked: int | None) -> int:
    """Tokens that may be generated: what was asked, what fits, what the model's generation_config allows."""
    room = engine.max_model_len - len(prompt.token_ids)
    cap = engine.default_sampling.get("max_new_tokens")
    return min(limit for limit in (room, asked, cap) if limit is not None)
