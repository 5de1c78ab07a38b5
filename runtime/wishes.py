"""What was asked, from the command line and the environment, as the configs of each part.

The environment is read here, on behalf of serve.py, and given to the rest as values.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from runtime import arguments, demo
from runtime.errors import ConfigError
from runtime.flags import FLAGS

DTYPES = {"half": "float16", "float": "float32"}
SECTIONS = ("start", "fetch", "engine", "server", "hosts")

# What the environment may say, and the field that it becomes; a flag wins.
ENVIRONMENT = {
    "VLLM_API_KEY": ("server.api_keys", lambda text: [text]),
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": ("server.keep_alive_s", float),
    "VLLM_SERVER_DEV_MODE": ("server.dev_mode", lambda text: text == "1"),
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": ("start.keep_alive_on_engine_death", lambda text: text == "1"),
    "VLLM_LOG_STATS_INTERVAL": ("server.log_stats_interval_s", float),
    "VLLM_LOGGING_LEVEL": ("start.log_level", str),
    "VLLM_LOGGING_CONFIG_PATH": ("start.log_config_file", str),
    "VLLM_TORCH_PROFILER_DIR": ("server.profile_dir", str),
    "HF_TOKEN": ("fetch.token", str),
}

HEADER_LIMITS = {"h11_max_incomplete_event_size": "max_header", "h11_max_header_count": "max_headers"}
READ_ELSEWHERE = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN"}  # where a limit is checked

# Keys of --structured-outputs-config, and what may stand there.
BACKENDS = ("auto", "guidance", "llguidance")
STRUCTURED = {
    "backend": str,
    "disable_fallback": bool,
    "disable_any_whitespace": bool,
    "disable_additional_properties": bool,
    "reasoning_parser": str,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What concerns the server's process alone."""

    model: str | None = None
    host: str | None = None
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    enable_ssl_refresh: bool = False
    drain_timeout_s: float = 30.0
    log_level: str = "INFO"
    http_log_level: str = "info"
    log_config_file: str | None = None
    log_error_stack: bool = False
    show_progress: bool = True
    keep_alive_on_engine_death: bool = False
    h11_max_incomplete_event_size: int | None = None
    h11_max_header_count: int | None = None
    guided_decoding_backend: str | None = None
    guided_decoding_disable_fallback: bool | None = None
    guided_decoding_disable_any_whitespace: bool | None = None
    guided_decoding_disable_additional_properties: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Which model, and how it may be downloaded."""

    revision: str | None = None
    tokenizer_revision: str | None = None
    token: str | None = None
    download_dir: str | None = None
    ignore_patterns: Sequence[str] = demo.IGNORE_PATTERNS

    def model(self, name: str | None, progress: demo.Progress | None = None):
        """Path of the model's files."""
        own = {key: value for key, value in dataclasses.asdict(self).items() if key != "tokenizer_revision"}
        return demo.fetch(name, progress=progress, **own)

    def tokenizer(self, name: str | None) -> str | None:
        """Path of another tokenizer's files; None where the model's own is used."""
        if name is None:
            return None
        wanted = {"revision": self.tokenizer_revision, "token": self.token, "download_dir": self.download_dir}
        return str(demo.fetch_tokenizer(name, **wanted))


def read(
    words: Sequence[str], environment: Mapping[str, str], more: Sequence[arguments.Flag] = ()
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """The command line and the environment as {section: {field: value}}, and what to say of flags without effect.

    Args:
        more: flags of another command than serve.

    Raises:
        ConfigError: a flag is unknown, malformed or cannot be had.
    """
    parsed = arguments.parse(words, (*FLAGS, *more))
    sections = {name: dict(parsed[name]) for name in (*SECTIONS, *(flag.to.split(".")[0] for flag in more))}
    for name, (target, convert) in ENVIRONMENT.items():
        if name in environment:
            section, field = target.split(".")
            try:
                sections[section].setdefault(field, convert(environment[name]))
            except ValueError:
                raise ConfigError(f"{name}={environment[name]!r} is not a number; correct it or unset it") from None
    engine, start, server = (sections[name] for name in ("engine", "start", "server"))
    if any(not key for key in server.get("api_keys", ())):
        raise ConfigError("an API key is empty, which would leave the server open; give one, or leave it out")
    if "dtype" in engine:
        engine["dtype"] = DTYPES.get(engine["dtype"], engine["dtype"])
    prefix = "guided_decoding_"
    if old := {name.removeprefix(prefix): value for name, value in start.items() if name.startswith(prefix)}:
        server["structured_outputs_config"] = old | server.get("structured_outputs_config", {})
    _check_structured(server.get("structured_outputs_config", {}))
    older = {limit: start[name] for name, limit in HEADER_LIMITS.items() if name in start}
    if older:
        server["limits"] = older | server.get("limits", {})
    known = ENVIRONMENT.keys() | READ_ELSEWHERE
    unread = sorted(name for name in environment.keys() - known if name.startswith("VLLM_"))
    return sections, (*parsed.notes, *(f"{name} is set and changes nothing here" for name in unread))


def limits(wishes: Mapping[str, Any], kind: type) -> Any:
    """The --limits that were asked, over the defaults.

    Raises:
        ConfigError: there is no such limit, or its value is not a positive number.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in wishes.items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1) or [", ".join(defaults)]
            raise ConfigError(f"--limits.{name} is not a limit; did you mean {close[0]}?")
        wanted = (int, float) if isinstance(defaults[name], float) else int
        if isinstance(value, bool) or not isinstance(value, wanted) or value <= 0:
            raise ConfigError(f"--limits.{name} {value!r}: what is wanted is a number above 0, as {defaults[name]:,}")
    return kind(**wishes)


def _check_structured(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name not in STRUCTURED:
            close = difflib.get_close_matches(name, STRUCTURED, n=1) or [", ".join(STRUCTURED)]
            raise ConfigError(f"--structured-outputs-config.{name} is not known; did you mean {close[0]}?")
        if not isinstance(value, STRUCTURED[name]):
            raise ConfigError(f"--structured-outputs-config.{name} {value!r} must be a {STRUCTURED[name].__name__}")
    if (backend := config.get("backend", "auto")) not in BACKENDS:
        raise ConfigError(
            f"--structured-outputs-config.backend {backend!r} cannot be had here: constraints are compiled by "
            f"llguidance; choose {' or '.join(BACKENDS[:2])}"
        )
