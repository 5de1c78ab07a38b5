"""A constraint as the text the parser library compiles.

Runs in the worker process first, so it may meet anything; what it refuses, it refuses with GrammarError.

Source: the Lark dialect of llguidance, docs/syntax.md of that project.
"""

import json
import re
from typing import Any

from llguidance import LLMatcher

from runtime.grammar.constraint import Constraint
from runtime.grammar.gbnf import check_brackets, gbnf_to_lark, is_gbnf

# Bounded: under a mask, a weak model may otherwise write blanks until its tokens run out.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"

ESCAPE = re.compile(r"\\.", re.DOTALL)
# A letter that a newer Unicode added is none for a Python that has not heard of it; 3.11 has Unicode 14.
PYTHON_CLASSES = {
    r"\d": r"[\d&&\p{age=14.0}]",
    r"\w": r"[[_\p{L}\p{N}]&&\p{age=14.0}]",
    r"\W": r"[^_\p{L}\p{N}]",
    r"\s": r"[\s\x1c-\x1f]",
    r"\S": r"[^\s\x1c-\x1f]",
}


def compile_source(constraint: Constraint, special_tokens: frozenset[str] = frozenset()) -> str:
    """Gives the library's text for a constraint.

    Args:
        constraint: any kind.
        special_tokens: the tokenizer's; a structural tag may begin with one.

    Raises:
        GrammarError: the grammar's text is wrong.
    """
    match constraint.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(constraint.source, None, _json_options(constraint))
        case "regex":
            return LLMatcher.grammar_from_regex(as_python_reads(constraint.source))
        case "choice":
            options = " | ".join(literal(option) for option in dict.fromkeys(json.loads(constraint.source)))
            return LLMatcher.grammar_from_lark(f"start: {options}")
        case "grammar":
            check_brackets(constraint.source)
            text = gbnf_to_lark(constraint.source) if is_gbnf(constraint.source) else constraint.source
            return LLMatcher.grammar_from_lark(text)
        case _:
            return LLMatcher.grammar_from_lark(_tags_to_lark(json.loads(constraint.source), special_tokens))


def as_python_reads(pattern: str) -> str:
    """A regex whose letters, digits and blanks are those of Python's re, with which outputs are checked.

    The library's \\w also holds marks that only change the letter before them, and its \\S four separators that
    Python counts as blanks.
    """
    return ESCAPE.sub(lambda found: PYTHON_CLASSES.get(found[0], found[0]), pattern)


def literal(text: str) -> str:
    """A string as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _json_options(constraint: Constraint) -> Any:
    if constraint.compact:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": constraint.whitespace_pattern or WHITESPACE}


def _tags_to_lark(tags: dict, special_tokens: frozenset[str]) -> str:
    """Free text in which every trigger must go on as one of the structures that begin with it."""
    groups: dict[str, list[str]] = {}
    for item in tags["structures"]:
        trigger = max((t for t in tags["triggers"] if item["begin"].startswith(t)), key=len)
        rest = item["begin"][len(trigger) :]
        parts = [literal(rest) if rest else "", "%json " + json.dumps(item["schema"]), literal(item["end"])]
        groups.setdefault(trigger, []).append(" ".join(part for part in parts if part and part != '""'))
    lines = [f"start: ({' | '.join(f'tag_{i}' for i in range(len(groups)))})* tail", "tail: TEXT", "TEXT: /(.|\\n)*/"]
    for i, (trigger, bodies) in enumerate(groups.items()):
        if trigger in special_tokens and trigger[0] == "<" and trigger[-1] == ">":
            head = f"TEXT {trigger}"
        else:
            lines.append(f"trigger_{i}[lazy]: TEXT {literal(trigger)}")
            head = f"trigger_{i}"
        lines += [f"tag_{i}: {head} body_{i}", f"body_{i}: " + " | ".join(bodies)]
    return "\n".join(lines) + "\n"
