"""Replies that a tool choice has constrained: the whole text is one call's arguments, or a list of calls."""

from runtime.chat.scanner import Malformed, ignore, whole
from runtime.chat.tools.json_calls import JsonCalls
from runtime.chat.tools.parser import NewId, ToolParser


class NamedCall(ToolParser):
    """tool_choice names a function: the text as it stands is its arguments, JSON or not."""

    def __init__(self, name: str, new_id: NewId | None = None):
        self._name = name
        super().__init__((), new_id)

    def read(self):
        if (yield from self.scanner.peek()):
            self.start(self._name)
            self.scanner.mark()
            yield from self.scanner.rest(self.arguments)
            self.is_broken = not _is_json(self.scanner.since_mark())
            self.end()


class RequiredCalls(JsonCalls):
    """tool_choice "required": a JSON list of {"name", "parameters"}."""

    def content(self, text: str) -> None:
        """There is none: half a list is no text for people."""

    def read(self):
        yield from self.scanner.space()
        yield from self.attempt(self.call_list())
        yield from self.scanner.rest(self.content)


def _is_json(text: str) -> bool:
    try:
        whole(text.strip(), lambda scanner: scanner.json_value(ignore))
    except Malformed:
        return False
    return True
