"""Text to ids and back, all at once or as tokens arrive.

Two kinds of tokenizer cover nearly every generating model, and for both a token's text is a fixed run of bytes:
byte-level ones (GPT-2, Llama 3, Qwen, SmolLM2, Whisper) and SentencePiece ones with byte fallback (Llama 2, Gemma,
Mistral, Phi-3). For those a table of bytes and an incremental UTF-8 decoder give the text of a token in about a
microsecond. Any other decoder is asked again for the last few tokens each time.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import tokenizers

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Classes whose add_bos_token and add_eos_token decide what an encoded text begins and ends with, not tokenizer.json.
OBEYS_ADD_BOS = re.compile(r"(Code)?Llama|Gemma|Cohere")
PROMPT_TAIL = 6  # tokens of context for the first generated token: a character is never longer


class Tokenizer:
    """A tokenizers.Tokenizer with what its tokenizer_config adds.

    Args:
        tokenizer: from tokenizer.json, or built by a converter. Its truncation and padding are switched off.
        tokenizer_config: as Hugging Face's tokenizer_config.json; may be empty.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, tokenizer_config: dict | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        self.config = tokenizer_config or {}
        self.added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self.added.items() if token.special)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.longest_piece = max(map(len, vocab), default=1)
        self.special_tokens = {role: _content(self.config[role]) for role in ROLES if self.config.get(role)}
        self.bos_token_id = self._role_id("bos_token")
        self.eos_token_id = self._role_id("eos_token")
        self._bytes = _byte_table(tokenizer, vocab, self.vocab_size)
        self._ends = self._begin_and_end()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens spelled in it become their ids, as everywhere. Lets other threads run."""
        if self._ends is None or not add_special_tokens:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        before, after = self._ends
        return [*before, *self.backend.encode(text, add_special_tokens=False).ids, *after]

    def encode_spelled(self, text: str, stand_ins, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text in which characters stand for special tokens that are to be read as plain text.

        Args:
            stand_ins: see runtime.chat.spelled.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        stretch: list[int] = []
        start = 0

        def flush(end):
            part = text[start:end]
            if stand_ins.are_in(part):
                plain = self._plain if start == 0 else self._plain_within
                ids.extend(plain.encode(stand_ins.restore(part), add_special_tokens=False).ids)
            else:
                ids.extend(stretch)

        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.special_ids:
                flush(first)
                ids.append(token_id)
                stretch, start = [], last
            else:
                stretch.append(token_id)
        flush(len(text))
        if not add_special_tokens:
            return ids
        bare, full = self.backend.encode("a", add_special_tokens=False).ids, self.encode("a")
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return [*full[:at], *ids, *full[at + len(bare) :]]

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which no token is special."""
        return _without_special(self.backend.to_str())

    @functools.cached_property
    def _plain_within(self) -> tokenizers.Tokenizer:
        """The same for what does not begin a text, and so gets no space before it."""
        text = self.backend.to_str()
        return _without_special(text.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of all ids at once; ids past the vocabulary have none."""
        if spaces_between_special_tokens or skip_special_tokens:
            return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        detokenizer = Detokenizer(self, skip_special_tokens=False, spaces_between_special_tokens=False)
        return detokenizer.push(token_ids, end="length")[0]

    def fewest_tokens(self, text: str) -> int:
        """No tokenisation of this text is shorter than this; known without tokenising."""
        return len(text) // self.longest_piece

    @functools.lru_cache(maxsize=65536)  # noqa: B019  a tokenizer lives as long as the process
    def token_text(self, token_id: int) -> str:
        """One id decoded alone, special tokens included; half a character shows as U+FFFD."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for, which need not be whole characters."""
        if self._bytes is not None and 0 <= token_id < len(self._bytes):
            return self._bytes[token_id]
        return self.token_text(token_id).encode()

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id; empty past the vocabulary."""
        return self.backend.id_to_token(token_id) or ""

    def id_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def bad_word_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Each word's token ids as it stands at the start of a text and after a space."""
        sequences = []
        for word in words:
            for spelling in (word.lstrip(), " " + word.lstrip()):
                ids = self.encode(spelling, add_special_tokens=False)
                if ids and ids not in sequences:
                    sequences.append(ids)
        return sequences

    @functools.cached_property
    def texts(self) -> list[str | None] | None:
        """Each token's text where it is whole characters, None where it is not; None without a byte table."""
        return None if self._bytes is None else [_whole(piece) for piece in self._bytes]

    @functools.cached_property
    def shown(self) -> tuple[list[str | None], list[bytes]] | None:
        """(texts, bytes) with special tokens made empty; None without a byte table."""
        if self._bytes is None or self.texts is None:
            return None
        texts, pieces = list(self.texts), list(self._bytes)
        for i in self.special_ids:
            texts[i], pieces[i] = "", b""
        return texts, pieces

    @property
    def all_shown(self) -> tuple[list[str | None], list[bytes]] | None:
        """(texts, bytes) with special tokens spelled out; None without a byte table."""
        return None if self._bytes is None or self.texts is None else (self.texts, self._bytes)

    def _role_id(self, role):
        content = self.special_tokens.get(role)
        return None if content is None else self.backend.token_to_id(content)

    def _begin_and_end(self) -> tuple[list[int], list[int]] | None:
        """([bos] or [], [eos] or []) where tokenizer_config decides; None: tokenizer.json decides."""
        explicit = "add_bos_token" in self.config or "add_eos_token" in self.config
        if not explicit or not OBEYS_ADD_BOS.match(self.config.get("tokenizer_class") or ""):
            return None
        before = [self.bos_token_id] if self.config.get("add_bos_token", True) else []
        after = [self.eos_token_id] if self.config.get("add_eos_token", False) else []
        return [i for i in before if i is not None], [i for i in after if i is not None]


class Detokenizer:
    """One choice's tokens to text, as they come: whole characters only, and no part of a stop string.

    What may still become a character or a stop string is held back until it is decided. The pieces joined are the text
    of one decode of all tokens, less a character cut at its very end.

    Args:
        stop: texts that end the answer. The one that ends first wins; of two that end together, the longer.
        include_stop_str_in_output: keep the stop string, or the text of a stop token.
        min_tokens: a stop string counts only if it ends in a later token than this many.
        prompt_token_ids: what came before. Only unusual decoders look at it.
    """

    __slots__ = ("num_tokens", "_decoder", "_stop", "_include", "_min_tokens", "_held")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ):
        tables = tokenizer.shown if skip_special_tokens else tokenizer.all_shown
        if tables is not None:
            self._decoder = _TableDecoder(*tables)
        else:
            self._decoder = _WindowDecoder(
                tokenizer, skip_special_tokens, spaces_between_special_tokens, prompt_token_ids[-PROMPT_TAIL:]
            )
        self.num_tokens = 0  # taken so far; fewer than were pushed when a stop string ended it early
        self._stop = _stop_strings(tuple(stop)) if stop else None
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._held = ""

    def push(self, token_ids: Sequence[int], end: Literal["token", "length"] | None = None) -> tuple[str, str | None]:
        """Takes new tokens and gives the text that is now certain.

        Args:
            token_ids: since the last call. When a stop string ends in one, those after it are not taken: num_tokens
                says how many were.
            end: no more come. "token": the last id is EOS or a stop token, whose text is not shown unless asked for.
                "length": they just end.

        Returns:
            The new text, and the stop string that ended it or None.
        """
        feed = self._decoder.feed
        hidden = len(token_ids) - 1 if end == "token" and not self._include else len(token_ids)
        if self._stop is None:
            self.num_tokens += len(token_ids)
            if len(token_ids) == 1 == hidden:
                return feed(token_ids[0]), None
            return "".join([feed(i) for i in token_ids[:hidden]]), None
        parts = []
        for token_id in token_ids[:hidden]:
            self.num_tokens += 1
            text, stop = self._certain(feed(token_id))
            parts.append(text)
            if stop is not None:
                return "".join(parts), stop
        self.num_tokens += len(token_ids) - hidden
        if end:
            parts.append(self._held)
            self._held = ""
        return "".join(parts), None

    def _certain(self, new):
        """(what of the held and the new text is certain, the stop string found); holds back the rest."""
        text = self._held + new
        if self._stop.firsts.isdisjoint(text):
            return text, None
        if self.num_tokens > self._min_tokens and (found := self._stop.find(text, len(self._held))):
            start, stop = found
            self._held = ""
            return text[: start + len(stop)] if self._include else text[:start], stop
        keep = len(text) - self._stop.undecided(text)
        self._held = text[keep:]
        return text[:keep], None


