"""POST /tokenize and /detokenize."""

from typing import Annotated

import pydantic
from pydantic import Field

from openai_api.schema.chat import ChatFields
from openai_api.schema.sampling import Body


class TokenizeText(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChat(ChatFields):
    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[pydantic.StrictInt], Field(fail_fast=True)]
