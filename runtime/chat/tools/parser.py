"""The frame of every tool parser: events out, and what happens to text that is not a call after all."""

import secrets
import string
from collections.abc import Callable, Sequence

from runtime.chat.scanner import Malformed, Run, Scanner
from runtime.chat.tools.events import Arguments, CallBroken, CallStarted, Content, Event, merged

ALPHANUMERIC = string.ascii_letters + string.digits
NewId = Callable[[str, int], str]


def random_id(name: str, index: int) -> str:
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


def mistral_id(name: str, index: int) -> str:
    """Mistral's chat templates refuse ids of any other form."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))


def kimi_id(num_earlier: int = 0) -> NewId:
    """Kimi's ids count over the whole conversation; `num_earlier` calls came before this reply."""
    return lambda name, index: f"functions.{name}:{num_earlier + index}"


class ToolParser:
    """Splits one reply into content and calls. A format subclasses this and writes `read`.

    Args:
        tools: the request's tools, as sent: [{"type": "function", "function": {"name", "parameters"}}]. Formats that
            write values as bare text need the schemas to tell "1" from 1.
        new_id: (name, index) -> the id of a call; None for the format's own.

    Attributes:
        is_broken: whether something that looked like a call was none, or was cut off.
    """

    needs_special_tokens = False  # whether skip_special_tokens must be false for the markers to be seen
    new_id: NewId = staticmethod(random_id)

    def __init__(self, tools: Sequence[dict] = (), new_id: NewId | None = None):
        self.scanner = Scanner()
        self.num_calls = 0
        self.is_broken = False
        self._schemas = {}
        for tool in tools or ():
            function = tool.get("function") or {}
            self._schemas[function.get("name")] = function.get("parameters") or {}
        if new_id is not None:
            self.new_id = new_id
        self._events: list[Event] = []
        self._blanks: list[str] = []  # whitespace that is content only if text follows it
        self._is_in_text = False
        self._is_call_open = False
        self._run = Run(self.scanner, self.read())

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the model's text; gives what is now certain."""
        self._run.feed(text)
        return self._drained()

    def finish(self) -> list[Event]:
        """Takes the end of the text; gives what is left."""
        self._run.finish()
        if self._blanks and not self.num_calls:
            self._events.append(Content("".join(self._blanks)))
        return self._drained()

    def read(self):
        """The format: a generator over self.scanner that calls the methods below."""
        raise NotImplementedError

    def content(self, text: str) -> None:
        """Text outside calls. Whitespace next to a call, with nothing else, is no content."""
        if not self._is_in_text:
            if not text or text.isspace():
                self._blanks.append(text)
                return
            text = "".join([*self._blanks, text])
            self._blanks = []
            self._is_in_text = True
        self._events.append(Content(text))

    def start(self, name: str, id: str | None = None) -> None:
        """A call begins; from here on its arguments are shown as they come."""
        if not name:
            raise Malformed
        self._blanks = []
        self._is_in_text = False
        self._is_call_open = True
        self._events.append(CallStarted(self.num_calls, id or self.new_id(name, self.num_calls), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the open call's arguments."""
        self._events.append(Arguments(self.num_calls - 1, text))

    def end(self) -> None:
        """The open call is whole; nothing that follows can break it."""
        self._is_call_open = False
        self.scanner.mark()

    def attempt(self, steps, already: str = ""):
        """Reads what looks like a call, or several. If it is malformed, its text is content. Gives whether it was well.

        Args:
            steps: a generator that reads it.
            already: text that was read and belongs to it, such as the marker before it.
        """
        self.scanner.mark(already)
        try:
            yield from steps
        except Malformed:
            self.is_broken = True
            text = self.scanner.since_mark()
            if self._is_call_open:
                self._is_call_open = False
                self._events.append(CallBroken(self.num_calls - 1, text))
            else:
                self.content(text)
            return False
        self.scanner.since_mark()
        return True

    def schema(self, name: str) -> dict:
        """The JSON schema of a tool's arguments; {} when it has none."""
        schema = self._schemas.get(name)
        return schema if isinstance(schema, dict) else {}

    def _drained(self) -> list[Event]:
        events, self._events = merged(self._events), []
        return events
