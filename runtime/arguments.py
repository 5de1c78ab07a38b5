"""Command-line words -> checked values. The table of flags itself is flags.py.

Spelling follows `vllm serve`: dashes and underscores are the same, a switch has a --no- form, a JSON
option takes dotted keys (`--hf-overrides.rope_theta 1e6`), sizes may end in k, K, m, M, g, G, and
`--config FILE.yaml` holds options that the command line overrides. A name that is not in the table is an
error that suggests the nearest one.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError

SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
KINDS = ("text", "int", "size", "float", "switch", "json", "list", "words", "each")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option, and what becomes of it: exactly one of `to`, `unused` and `refused` is set.

    Attributes:
        kind: text, int, size (an int that may be written 4k), float, switch, json (an object),
            list (a JSON list), words (one or more, up to the next option), or each (a word each time it is given).
        to: "engine.max_model_len": whose field the value becomes. Such a flag works.
        unused: why it is accepted and does nothing; said once at start-up.
        refused: why it cannot be had, and what to do instead.
        harmless: values of an unused or refused flag that ask for nothing beyond what happens anyway.
    """

    name: str
    kind: str
    help: str
    to: str = ""
    unused: str = ""
    refused: str = ""
    harmless: tuple = ()
    choices: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return "works" if self.to else "unused" if self.unused else "refused"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What was asked: {section: {field: value}}, only what was given, and what to tell the user about it."""

    sections: Mapping[str, dict[str, Any]]
    notes: tuple[str, ...]

    def __getitem__(self, section: str) -> dict[str, Any]:
        return self.sections.get(section, {})


def parse(words: Sequence[str], flags: Iterable[Flag], positional: str = "model") -> Arguments:
    """Reads the command line, and the file it names with --config.

    Args:
        words: without the program's name.
        flags: the table.
        positional: the flag that a bare first word stands for.

    Raises:
        ConfigError: an unknown name, a value of the wrong kind, a flag that cannot be had here.
    """
    table = {flag.name: flag for flag in flags}
    asked = _read(words, table, positional)
    if path := asked.pop("config", None):
        asked = _merge(_read(_words_of(Path(path), table), table, positional, source=str(path)), asked)
    sections, notes = {}, []
    for name, value in asked.items():
        flag = table[name]
        if flag.choices and value not in flag.choices:
            raise ConfigError(f"--{name} {value!r} is not known; choose one of {', '.join(flag.choices)}")
        if flag.to:
            section, field = flag.to.split(".", 1)
            sections.setdefault(section, {})[field] = value
        elif value in flag.harmless:
            continue
        elif flag.refused:
            raise ConfigError(f"{_spelled(flag, value)} cannot be had here: {flag.refused}")
        else:
            notes.append(f"{_spelled(flag, value)} changes nothing here: {flag.unused}")
    return Arguments(sections, tuple(notes))


def size(text: str) -> int:
    """'4096', '4k' (4000), '4K' (4096) or '25.6k'; a power of two takes whole numbers only."""
    match = re.fullmatch(r"(-?\d+)(\.\d+)?([kKmMgGtT]?)", text.strip().replace("_", ""))
    if not match or (match[2] and not match[3]):
        raise ValueError("a whole number, as 4096, 4k (4000) or 4K (4096)")
    if match[2] and match[3].isupper():
        raise ValueError(f"a whole number before {match[3]}, which counts in powers of two; or {match[3].lower()}")
    unit = SIZES.get(match[3], 1)
    return round(float(match[1] + match[2]) * unit) if match[2] else int(match[1]) * unit


def _read(words: Sequence[str], table: Mapping[str, Flag], positional: str, source="") -> dict[str, Any]:
    """{flag name: value}; later words win, and dotted keys are laid over whole objects."""
    shorts = {short: flag for flag in table.values() for short in flag.short}
    values, dotted = {}, []
    where = f" (in {source})" if source else ""
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not _is_option(word):
            if positional in values:
                raise ConfigError(f"{word!r} is one word too many: the model is {values[positional]!r} already{where}")
            values[positional] = word
            continue
        head, eq, attached = word.partition("=")
        name, dot, key = _canonical(head)
        flag = shorts.get(head) or table.get(name)
        if flag is None and head[:2] == "-O" and not head.startswith("--") and "O" in {s[1:] for s in shorts}:
            flag, eq, attached = shorts["-O"], "=", head[2:] + attached  # -O3
        if flag is None and name.startswith("no-") and (flag := table.get(name[3:])) and flag.kind == "switch":
            if eq:
                raise ConfigError(f"--{name} takes no value{where}")
            values[flag.name] = False
            continue
        if flag is None or (dot and flag.kind != "json"):
            raise ConfigError(f"--{name}{dot}{key} is not a flag{where}{_nearest(name, table)}")
        if flag.kind == "switch":
            if eq:
                raise ConfigError(f"--{name} takes no value; write --{name} or --no-{name}{where}")
            values[flag.name] = True
            continue
        given = [attached] if eq else _take(queue, flag)
        if not given:
            raise ConfigError(f"--{name} needs a value{where}")
        if dot:
            dotted.append((flag.name, key, given[0]))
            continue
        value = _convert(flag, given, where)
        if flag.name == positional and values.get(positional, value) != value:
            raise ConfigError(f"two models are named: {values[positional]!r} and --{name} {value!r}; keep one")
        values[flag.name] = [*values.get(flag.name, ()), *value] if flag.kind == "each" else value
    for name, key, text in dotted:
        values[name] = _lay(values.get(name) or {}, key.split("."), _loose(text))
    return values


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit()


def _canonical(head: str) -> tuple[str, str, str]:
    """'--max_model_len' -> ('max-model-len', '', ''); what follows a dot keeps its spelling."""
    name, dot, key = head.lstrip("-").partition(".")
    return name.replace("_", "-"), dot, key


def _take(queue: list[str], flag: Flag) -> list[str]:
    taken = []
    while queue and not _is_option(queue[0]) and (flag.kind == "words" or not taken):
        taken.append(queue.pop(0))
    return taken


def _convert(flag: Flag, given: list[str], where: str) -> Any:
    text = given[0]
    try:
        match flag.kind:
            case "text":
                return text
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "size":
                return size(text)
            case "words" | "each":
                return given
        value = json.loads(text)
        if not isinstance(value, dict if flag.kind == "json" else list):
            raise ValueError
        return value
    except ValueError as error:
        wanted = {
            "int": "a whole number",
            "float": "a number",
            "size": str(error),
            "json": "a JSON object, as '{\"key\": 1}'",
            "list": 'a JSON list, as \'["a", "b"]\'',
        }[flag.kind]
        raise ConfigError(f"--{flag.name} {text!r}{where}: what is wanted is {wanted}") from None


def _loose(text: str) -> Any:
    """A dotted key's value: JSON where it reads as JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lay(tree: dict, keys: list[str], value: Any) -> dict:
    """The tree with value at keys; a last key that ends in + appends to a list."""
    key, rest = keys[0], keys[1:]
    if rest:
        inner = tree.get(key)
        return tree | {key: _lay(inner if isinstance(inner, dict) else {}, rest, value)}
    if key.endswith("+"):
        key = key[:-1]
        return tree | {key: [*(tree.get(key) or []), *(value if isinstance(value, list) else [value])]}
    return tree | {key: value}


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Options of a file below options of the command line; objects are merged by key."""
    both = {name: under[name] | over[name] for name in over if isinstance(under.get(name), dict)}
    return under | over | both


def _words_of(path: Path, table: Mapping[str, Flag]) -> list[str]:
    """A YAML file of options as if they had been typed."""
    import yaml

    try:
        options = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; name a readable YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict | None):
        raise ConfigError(f"--config {path} holds a {type(options).__name__}; write one `option: value` a line")
    words = []
    for key, value in (options or {}).items():
        name = str(key).replace("_", "-")
        if name == "config":
            raise ConfigError(f"--config {path} names another config; one file is read")
        words += _typed(name, value, table.get(name))
    return words


def _typed(name: str, value: Any, flag: Flag | None) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list) and flag and flag.kind == "words":
        return [f"--{name}", *map(str, value)]
    if isinstance(value, list) and flag and flag.kind == "each":
        return [f"--{name}={item}" for item in value]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict | list) else value}"]


def _spelled(flag: Flag, value: Any) -> str:
    if value is True:
        return f"--{flag.name}"
    if value is False:
        return f"--no-{flag.name}"
    return f"--{flag.name} {json.dumps(value) if isinstance(value, dict | list) else value}"


def _nearest(name: str, table: Mapping[str, Flag]) -> str:
    known = [*table, *(f"no-{flag.name}" for flag in table.values() if flag.kind == "switch")]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean --{close[0]}?" if close else "; --help lists them"
