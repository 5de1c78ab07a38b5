"""Tool calls in a model's text: one small file a format.

A parser takes the text of one choice, in pieces of any size, and gives events as soon as they are certain:

    Content(text)                 text for the reader
    CallStarted(index, id, name)  a call; the index counts from 0
    Arguments(index, text)        more of its arguments; a call's pieces together are JSON
    CallBroken(index, text)       a call that had started was malformed or cut off; `text` is what the model wrote

    parser = create("hermes", tools)
    for delta in deltas:
        for event in parser.feed(delta): ...
    for event in parser.finish(): ...

What is said depends on the text and never on how it was cut, so a whole reply is the sum of the same events:

    reply = parse_whole(create("hermes", tools), text)     # Reply(content, calls, is_broken)

Text that is not a call after all is content. Nothing is evaluated, and the time is linear in the text.

`choice_parser` picks the parser for a request's tool_choice; `check_tools` and `reply_schema` see to the tools
themselves. Where `parser.needs_special_tokens`, the text must be decoded with skip_special_tokens=False.
"""

from collections.abc import Sequence

from runtime.chat.tools.deepseek_v3 import DeepSeekV3
from runtime.chat.tools.deepseek_v31 import DeepSeekV31
from runtime.chat.tools.definitions import check_number, check_tools, reply_schema
from runtime.chat.tools.ernie45 import Ernie45
from runtime.chat.tools.events import Arguments, Call, CallBroken, CallStarted, Content, Event, Reply, collect
from runtime.chat.tools.forced import NamedCall, RequiredCalls
from runtime.chat.tools.glm45 import Glm45
from runtime.chat.tools.granite import Granite
from runtime.chat.tools.granite_20b_fc import Granite20bFc
from runtime.chat.tools.harmony import Harmony
from runtime.chat.tools.hermes import Hermes
from runtime.chat.tools.hunyuan_a13b import HunyuanA13b
from runtime.chat.tools.internlm import InternLm
from runtime.chat.tools.jamba import Jamba
from runtime.chat.tools.kimi_k2 import KimiK2
from runtime.chat.tools.llama3_json import Llama3Json
from runtime.chat.tools.longcat import LongCat
from runtime.chat.tools.minimax import MiniMax
from runtime.chat.tools.mistral import Mistral
from runtime.chat.tools.parser import NewId, ToolParser, kimi_id, mistral_id, random_id
from runtime.chat.tools.phi4_mini import Phi4Mini
from runtime.chat.tools.pythonic import Llama4Pythonic, Olmo3, Pythonic
from runtime.chat.tools.qwen3_coder import Qwen3Coder, SeedOss
from runtime.chat.tools.step3 import Step3
from runtime.chat.tools.xlam import XLam
from runtime.errors import ConfigError

PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "ernie45": Ernie45,
    "glm45": Glm45,
    "granite": Granite,
    "granite-20b-fc": Granite20bFc,
    "hermes": Hermes,
    "hunyuan_a13b": HunyuanA13b,
    "internlm": InternLm,
    "jamba": Jamba,
    "kimi_k2": KimiK2,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "llama4_pythonic": Llama4Pythonic,
    "longcat": LongCat,
    "minimax": MiniMax,
    "mistral": Mistral,
    "olmo3": Olmo3,
    "openai": Harmony,
    "phi4_mini_json": Phi4Mini,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
    "qwen3_xml": Qwen3Coder,
    "seed_oss": SeedOss,
    "step3": Step3,
    "xlam": XLam,
}


def create(name: str, tools: Sequence[dict] = (), new_id: NewId | None = None) -> ToolParser:
    """A parser for one choice.

    Raises:
        ConfigError: no format has this name.
    """
    if name not in PARSERS:
        raise ConfigError(f"tool-call parser {name!r} is not known; known: {', '.join(sorted(PARSERS))}")
    return PARSERS[name](tools, new_id)


def choice_parser(
    tool_choice, tools: Sequence[dict] = (), name: str | None = None, new_id: NewId | None = None
) -> ToolParser | None:
    """The parser that a request's tool_choice asks for, for one choice; None when the text is not to be parsed.

    Args:
        tool_choice: "none", "auto", None, "required" or {"type": "function", "function": {"name"}}.
        name: the format of the served model; None when the server was not told one.
    """
    if tool_choice == "none" or not tools:
        return None
    if isinstance(tool_choice, dict):
        return NamedCall(tool_choice["function"]["name"], new_id)
    if tool_choice == "required":
        return RequiredCalls(tools, new_id)
    return create(name, tools, new_id) if name is not None else None


def parse_whole(parser: ToolParser, text: str) -> Reply:
    """What a text holds, all at once."""
    return collect([*parser.feed(text), *parser.finish()])


__all__ = [
    "PARSERS",
    "Arguments",
    "Call",
    "CallBroken",
    "CallStarted",
    "Content",
    "Event",
    "NamedCall",
    "Reply",
    "RequiredCalls",
    "ToolParser",
    "check_number",
    "check_tools",
    "choice_parser",
    "collect",
    "create",
    "kimi_id",
    "mistral_id",
    "parse_whole",
    "random_id",
    "reply_schema",
]
