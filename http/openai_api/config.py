"""What the HTTP server was asked to do. Flags set these fields; nothing changes them later."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one request or one connection; past them a request is refused in words. Sizes are bytes."""

    max_body: int = 32 << 20
    max_body_pieces: int = 65_536  # of a chunked body
    max_json_values: int = 1_000_000
    max_json_keys: int = 100_000
    max_json_depth: int = 64
    max_connections: int = 2048
    max_header: int = 16 << 10  # of a request, all lines together
    max_headers: int = 100  # lines
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0  # and a second more for each MiB
    max_n: int = 128
    max_prompts: int = 256
    max_choices: int = 1024  # prompts times n
    max_messages: int = 4096
    max_stop: int = 16
    max_stop_length: int = 1024
    max_logit_bias: int = 1024
    max_text_field: int = 1024  # user, cache_salt, request_id
    template_timeout_s: float = 1.0  # of a template that came with a request
    model_template_timeout_s: float = 5.0  # of the model's own
    template_memory: int = 512 << 20
    request_timeout_s: float = 600.0
    stalled_writer_s: float = 30.0
    first_comment_s: float = 15.0  # a stream with nothing to say yet sends a comment so often


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Names are those of the flags; see `python -m runtime.serve --help`.

    served_names: names the model answers to, the first of which is shown; empty for the engine's own.
    chat_template: Jinja text, or the path of a file with it; None for the model's own.

    Raises:
        ConfigError: values that contradict each other.
    """

    served_names: list[str] = dataclasses.field(default_factory=list)
    root_path: str = ""
    api_keys: list[str] = dataclasses.field(default_factory=list)
    allowed_origins: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    allowed_methods: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    allowed_headers: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    allow_credentials: bool = False
    keep_alive_s: float = 5.0
    enable_request_id_headers: bool = False
    enable_server_load_tracking: bool = False
    enable_tokenizer_info_endpoint: bool = False
    dev_mode: bool = False
    profile_dir: str | None = None  # where /start_profile writes; None has no such route
    disable_docs: bool = False
    middleware: list[str] = dataclasses.field(default_factory=list)  # import paths; the last is the outermost

    chat_template: str | None = None
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    trust_request_chat_template: bool = False
    trust_model_template: bool = False  # rendered in this process, not in one that can be killed
    response_role: str = "assistant"
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_parser: str | None = None
    structured_outputs_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False

    enable_log_requests: bool = False
    enable_log_outputs: bool = False
    max_log_len: int | None = None
    disable_log_stats: bool = False
    show_hidden_metrics_for_version: str | None = None
    log_stats_interval_s: float = 10.0  # between lines of statistics in the log; 0 for none
    disable_access_log: bool = False

    limit_mm_per_prompt: dict[str, Any] = dataclasses.field(default_factory=dict)
    media_io_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    mm_processor_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    interleave_mm_strings: bool = False
    allowed_local_media_path: str = ""
    allowed_media_domains: list[str] = dataclasses.field(default_factory=list)
    media_url_allow_redirects: bool = True
    image_fetch_timeout_s: float = 5.0
    audio_fetch_timeout_s: float = 10.0
    max_audio_mb: float = 25.0

    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self):
        if any(not key for key in self.api_keys):
            raise ConfigError("an API key is empty, which would leave the server open; give one, or leave it out")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("--allow-credentials needs --allowed-origins that name their origins, not '*'")
        if self.chat_template_content_format not in ("auto", "string", "openai"):
            raise ConfigError("--chat-template-content-format must be auto, string or openai")
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise ConfigError("--enable-auto-tool-choice needs --tool-call-parser")
        if self.enable_log_outputs and not self.enable_log_requests:
            raise ConfigError("--enable-log-outputs needs --enable-log-requests")

    def template_source(self) -> str | None:
        """The text of chat_template, read from its file where it is one.

        Raises:
            ConfigError: it looks like a path, and there is no such file.
        """
        if self.chat_template is None:
            return None
        looks_literal = any(mark in self.chat_template for mark in "{}\n")
        try:
            return Path(self.chat_template).read_text()
        except (OSError, ValueError):
            if looks_literal:
                return self.chat_template
        raise ConfigError(f"--chat-template {self.chat_template!r} is neither a file that can be read nor a template")