class _StopStrings:
    """What many streams with the same stop strings share."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.firsts = frozenset(text[0] for text in stop)
        self.longest = max(map(len, stop))

    def find(self, text: str, seen: int) -> tuple[int, str] | None:
        """(start, stop string) of the first to end past the first `seen` characters; None when there is none."""
        best = None
        for stop in self.stop:
            start = text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return best and best[1:]

    def undecided(self, text: str) -> int:
        """How many characters at the end could begin a stop string."""
        for size in range(min(self.longest - 1, len(text)), 0, -1):
            if text[-size] in self.firsts:
                tail = text[-size:]
                if any(stop.startswith(tail) for stop in self.stop if len(stop) > size):
                    return size
        return 0


_stop_strings = functools.lru_cache(maxsize=256)(_StopStrings)


class _TableDecoder:
    """Bytes from a table, characters when they are whole."""

    __slots__ = ("_texts", "_bytes", "_pending")

    def __init__(self, texts, pieces):
        self._texts, self._bytes, self._pending = texts, pieces, b""

    def feed(self, token_id):
        try:
            if not self._pending and (text := self._texts[token_id]) is not None:
                return text
            data = self._pending + self._bytes[token_id]
        except IndexError:  # logits may be wider than the tokenizer; such ids have no text
            return ""
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text


class _WindowDecoder:
    """Decodes the tokens since the last but one emission, with and without the new ones, and gives the difference."""

    __slots__ = ("_tokenizer", "_skip", "_spaces", "_before", "_new", "_was_special")

    def __init__(self, tokenizer, skip_special_tokens, spaces_between_special_tokens, prompt_tail):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._before, self._new = list(prompt_tail), []
        self._was_special = False

    def feed(self, token_id):
        is_special = token_id in self._tokenizer.special_ids
        if is_special and self._skip:
            return ""
        was_special, self._was_special = self._was_special, is_special
        if is_special and was_special and not self._spaces:
            self._before, self._new = [token_id], []
            return self._tokenizer.added[token_id].content
        self._new.append(token_id)
        decode = self._tokenizer.backend.decode
        old = decode(self._before, skip_special_tokens=self._skip)
        text = decode(self._before + self._new, skip_special_tokens=self._skip)
        if text.endswith("\ufffd") and len(self._new) < PROMPT_TAIL:
            return ""
        self._before, self._new = self._new, []
        return text[len(old) :]


def _without_special(text):
    backend = tokenizers.Tokenizer.from_str(text)
    backend.encode_special_tokens = True  # that is, as text
    return backend


def _byte_table(tokenizer, vocab, size):
    """Each id's bytes, or None when the decoder is not one whose tokens have bytes of their own."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    if decoder.get("type") == "ByteLevel":
        spell = _byte_level_spelling()
    elif _is_sentencepiece(decoder):
        spell = _sentencepiece_bytes
    else:
        return None
    table = [b""] * size
    for piece, token_id in vocab.items():
        table[token_id] = spell(piece)
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        table[token_id] = spell(token.content)
    return table


def _byte_level_spelling():
    """GPT-2's alphabet: each byte is one printable character. A piece with any other character stands for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def spell(piece):
        try:
            return bytes([byte_of[c] for c in piece])
        except KeyError:
            return piece.encode()

    return spell


def _sentencepiece_bytes(piece):
    if len(piece) == 6 and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _is_sentencepiece(decoder):
    """Replace ▁ by a space, bytes, join; the strip of a text's first space, if any, does not concern a continuation."""
    kinds = [part["type"] for part in decoder.get("decoders", ())]
    return kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"])


def _whole(piece):
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _content(token):
    return token["content"] if isinstance(token, dict) else str(token)
