"""From the fields of a request to a compiled constraint."""

from openai_api.config import ServerConfig
from runtime.errors import RequestRefused
from runtime.grammar import Constraint
from runtime.grammar.constraint import GUIDED

SERVER_WIDE = ("disable_any_whitespace", "disable_additional_properties")


async def constraint_of(
    engine, config: ServerConfig, body, *, tool_schema: dict | None = None, starts_after: str | None = None
):
    """What the reply must match, ready for SamplingParams; None when anything goes.

    Args:
        tool_schema: what a named or required tool choice makes the reply be.
        starts_after: the end marker of reasoning, before which anything may be written.

    Raises:
        RequestRefused: the constraint is malformed, or cannot be compiled within its limits.
    """
    wanted = Constraint.from_request(
        _with_server_flags(config, body),
        body.reply_format,
        body.guided,
        tool_schema=tool_schema,
        starts_after=starts_after,
    )
    if wanted is None:
        return None
    if body.use_beam_search:
        raise RequestRefused("use_beam_search cannot be combined with a constraint on the output", "use_beam_search")
    if (compiler := getattr(engine, "compiler", None)) is None:
        message = "this server has no tokenizer that constraints could be compiled for; leave the constraint out"
        raise RequestRefused(message, "structured_outputs")
    return await compiler.compile(wanted)


def _with_server_flags(config, body):
    """structured_outputs with what --structured-outputs-config says of all of them."""
    flags = {name: True for name in SERVER_WIDE if config.structured_outputs_config.get(name)}
    given = body.structured_outputs
    if not flags:
        return given
    if given is None:
        given = {GUIDED[name]: value for name, value in body.guided.items() if value is not None}
    return given | flags
