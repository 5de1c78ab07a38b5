"""Logprobs in the three shapes that answers have."""

from collections.abc import Iterable, Sequence

from runtime.request import TokenLogprobs
from runtime.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no minus infinity


def ranked(entry: TokenLogprobs) -> list[tuple[int, float, int | None]]:
    """The actual token first, then the likeliest others."""
    first = (entry.token_id, entry.logprob, entry.rank)
    return [first, *(other for other in entry.top if other[0] != entry.token_id)]


class TokenNames:
    """How token ids are spelled in one answer: each decoded alone, or as `token_id:N`."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self.tokenizer, self.as_ids = tokenizer, as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        return list(self.text(token_id).encode() if self.as_ids else self.tokenizer.token_bytes(token_id))


def completion_logprobs(
    entries: Iterable[TokenLogprobs | None], token_ids: Sequence[int], count: int, names: TokenNames, offset: int
) -> dict:
    """OpenAI's older shape: parallel lists.

    Args:
        entries: one a token; None where there is none, as for the first token of a prompt.
        token_ids: the tokens, which name those without an entry.
        count: how many of the likeliest are shown beside the actual one.
        offset: characters before the first token.
    """
    result: dict = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for entry, token_id in zip(entries, token_ids, strict=True):
        text = names.text(token_id)
        result["text_offset"].append(offset)
        offset += len(text)
        result["tokens"].append(text)
        result["token_logprobs"].append(None if entry is None else max(entry.logprob, LOWEST))
        top: dict[str, float] | None = None
        if entry is not None:
            top = {}
            for other_id, logprob, _ in ranked(entry)[: count + 1]:
                other = names.text(other_id)  # pieces of characters read alike; the likeliest stands for them
                top[other] = max(logprob, top.get(other, LOWEST))
        result["top_logprobs"].append(top)
    return result


def chat_logprobs(entries: Iterable[TokenLogprobs], count: int, names: TokenNames) -> dict:
    """OpenAI's newer shape: an object a token.

    Args:
        count: entries in top_logprobs, the actual token being the first of them; -1 is all there are.
    """
    content = []
    for entry in entries:
        item = _chat_token(entry.token_id, entry.logprob, names)
        shown = ranked(entry)[: None if count < 0 else count]
        content.append(item | {"top_logprobs": [_chat_token(i, logprob, names) for i, logprob, _ in shown]})
    return {"content": content}


def _chat_token(token_id, logprob, names):
    return {"token": names.text(token_id), "logprob": max(logprob, LOWEST), "bytes": names.bytes(token_id)}


def prompt_logprobs(entries: Iterable[TokenLogprobs | None], tokenizer: Tokenizer) -> list[dict | None]:
    """An object a prompt token, by token id; the first is null, for nothing comes before it."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": max(logprob, LOWEST),
                "rank": rank,
                "decoded_token": tokenizer.token_text(token_id),
            }
            for token_id, logprob, rank in ranked(entry)
        }
        for entry in entries
    ]
