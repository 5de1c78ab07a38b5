"""Constraints drawn at random, bounded so that a model of random weights comes to an end.

Each comes with its judge, which is somebody else's code: jsonschema, re, lark.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable

import jsonschema
import lark

WORDS = ["a", "on", "the", "name", "Paris", "é", "x y", '"', "\\", "1", "日本", ""]
NAMES = ["name", "age", "is", "a b", "é", 'q"', "x1", "list"]
FORMATS = ["date", "uuid", "ipv4", "email"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """kind: of structured_outputs. value: what is sent. accepts: whether a whole text fits; never ours to say."""

    kind: str
    value: object
    accepts: Callable[[str], bool]


def draw(kind: str, number: int) -> Drawn:
    rng = random.Random(number)
    match kind:
        case "json":
            return _json(rng)
        case "regex":
            pattern = Regex(rng).any_of(3)
            return Drawn(kind, pattern, re.compile(pattern).fullmatch)
        case "choice":
            texts = sorted({"".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 6))})
            return Drawn(kind, texts, texts.__contains__)
        case _:
            return _grammar(rng)


# ---- JSON schemas ---------------------------------------------------------------------------------------------------


def _json(rng) -> Drawn:
    schema = Schema(rng).whole()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())

    def accepts(text):
        try:
            return validator.is_valid(json.loads(text))
        except ValueError:
            return False

    return Drawn("json", schema, accepts)


class Schema:
    """A schema whose texts are short."""

    def __init__(self, rng):
        self.rng = rng
        self.names = rng.sample(["node", "leaf"], rng.randint(0, 2))

    def whole(self) -> dict:
        schema = self.any_of(3)
        if self.names:
            refs = self.names
            self.names = []  # a definition does not refer to another, so nothing is endless
            schema = {"$defs": {name: self.any_of(1) for name in refs}} | schema
        return schema

    def any_of(self, depth: int) -> dict:
        makers = [self.text, self.integer, self.number, self.fixed, self.listed, self.nullable]
        if depth:
            makers += [self.object, self.object, self.object, self.array, self.tuple, self.either, self.both]
        if self.names:
            makers.append(self.reference)
        maker = self.rng.choice(makers)
        return maker(depth - 1) if maker in (self.object, self.array, self.tuple, self.either, self.both) else maker()

    def text(self) -> dict:
        rng = self.rng
        match rng.randrange(4):
            case 0:
                return {"type": "string", "format": rng.choice(FORMATS)}
            case 1:
                return {"type": "string", "pattern": rng.choice(["^[A-Z]{2,4}$", "^(a|bc){1,3}$", "^[0-9]{3}-[x-z]$"])}
        least = rng.randint(0, 3)
        return {"type": "string", "maxLength": least + rng.randint(0, 6)} | ({"minLength": least} if least else {})

    def integer(self) -> dict:
        low = self.rng.randint(-200, 200)
        high = low + self.rng.choice([0, 1, 7, 99, 12345])
        found = {"type": "integer", "minimum": low, "maximum": high}
        if self.rng.random() < 0.2 and high > low + 1:
            found = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high}
        if self.rng.random() < 0.15 and high > low + 20:
            found["multipleOf"] = self.rng.choice([2, 5, 10])
        return found

    def number(self) -> dict:
        low = self.rng.choice([-10, -0.5, 0, 1.25, 3])
        return {"type": "number", "minimum": low, "maximum": low + self.rng.choice([0.5, 1, 1000])}

    def fixed(self) -> dict:
        return {"const": self.rng.choice(["é\n", 3, -1.5, None, True, [1, "a"], {"k": [{}]}])}

    def listed(self) -> dict:
        return {"enum": self.rng.sample(["a", "b c", 'q"', 1, 2.5, None, False, [], {"x": 1}], self.rng.randint(1, 4))}

    def nullable(self) -> dict:
        if self.rng.random() < 0.3:
            return {"type": self.rng.choice(["boolean", "null"])}
        return {"type": ["string", "null"], "maxLength": 3}

    def object(self, depth) -> dict:
        names = self.rng.sample(NAMES, self.rng.randint(0, 4))
        properties = {name: self.any_of(depth) for name in names}
        required = [name for name in names if self.rng.random() < 0.6]
        found = {"type": "object", "properties": properties, "additionalProperties": False}
        return found | ({"required": required} if required else {}) | ({"title": "T"} if not depth else {})

    def array(self, depth) -> dict:
        least = self.rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.any_of(depth),
            "minItems": least,
            "maxItems": least + self.rng.randint(0, 2),
        }

    def tuple(self, depth) -> dict:
        items = [self.any_of(depth) for _ in range(self.rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def either(self, depth) -> dict:
        return {"anyOf": [self.any_of(depth) for _ in range(self.rng.randint(1, 3))]}

    def both(self, depth) -> dict:
        low = self.rng.randint(0, 50)
        parts = [{"type": "integer", "minimum": low}, {"maximum": low + 60}]
        return {"allOf": parts} if depth % 2 else {"oneOf": [{"type": "boolean"}, parts[0] | parts[1]]}

    def reference(self) -> dict:
        return {"$ref": f"#/$defs/{self.rng.choice(self.names)}"}


# ---- regexes --------------------------------------------------------------------------------------------------------


class Regex:
    """A pattern that Python's re reads alike; nothing repeats without end."""

    ATOMS = [
        "a",
        "bc",
        "é",
        "日",
        r"\d",
        r"\.",
        r"\+",
        "[a-f]",
        "[^a-z\\n]",
        "[0-9A-F]",
        r"[\w]",
        r"\s",
        "😀",
        ".",
        r"\\",
        "-",
    ]

    def __init__(self, rng):
        self.rng = rng

    def any_of(self, depth: int) -> str:
        return "|".join(self.sequence(depth) for _ in range(self.rng.choice([1, 1, 2, 3])))

    def sequence(self, depth: int) -> str:
        return "".join(self.piece(depth) for _ in range(self.rng.randint(1, 4)))

    def piece(self, depth: int) -> str:
        if depth and self.rng.random() < 0.4:
            head = self.rng.choice(["(", "(?:", f"(?P<g{self.rng.randrange(10**9)}>"])
            atom = f"{head}{self.any_of(depth - 1)})"
        else:
            atom = self.rng.choice(self.ATOMS)
            atom = f"(?:{atom})" if len(atom) > 1 and atom[0] not in "\\[" else atom
        return atom + self.rng.choice(["", "", "", "?", "{2}", "{0,3}", "{1,4}"])


