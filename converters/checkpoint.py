"""A model's files, whatever their form: what they hold, read only when asked for."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers

from converters.families import Family, family_of
from converters.fields import Fields
from converters.rules import ConversionError, Rule, TensorInfo, TensorSource
from converters.shards import Shards, read_json

FULL_HASH_BYTES = 64_000_000  # larger files are hashed by samples
SAMPLES, SAMPLE_BYTES = 64, 65_536


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the configuration is read and checked, the weights are not read yet.

    Attributes:
        path: the folder, or the GGUF file.
        hf_config: config.json's object; made from the metadata for GGUF.
        config: the family's frozen config.
        source: the tensors under Hugging Face's names.
        generation_config, tokenizer_config: those files' objects; {} where there is none.
        chat_template: Jinja text, several by name, or None.
        tokenizer_from: another folder or file, whose tokenizer is used; None for this one's own.
    """

    path: Path
    family: Family
    hf_config: dict[str, Any]
    config: Any
    source: TensorSource
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    chat_template: str | dict[str, str] | None
    files: tuple[Path, ...]
    tokenizer_from: Path | None = dataclasses.field(default=None, kw_only=True)

    @property
    def model_class(self) -> type:
        return self.family.model_class

    @property
    def rules(self) -> list[Rule]:
        return self.family.rules(self.config)

    @property
    def dtype(self) -> str:
        """The dtype that most of the weights are stored in; "float32" when that is none of ours.

        Where there are no weights, it is what config.json says of them.
        """
        totals: dict[str, int] = {}
        for info in self.source.tensors.values():
            totals[info.dtype.name] = totals.get(info.dtype.name, 0) + int(np.prod(info.shape))
        said = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")
        name = max(totals, key=totals.__getitem__) if totals else said
        return name if name in ("bfloat16", "float16", "float32") else "float32"

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor under its Hugging Face name, read one by one."""
        for name in self.source.tensors:
            yield name, self.source.read(name)

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The checkpoint's tokenizer, or None when it has none.

        Raises:
            ConversionError: there is one, but it cannot be read.
        """
        if self.tokenizer_from is None:
            return self._read_tokenizer()
        if self.tokenizer_from.suffix == ".gguf":
            return _open_gguf(self.tokenizer_from).tokenizer
        return _read_tokenizer(self.tokenizer_from)

    def _read_tokenizer(self):
        return _read_tokenizer(self.path)

    def fingerprint(self, *, dated: bool = True) -> str:
        """Identity of the content: equal for equal files, different when anything that matters changed.

        Small files are hashed whole; large ones by size, change time, both ends and samples in between.

        Args:
            dated: False leaves out the change time, which differs between copies on several hosts.
        """
        digest = hashlib.sha256()
        for path in self.files:
            stat = path.stat()
            digest.update(json.dumps([path.name, stat.st_size]).encode())
            with open(path, "rb") as file:
                if stat.st_size <= FULL_HASH_BYTES:
                    digest.update(file.read())
                    continue
                if dated:
                    digest.update(str(stat.st_mtime_ns).encode())
                for i in range(SAMPLES + 1):
                    file.seek(i * (stat.st_size - SAMPLE_BYTES) // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


class NoTensors:
    """The TensorSource of a config without weights."""

    tensors: Mapping[str, TensorInfo] = MappingProxyType({})
    files: tuple[Path, ...] = ()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        raise ConversionError(f"tensor {name!r} cannot be read: only the config was opened")


def open_checkpoint(
    path: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    needs_weights: bool = True,
) -> Checkpoint:
    """Opens a Hugging Face folder or a GGUF file; without need of weights, also a folder or a file of its config.

    Args:
        overrides: laid over config.json's object, field by field.
        tokenizer: a folder or a GGUF file whose tokenizer, and chat template where it has one, take the place of the
            checkpoint's.

    Raises:
        ConversionError: the files are missing, broken, or of a model that is not known.
    """
    path = Path(path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "config.json").is_file() and len(ggufs) == 1:
            checkpoint = _laid_over(_open_gguf(ggufs[0]), overrides)
        else:
            checkpoint = _open_folder(path / "config.json", overrides or {}, needs_weights)
    elif not needs_weights and path.is_file() and path.suffix == ".json":
        checkpoint = _open_folder(path, overrides or {}, needs_weights)
    elif not path.exists():
        raise ConversionError(f"{path} does not exist; give a folder with config.json, or a .gguf file")
    elif path.suffix == ".gguf":
        checkpoint = _laid_over(_open_gguf(path), overrides)
    else:
        raise ConversionError(f"{path} is neither a folder with config.json nor a .gguf file")
    return checkpoint if tokenizer is None else _with_tokenizer(checkpoint, Path(tokenizer))


def _laid_over(checkpoint, overrides):
    """The checkpoint with its configuration changed."""
    if not overrides:
        return checkpoint
    hf_config = {**checkpoint.hf_config, **overrides}
    fields = Fields(hf_config, f"{checkpoint.path} with its overrides")
    family = family_of(fields)
    return dataclasses.replace(checkpoint, hf_config=hf_config, family=family, config=family.config(fields))


def _with_tokenizer(checkpoint, place):
    """The checkpoint with the tokenizer of another folder or file."""
    if place.suffix == ".gguf" and place.is_file():
        other = _open_gguf(place)
        settings, template = other.tokenizer_config, other.chat_template
    elif (place / "tokenizer.json").is_file():
        settings = _optional_json(place / "tokenizer_config.json")
        template = _chat_template(place, settings)
    else:
        raise ConversionError(f"{place}: no tokenizer.json; give the folder of a tokenizer, or a .gguf file")
    return dataclasses.replace(
        checkpoint,
        tokenizer_from=place,
        tokenizer_config=settings,
        chat_template=template if template is not None else checkpoint.chat_template,
    )


def _read_tokenizer(folder):
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConversionError(f"{path}: not a tokenizer ({error}); download it again") from error
    if (folder / "tokenizer.model").is_file():
        raise ConversionError(f"{folder}: has tokenizer.model only; save tokenizer.json beside it (transformers does)")
    return None


def _open_folder(config_file, overrides, needs_weights):
    folder = config_file.parent
    if not config_file.is_file():
        raise ConversionError(f"{folder}: no config.json; give the folder that a Hugging Face download made")
    hf_config = read_json(config_file)
    if overrides and isinstance(hf_config, dict):
        hf_config |= overrides
    fields = Fields(hf_config, str(config_file))
    family = family_of(fields)
    config = family.config(fields)
    source = Shards(folder) if needs_weights or any(folder.glob("*.safetensors")) else NoTensors()
    tokenizer_config = _optional_json(folder / "tokenizer_config.json")
    return Checkpoint(
        path=folder,
        family=family,
        hf_config=hf_config,
        config=config,
        source=source,
        generation_config=_optional_json(folder / "generation_config.json"),
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config),
        files=(config_file, *source.files),
    )


def _optional_json(path):
    return read_json(path) if path.is_file() else {}


def _chat_template(folder, tokenizer_config):
    """From chat_template.jinja and its neighbours, where newer checkpoints keep it, else the tokenizer's config."""
    found = {path.stem: path.read_text() for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text()
    elif (folder / "chat_template.json").is_file():
        found["default"] = read_json(folder / "chat_template.json").get("chat_template")
    if not found:
        return template_value(tokenizer_config.get("chat_template"), str(folder / "tokenizer_config.json"))
    return found["default"] if list(found) == ["default"] else found


def template_value(value, where) -> str | dict[str, str] | None:
    """tokenizer_config.json's chat_template: a text, or a list of {"name", "template"}."""
    if value is None or isinstance(value, str):
        return value
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise ConversionError(
            f"{where}: chat_template is neither text nor a list of named texts; correct it"
        ) from error


def _open_gguf(path):
    from converters.gguf import open_gguf  # its reader is imported for GGUF files only

    return open_gguf(path)
