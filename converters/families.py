"""Which architectures of config.json we know: one row each."""

import dataclasses
from collections.abc import Callable
from typing import Any

from converters import gemma3, llama, qwen2, qwen3
from converters.fields import Fields
from converters.rules import ConversionError, Rule
from models.gemma3 import Gemma3
from models.llama import Llama
from models.qwen3 import Qwen3


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: the family's name in messages and metrics.
        model_class: the flax module.
        config: config.json -> the module's frozen config.
        rules: that config -> the weight map.
        tasks: what it can do: "generate", ...
    """

    name: str
    model_class: type
    config: Callable[[Fields], Any]
    rules: Callable[[Any], list[Rule]]
    tasks: tuple[str, ...] = ("generate",)


FAMILIES = {
    "LlamaForCausalLM": Family("llama", Llama, llama.config, llama.rules),
    "MistralForCausalLM": Family("mistral", Llama, llama.mistral_config, llama.rules),
    "MixtralForCausalLM": Family("mixtral", Llama, llama.mixtral_config, llama.mixtral_rules),
    "Qwen2ForCausalLM": Family("qwen2", Llama, qwen2.config, qwen2.rules),
    "Qwen3ForCausalLM": Family("qwen3", Qwen3, qwen3.config, qwen3.rules),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", Qwen3, qwen3.moe_config, qwen3.moe_rules),
    "Gemma3ForCausalLM": Family("gemma3", Gemma3, gemma3.config, gemma3.rules),
}


def family_of(fields: Fields) -> Family:
    """The row of a checkpoint's architecture.

    Raises:
        ConversionError: none is named, or it is not known, or its weights are quantised in a way we cannot read.
    """
    known = f"known: {', '.join(FAMILIES)}"
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConversionError(f"{fields.where}: architectures is {names!r}, not a list with one name; {known}")
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ConversionError(f"{fields.where}: architecture {names[0]!r} is not known; {known}")
    if "quantization_config" in fields:
        method = fields.inner("quantization_config").values.get("quant_method", "unnamed")
        raise ConversionError(
            f"{fields.where}: weights quantised by {method!r} cannot be read; use the "
            "unquantised checkpoint, with --quantization int8 or int4 where it must be small, or a GGUF"
        )
    return family