# ---- grammars -------------------------------------------------------------------------------------------------------


def _grammar(rng) -> Drawn:
    """The same grammar in Lark's notation and in GBNF; one of them is sent, and lark reads the first."""
    rules = {f"r{i}": [_alternative(rng, i) for _ in range(rng.randint(1, 3))] for i in range(4)}
    as_lark = "\n".join(["start: r0", *(f"{name}: {' | '.join(map(_lark, alts))}" for name, alts in rules.items())])
    as_gbnf = "\n".join(
        ["root ::= r0", *(f"{name} ::= {' | '.join(map(_gbnf, alts))}" for name, alts in rules.items())]
    )
    parser = lark.Lark(as_lark, parser="earley", lexer="dynamic_complete")

    def accepts(text):
        try:
            parser.parse(text)
        except lark.exceptions.LarkError:
            return False
        return True

    return Drawn("grammar", rng.choice([as_lark, as_gbnf]), accepts)


def _alternative(rng, level: int) -> list[tuple[str, str]]:
    """Parts: (a literal, class or rule; how often). A rule leads to later ones alone, so every text ends."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["literal", "class"] + ["rule"] * 2 * (level < 3))
        if kind == "rule":
            part = f"r{rng.randint(level + 1, 3)}"
        else:
            part = json.dumps(rng.choice(["a", "if ", "(", ")", "é", ", ", "x=", '"', "\\"]), ensure_ascii=False)
            part = rng.choice(["[a-z]", "[0-9]", "[A-Fx]"]) if kind == "class" else part
        parts.append((part, rng.choice(["", "", "", "?", "{1,3}"])))
    return parts


def _lark(parts) -> str:
    words = [f"/{part}/" if part[0] == "[" else part for part, _ in parts]
    return " ".join(w + t.replace("{1,3}", "~1..3") for w, (_, t) in zip(words, parts, strict=True))


def _gbnf(parts) -> str:
    return " ".join(part + times for part, times in parts)
