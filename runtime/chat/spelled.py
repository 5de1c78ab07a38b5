"""Special tokens that people spell in their messages stay text; only those that the template writes are special.

Before a template is rendered, each special token in a message, a tool or another value of the request gives way to one
private character. The rendered text is then tokenised with those characters in it, and a stretch between two special
tokens of the template that holds any is tokenised once more, as what was really written and with no token special.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from runtime.errors import RequestRefused
from runtime.tokenizer import Tokenizer

PRIVATE_PLANES = (0xF0000, 0x100000)  # 65,534 characters each that Unicode leaves to whoever wants them
CANNOT_HIDE = "the messages spell special tokens and use private characters of Unicode; leave one of them out"


class StandIns:
    """One private character for each special token.

    Args:
        contents: the special tokens, the longest first.
        base: the first of the private characters.
    """

    def __init__(self, contents: list[str], base: int):
        self._of = {content: chr(base + i) for i, content in enumerate(contents)}
        self._contents = {char: content for content, char in self._of.items()}
        self._chars = re.compile(f"[{chr(base)}-{chr(base + len(contents) - 1)}]")

    def are_in(self, text: str) -> bool:
        return self._chars.search(text) is not None

    def put(self, match: re.Match) -> str:
        return self._of[match[0]]

    def unescape(self, text: str) -> str:
        """A rendered text whose template escaped stand-ins, as JSON or as Python does, with them as they are."""
        for char in self._contents if "\\u" in text.lower() else ():
            text = text.replace(json.dumps(char)[1:-1], char).replace(repr(char)[1:-1], char)
        return text

    def restore(self, text: str) -> str:
        """The text as it was written."""
        return self._chars.sub(lambda match: self._contents[match[0]], text)


class SpelledTokens:
    """Finds and hides the special tokens of a tokenizer in values that come from outside.

    Args:
        tokenizer: None for a model without one, where nothing is special.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        added = tokenizer.added.values() if tokenizer is not None else ()
        contents = sorted({token.content for token in added if token.special and token.content}, key=len, reverse=True)
        self._firsts = sorted({content[0] for content in contents})
        self._pattern = re.compile(_longest_of(contents) if contents else r"(?!)")
        self._choices = [StandIns(contents, base) for base in PRIVATE_PLANES] if contents else []

    def hide(self, value: Any) -> tuple[Any, StandIns | None]:
        """A JSON value with stand-ins in its strings, and what they stand for.

        Where no special token is spelled, the value comes back as it is, with None.

        Raises:
            RequestRefused: the value uses the private characters itself.
        """
        if not _any(value, self._is_in):
            return value, None
        for stand_ins in self._choices:
            if not _any(value, stand_ins.are_in):
                return _each(value, functools.partial(self._pattern.sub, stand_ins.put)), stand_ins
        raise RequestRefused(CANNOT_HIDE, "messages")

    def _is_in(self, text: str) -> bool:
        return any(first in text for first in self._firsts) and self._pattern.search(text) is not None


def _longest_of(words: list[str]) -> str:
    """A pattern of the longest of these words that stands somewhere; shared beginnings are read once."""
    tails: dict[str, list[str]] = {}
    for word in words:
        if word:
            tails.setdefault(word[0], []).append(word[1:])
    forms = [re.escape(first) + (_longest_of(rest) if any(rest) else "") for first, rest in tails.items()]
    pattern = forms[0] if len(forms) == 1 else f"(?:{'|'.join(forms)})"
    return f"(?:{pattern})?" if "" in words else pattern


def _any(value: Any, claim: Callable[[str], bool]) -> bool:
    """Whether the claim holds of any string in a JSON value, keys included."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if claim(item):
                return True
        elif isinstance(item, dict):
            pending += item
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return False


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value with each of its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_each(key, change): _each(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each(item, change) for item in value]
    return value
