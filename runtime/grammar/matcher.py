"""Which tokens may come next: one Matcher a choice, over a Vocabulary shared by all.

Dimension key
    S  rows of the step     V  vocabulary size (width of the logits)     W  32-bit words of a mask, ceil(V / 32)
"""

import functools
from collections.abc import Sequence

import llguidance
import numpy as np
import orjson

from runtime.errors import ConfigError
from runtime.grammar.limits import parser_limits

# Lexer states are shared by all matchers of one constraint and only ever grow; past the limit every one of them fails.
# A fresh parser then starts from none.
SHARED_STATE_IS_FULL = "too many states"

SPACES = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


class Vocabulary:
    """The tokens of a model, as bytes, in the form the parser library walks.

    Args:
        tokenizer: a tokenizers.Tokenizer, or its JSON text.
        eos_token_ids: every id that ends a reply.
        vocab_size: the width of the logits, which may be more or less than the tokenizer has; None for the same.

    Raises:
        ConfigError: the library cannot read this tokenizer.
    """

    def __init__(self, tokenizer, eos_token_ids: Sequence[int] = (), vocab_size: int | None = None):
        self.json = _plain_json(tokenizer)
        self.eos_token_ids = list(eos_token_ids)
        content = orjson.loads(self.json)
        self.special_tokens = frozenset(t["content"] for t in content.get("added_tokens") or () if t.get("special"))
        num_tokens = _num_tokens(content)
        self.vocab_size = vocab_size or num_tokens
        self.num_words = (self.vocab_size + 31) // 32
        self.num_parser_tokens = max(num_tokens, self.vocab_size)

    @functools.cached_property
    def parser_tokens(self) -> llguidance.LLTokenizer:
        """Made when first asked for: it takes 0.2 s for 32,000 tokens."""
        try:
            return llguidance.LLTokenizer(
                self.json, n_vocab=self.num_parser_tokens, eos_token=self.eos_token_ids or None
            )
        except ValueError as error:
            raise ConfigError(f"structured outputs cannot use this tokenizer: {error}") from error

    @functools.cached_property
    def last_word(self) -> np.uint32:
        """The bits of the last word that stand for tokens."""
        return np.uint32(0xFFFFFFFF >> (-self.vocab_size % 32))


