"""A chat template's source and variables to text, in a sandbox.

This file imports nothing of ours, so that it also runs alone: `python rendering.py` is the worker process of
sandbox.py, which reads requests from its standard input and is killed when one takes too long.

Source: the template environment that Hugging Face tokenizers document under "Chat templates".
"""

import datetime
import functools
import json
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant wrote, for training; here it is shown."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(format):
    return datetime.datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as it is, unlike Jinja's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def environment() -> jinja2.Environment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return env


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateError, or RecursionError for a template nested too deep."""
    return environment().from_string(source)


def render(source: str, variables: dict, max_chars: int) -> str:
    """The template's text.

    Raises:
        ValueError: the template is wrong, refuses these messages, or writes more than max_chars; the message is the
            template's own, shortened.
    """
    parts, size = [], 0
    try:
        for part in compiled(source).generate(**variables):
            parts.append(part)
            size += len(part)
            if size > max_chars:
                raise ValueError(f"the chat template writes more than {max_chars:,} characters; shorten the messages")
        text = "".join(parts)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the chat template writes characters that are not valid Unicode") from None
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"the chat template is too deep or too large ({type(error).__name__})") from None
    except jinja2.TemplateError as error:
        raise ValueError(str(error)[:500] or type(error).__name__) from None
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, LookupError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__} in the chat template: {str(error)[:500]}") from None
    return text


def serve(max_memory_bytes: int) -> None:
    """Answers requests, a line of JSON each, until the input ends; what goes wrong in one is its answer."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            answer = {"text": render(request["source"], request["variables"], request["max_chars"])}
        except ValueError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(max_memory_bytes=int(sys.argv[1]))