def _plain_json(tokenizer) -> str:
    """The tokenizer's JSON without padding and truncation, which have no part in what a token is."""
    content = orjson.loads(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    content["padding"] = content["truncation"] = None
    if (content.get("decoder") or {}).get("type") == "Metaspace":
        content["decoder"] = SPACES  # the same, in the words that the parser library knows
    _fill_gaps(content)
    return orjson.dumps(content).decode()


def _fill_gaps(content) -> None:
    """Gives ids that no token has a special one: the library stops at as many ids as there are tokens."""
    vocab = content["model"].get("vocab")
    if not isinstance(vocab, dict):
        return
    added = content.setdefault("added_tokens", [])
    for i in sorted(set(range(_num_tokens(content))) - set(vocab.values()) - {t["id"] for t in added}):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        vocab[f"<|no token {i}|>"] = i
        added.append({"id": i, "content": f"<|no token {i}|>", "special": True} | flags)


def _num_tokens(content) -> int:
    vocab = content["model"].get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    return 1 + max([*ids, *(t["id"] for t in content.get("added_tokens") or ())])


class Matcher:
    """One choice's place in its constraint.

    Not thread-safe; made by Compiled.matcher(). A matcher that met an error stays there: `error` says which, fill_mask
    allows everything, accept says False, and the caller ends the request.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: str, parser: llguidance.LLMatcher, starts_after: str | None):
        self._vocabulary = vocabulary
        self._grammar = grammar
        self._parser = parser
        self._tokens: list[int] = []  # what the parser has taken
        self._end_tokens = 0  # ends taken after the parser had stopped; it does not count them
        self._gate = _Gate(vocabulary, starts_after) if starts_after else None
        self.error: str | None = None

    @property
    def is_active(self) -> bool:
        """False while anything may be written: the text that `starts_after` names has not come yet."""
        return self._gate is None or self._gate.is_open

    @property
    def is_finished(self) -> bool:
        """Nothing but an end token may follow: the text is whole, and could not be longer."""
        return self.is_active and self.error is None and self._parser.is_stopped()

    @property
    def may_end(self) -> bool:
        """The text matches as it stands."""
        return self.is_active and self.error is None and self._parser.is_accepting()

    def is_end(self, token_id: int) -> bool:
        """Whether this token ends a reply and is no part of its text."""
        return token_id in self._vocabulary.eos_token_ids

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """Writes the tokens that may come next: bit i of word w is token 32 * w + i.

        Args:
            mask_W: contiguous uint32[ceil(V / 32)]; overwritten whole.
        """
        fill_masks([(0, self)], mask_W[None])

    def accept(self, token_id: int) -> bool:
        """Takes the token that was sampled. False, and an `error`, when the constraint does not allow it."""
        if self.error is not None:
            return False
        if not self.is_active:
            self._gate.take(token_id)
            return True
        if self._parser.is_stopped():
            if token_id not in self._vocabulary.parser_tokens.eos_tokens:
                self.error = "a token came after the constraint was met"
                return False
            self._end_tokens += 1
            return True
        if not self._parser.consume_token(token_id):
            if not self._is_renewed() or not self._parser.consume_token(token_id):
                self.error = _first_line(self._parser.get_error()) or "the token breaks the constraint"
                return False
        self._tokens.append(token_id)
        return True

    def rollback(self, num_tokens: int) -> None:
        """Takes back the last tokens that were accepted.

        Raises:
            ValueError: more than were taken.
        """
        ends = min(num_tokens, self._end_tokens)
        taken = min(num_tokens - ends, len(self._tokens))
        rest = num_tokens - ends - taken
        if rest and (self._gate is None or rest > self._gate.num_tokens):
            raise ValueError(f"cannot take back {num_tokens} tokens; fewer have come")
        self._end_tokens -= ends
        if taken:
            self._parser.rollback(taken)
            del self._tokens[-taken:]
        if rest:
            self._gate.take_back(rest)

    def copy(self) -> "Matcher":
        """Another matcher at the same place; microseconds."""
        twin = Matcher(self._vocabulary, self._grammar, self._parser.deep_copy(), None)
        twin._tokens, twin._end_tokens, twin.error = list(self._tokens), self._end_tokens, self.error
        twin._gate = self._gate and self._gate.copy()
        return twin

    def _is_renewed(self) -> bool:
        """Puts a fresh parser in place of one whose shared states ran out."""
        if SHARED_STATE_IS_FULL not in self._parser.get_error():
            return False
        parser = new_parser(self._vocabulary, self._grammar)
        if parser.is_error() or parser.try_consume_tokens(self._tokens) != len(self._tokens):
            return False
        self._parser = parser
        return True


class _Gate:
    """Waits for a text among the tokens; what its last token holds beyond the text is not constrained."""

    def __init__(self, vocabulary, text: str):
        self._vocabulary = vocabulary
        self._mark = text.encode()
        self._tokens: list[int] = []
        self._tail = b""
        self.is_open = False

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def take(self, token_id: int) -> None:
        self._tokens.append(token_id)
        seen = self._tail + self._vocabulary.parser_tokens.decode_bytes([token_id])
        self.is_open = self._mark in seen
        self._tail = seen[max(0, len(seen) - len(self._mark) + 1) :]

    def take_back(self, num_tokens: int) -> None:
        del self._tokens[len(self._tokens) - num_tokens :]
        self.is_open = False
        # Each token has a byte at least, special ones apart; enough of them hold the tail.
        last = self._tokens[-2 * len(self._mark) :]
        seen = self._vocabulary.parser_tokens.decode_bytes(last)
        self._tail = seen[max(0, len(seen) - len(self._mark) + 1) :]

    def copy(self) -> "_Gate":
        twin = _Gate(self._vocabulary, "")
        twin._mark, twin._tokens, twin._tail, twin.is_open = self._mark, list(self._tokens), self._tail, self.is_open
        return twin


def new_parser(vocabulary: Vocabulary, grammar: str) -> llguidance.LLMatcher:
    """Compiles the library's text; what is wrong with it is in the parser's get_error()."""
    return llguidance.LLMatcher(vocabulary.parser_tokens, grammar, log_level=0, limits=parser_limits())


@functools.cache
def _executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor()


def fill_masks(rows: Sequence[tuple[int, Matcher]], mask_SW: np.ndarray) -> dict[int, str]:
    """Writes the masks of many rows, in threads when there are several.

    Args:
        rows: (row of mask_SW, its matcher); other rows of mask_SW are left alone.
        mask_SW: contiguous uint32[S, ceil(V / 32)].

    Returns:
        row -> message, for rows whose constraint can go no further. Their masks allow everything, so that no row of
        logits is ever all minus infinity; the caller ends those requests.
    """
    failed = {}
    active = []
    for row, matcher in rows:
        if matcher.error is None and matcher.is_active:
            active.append((row, matcher))
        else:
            _allow_all(matcher, mask_SW[row])
            if matcher.error is not None:
                failed[row] = matcher.error
    if active:
        _compute(active, mask_SW)
    for row, matcher in active:
        if matcher._parser.is_error() and matcher._is_renewed():
            _compute([(row, matcher)], mask_SW)
        if matcher._parser.is_error():
            matcher.error = _first_line(matcher._parser.get_error())
        elif not mask_SW[row].any():
            matcher.error = "no token of the vocabulary can go on from here"
        if matcher.error is not None:
            failed[row] = matcher.error
            _allow_all(matcher, mask_SW[row])
    return failed


def _allow_all(matcher, mask_W):
    mask_W[:] = 0xFFFFFFFF
    mask_W[-1] = matcher._vocabulary.last_word


def _compute(rows, mask_SW):
    vocabulary = rows[0][1]._vocabulary
    if not mask_SW.flags.c_contiguous or mask_SW.dtype != np.uint32 or mask_SW.shape[1] != vocabulary.num_words:
        raise ValueError(f"the mask must be contiguous uint32[S, {vocabulary.num_words}], got {mask_SW.shape}")
    num_words = (vocabulary.num_parser_tokens + 31) // 32
    fits = num_words == vocabulary.num_words
    target = mask_SW if fits else np.empty((len(rows), num_words), np.uint32)
    places = [row if fits else i for i, (row, _) in enumerate(rows)]
    if len(rows) == 1:
        at = target[places[0]]
        rows[0][1]._parser.unsafe_compute_mask_ptr(at.ctypes.data, at.nbytes)
    else:
        jobs = [(matcher._parser, place) for place, (_, matcher) in zip(places, rows, strict=True)]
        _executor().unsafe_compute_mask_ptr(jobs, target.ctypes.data, num_words * 4, len(target))
    for place, (row, _) in zip(places, rows, strict=True):
        if not fits:
            mask_SW[row] = target[place, : vocabulary.num_words]
        mask_SW[row, -1] &= vocabulary.last_word


def _first_line(message: str) -> str:
    return message.partition("\n")[0]
