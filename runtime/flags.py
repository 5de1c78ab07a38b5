"""Every flag of `vllm serve` (as documented on 2025-10-17), and a few of our own, one row each.

A row says what becomes of its flag: `to` names the field that it sets (start: this process, fetch: how the
model is found, engine: runtime.config.EngineConfig, server: openai_api.config.ServerConfig); `unused` says
why it is accepted and changes nothing; `refused` says why it cannot be had and what to do instead.
arguments.py reads command lines with this table.
"""

from runtime.arguments import Flag

ONE_PROCESS = "one process holds the HTTP server and the engine"
OWN_MODELS = "every model family is code of this project; nothing from a model folder is executed"
OWN_CONFIG = "the model is what its config.json says; change that with --hf-overrides"
ONLY_TEXT = "models that generate text are served, as such; leave it at auto"
ONE_DEVICE = "a model is not cut that way; leave it at 1, and split layers by --tensor-parallel-size"
NO_MEDIA = "no family that takes images or audio is served"
NO_PLUGINS = "no such code is loaded from outside; --middleware takes what can stand around a request"

PROCESS = (
    Flag("config", "text", "YAML file of options; the command line wins.", to="start.config"),
    Flag("host", "text", "address to listen on (all).", to="start.host"),
    Flag("port", "int", "port to listen on (8000); 0 takes any free one.", to="start.port"),
    Flag("uds", "text", "Unix socket to listen on, instead of host and port.", to="start.uds"),
    Flag(
        "drain-timeout",
        "float",
        "seconds that open requests get to finish after SIGTERM (30).",
        to="start.drain_timeout_s",
    ),
    Flag("limits", "json", "bounds on one request, as --limits.max_n 64; the banner shows all.", to="server.limits"),
    Flag("root-path", "text", "path prefix behind a reverse proxy.", to="server.root_path"),
    Flag(
        "headless",
        "switch",
        "no HTTP on this host; so it is on all but that of rank 0.",
        to="hosts.headless",
    ),
    Flag(
        "api-server-count",
        "int",
        "HTTP processes.",
        refused=f"{ONE_PROCESS}; for more, run several servers behind a proxy",
        harmless=(1,),
        short=("-asc",),
    ),
    Flag("disable-frontend-multiprocessing", "switch", "HTTP and engine in one process.", unused=ONE_PROCESS),
    Flag(
        "middleware",
        "each",
        "import path of an ASGI class, or of a coroutine function as Starlette has them; may be given again.",
        to="server.middleware",
    ),
    Flag(
        "h11-max-incomplete-event-size",
        "size",
        "bytes that all headers of a request may take (16384), as --limits.max_header.",
        to="start.h11_max_incomplete_event_size",
    ),
    Flag(
        "h11-max-header-count",
        "int",
        "headers that a request may have (100), as --limits.max_headers.",
        to="start.h11_max_header_count",
    ),
)

SECURITY = (
    Flag("api-key", "words", "keys, one of which a client must send (VLLM_API_KEY).", to="server.api_keys"),
    Flag("allowed-origins", "list", "CORS origins, a JSON list.", to="server.allowed_origins"),
    Flag("allowed-methods", "list", "CORS methods, a JSON list.", to="server.allowed_methods"),
    Flag("allowed-headers", "list", "CORS headers, a JSON list.", to="server.allowed_headers"),
    Flag("allow-credentials", "switch", "CORS credentials.", to="server.allow_credentials"),
    Flag("ssl-keyfile", "text", "private key of the TLS certificate.", to="start.ssl_keyfile"),
    Flag("ssl-certfile", "text", "TLS certificate.", to="start.ssl_certfile"),
    Flag("ssl-ca-certs", "text", "certificates that clients are checked against.", to="start.ssl_ca_certs"),
    Flag(
        "ssl-cert-reqs",
        "int",
        "0: clients need no certificate; 1: may show one; 2: must.",
        to="start.ssl_cert_reqs",
    ),
    Flag("enable-ssl-refresh", "switch", "reload certificate files that change.", to="start.enable_ssl_refresh"),
    Flag(
        "trust-request-chat-template",
        "switch",
        "let requests bring their own chat template.",
        to="server.trust_request_chat_template",
    ),
    Flag("disable-fastapi-docs", "switch", "no /docs, /redoc and /openapi.json.", to="server.disable_docs"),
)

API = (
    Flag("served-model-name", "words", "names the model answers to; the first is shown.", to="server.served_names"),
    Flag("chat-template", "text", "a file, or the template itself.", to="server.chat_template"),
    Flag(
        "chat-template-content-format",
        "text",
        "how message contents reach the template (auto).",
        to="server.chat_template_content_format",
        choices=("auto", "string", "openai"),
    ),
    Flag("response-role", "text", "role of generated messages (assistant).", to="server.response_role"),
    Flag(
        "return-tokens-as-token-ids",
        "switch",
        "show tokens as token_id:N in logprobs.",
        to="server.return_tokens_as_token_ids",
    ),
    Flag(
        "enable-auto-tool-choice",
        "switch",
        "let the model decide to call tools; needs --tool-call-parser.",
        to="server.enable_auto_tool_choice",
    ),
    Flag("tool-call-parser", "text", "the format of the model's tool calls.", to="server.tool_call_parser"),
    Flag(
        "tool-parser-plugin",
        "text",
        "a file with a tool parser.",
        refused="such files are written for another server; a format is a small file of runtime/chat/tools here",
        harmless=("",),
    ),
    Flag(
        "tool-server",
        "text",
        "servers of built-in tools.",
        refused="this server calls no tools itself; the client runs them and sends the results",
    ),
    Flag(
        "exclude-tools-when-tool-choice-none",
        "switch",
        "leave tools out of the prompt when tool_choice is none.",
        to="server.exclude_tools_when_tool_choice_none",
    ),
    Flag("reasoning-parser", "text", "the format of the model's reasoning.", to="server.reasoning_parser"),
    Flag(
        "enable-prompt-tokens-details",
        "switch",
        "report cached tokens in usage.",
        to="server.enable_prompt_tokens_details",
    ),
    Flag(
        "enable-force-include-usage",
        "switch",
        "usage in every stream.",
        to="server.enable_force_include_usage",
    ),
    Flag(
        "enable-request-id-headers",
        "switch",
        "answer with X-Request-Id.",
        to="server.enable_request_id_headers",
    ),
    Flag(
        "enable-server-load-tracking",
        "switch",
        "count open requests at /load.",
        to="server.enable_server_load_tracking",
    ),
    Flag(
        "enable-tokenizer-info-endpoint",
        "switch",
        "serve /tokenizer_info.",
        to="server.enable_tokenizer_info_endpoint",
    ),
    Flag(
        "enable-prompt-embeds",
        "switch",
        "prompts as embeddings.",
        refused="a prompt is text or token ids; send those",
        harmless=(False,),
    ),
    Flag("max-logprobs", "int", "most logprobs a request may ask (20; -1: all).", to="engine.max_logprobs"),
    Flag(
        "logprobs-mode",
        "text",
        "what logprobs hold (raw_logprobs).",
        to="engine.logprobs_mode",
        choices=("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
    ),
    Flag("logits-processor-pattern", "text", "logits processors a request may name.", refused=NO_PLUGINS),
    Flag("logits-processors", "words", "logits processors.", refused=NO_PLUGINS),
    Flag(
        "generation-config",
        "text",
        "auto: the model's own sampling defaults; vllm: none; or a folder.",
        to="engine.generation_config",
    ),
    Flag(
        "override-generation-config",
        "json",
        "sampling defaults laid over the model's.",
        to="engine.override_generation_config",
    ),
)

LOGGING = (
    Flag("enable-log-requests", "switch", "log each request.", to="server.enable_log_requests"),
    Flag("disable-log-requests", "switch", "log no requests.", unused="requests are not logged unless asked"),
    Flag(
        "enable-log-outputs",
        "switch",
        "log each answer; needs --enable-log-requests.",
        to="server.enable_log_outputs",
    ),
    Flag("max-log-len", "int", "characters of a prompt in the log (all).", to="server.max_log_len"),
    Flag(
        "disable-log-stats",
        "switch",
        "no metrics, no line of statistics in the log every VLLM_LOG_STATS_INTERVAL (10) seconds.",
        to="server.disable_log_stats",
    ),
    Flag(
        "uvicorn-log-level",
        "text",
        "least severe lines of the HTTP server's log (info).",
        to="start.http_log_level",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    ),
    Flag(
        "disable-uvicorn-access-log",
        "switch",
        "no line for each HTTP request.",
        to="server.disable_access_log",
    ),
    Flag("log-config-file", "text", "JSON file for logging.config.dictConfig.", to="start.log_config_file"),
    Flag(
        "log-error-stack",
        "switch",
        "log the stack trace of errors, at start-up too.",
        to="start.log_error_stack",
    ),
)

MODEL = (
    Flag("model", "text", "folder, .gguf file or hub name; none is the demo model.", to="start.model"),
    Flag("runner", "text", "what the model is used for.", refused=ONLY_TEXT, harmless=("auto", "generate")),
    Flag("convert", "text", "adapt a model for pooling.", refused=ONLY_TEXT, harmless=("auto", "none")),
    Flag("task", "text", "what the model is used for.", refused=ONLY_TEXT, harmless=("auto", "generate")),
    Flag("tokenizer", "text", "folder, .gguf file or hub name of another tokenizer.", to="engine.tokenizer"),
    Flag(
        "tokenizer-mode",
        "text",
        "kind of tokenizer.",
        refused="a tokenizer.json is read, or the one inside a .gguf file; leave it at auto",
        harmless=("auto", "hf"),
    ),
    Flag("skip-tokenizer-init", "switch", "serve token ids only.", refused="the tokenizer is always loaded"),
    Flag(
        "trust-remote-code",
        "switch",
        "render the model's own chat template in the server's process; code of the folder is never run.",
        to="server.trust_model_template",
    ),
    Flag(
        "dtype",
        "text",
        "of weights and activations (auto: the checkpoint's).",
        to="engine.dtype",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    ),
    Flag("seed", "int", "what requests without a seed of their own are drawn from (0).", to="engine.seed"),
    Flag("max-model-len", "size", "prompt and answer together, tokens (the checkpoint's).", to="engine.max_model_len"),
    Flag(
        "quantization",
        "text",
        "int8 rounds weights when they are loaded, and tokens where they meet them; int4 rounds weights alone, in "
        "groups (as stored).",
        to="engine.quantization",
        choices=("int8", "int4"),
        short=("-q",),
    ),
    Flag("revision", "text", "branch, tag or commit on the hub.", to="fetch.revision"),
    Flag("code-revision", "text", "revision of the model's code.", unused=OWN_MODELS),
    Flag("tokenizer-revision", "text", "branch, tag or commit of --tokenizer.", to="fetch.tokenizer_revision"),
    Flag("hf-token", "text", "token for the hub (HF_TOKEN).", to="fetch.token"),
    Flag("hf-overrides", "json", "laid over the model's config.json.", to="engine.hf_overrides"),
    Flag("rope-scaling", "json", "laid over config.json.", refused="say --hf-overrides.rope_scaling instead"),
    Flag("rope-theta", "float", "laid over config.json.", refused="say --hf-overrides.rope_theta instead"),
    Flag("pooler-config", "json", "how hidden states become an embedding.", refused=ONLY_TEXT),
    Flag("enforce-eager", "switch", "run without compiling.", unused="JAX compiles every step, before it listens"),
    Flag("disable-sliding-window", "switch", "attend to everything.", refused=OWN_CONFIG, harmless=(False,)),
    Flag(
        "model-impl",
        "text",
        "whose model code runs.",
        refused=f"{OWN_MODELS}; leave it at auto",
        harmless=("auto",),
    ),
    Flag(
        "enable-sleep-mode",
        "switch",
        "free the device while idle.",
        refused="weights stay loaded; stop the server instead, a warm start takes seconds",
        harmless=(False,),
    ),
    Flag("io-processor-plugin", "text", "plugin for inputs and outputs.", refused=NO_PLUGINS),
    Flag("max-seq-len-to-capture", "size", "longest captured graph.", unused="every step is compiled at start"),
)

LOADING = (
    Flag(
        "load-format",
        "text",
        "format of the weights.",
        refused="the format is seen from the files: safetensors or .gguf; leave it at auto",
        harmless=("auto", "safetensors", "gguf", "hf"),
    ),
    Flag("download-dir", "text", "where hub downloads are kept.", to="fetch.download_dir"),
    Flag("ignore-patterns", "list", 'files not to download (["original/**/*"]).', to="fetch.ignore_patterns"),
    Flag(
        "safetensors-load-strategy",
        "text",
        "how files are read.",
        unused="weights are mapped and read tensor by tensor",
        harmless=("lazy",),
    ),
    Flag("model-loader-extra-config", "json", "options of a loader.", refused="loading has no options", harmless=({},)),
    Flag("use-tqdm-on-load", "switch", "progress bars while starting (yes).", to="start.show_progress"),
    Flag("cache-dir", "text", "converted weights and compiled steps; '' keeps none.", to="engine.cache_dir"),
)

MULTIMODAL = (
    Flag("limit-mm-per-prompt", "json", "most images, audios a prompt may have.", unused=NO_MEDIA),
    Flag("media-io-kwargs", "json", "options of decoding.", unused=NO_MEDIA),
    Flag("mm-processor-kwargs", "json", "options of the processor.", unused=NO_MEDIA),
    Flag("mm-processor-cache-gb", "float", "memory for processed media.", unused=NO_MEDIA),
    Flag("mm-processor-cache-type", "text", "its kind.", unused=NO_MEDIA),
    Flag("interleave-mm-strings", "switch", "media placeholders where the part stood.", unused=NO_MEDIA),
    Flag("skip-mm-profiling", "switch", "no memory trial for media.", unused=NO_MEDIA),
    Flag("mm-encoder-tp-mode", "text", "how the encoder is sharded.", unused=NO_MEDIA),
    Flag("allowed-local-media-path", "text", "folder that file: URLs may read.", unused=NO_MEDIA),
    Flag("allowed-media-domains", "words", "hosts that media URLs may name.", unused=NO_MEDIA),
)

NO_LORA = "adapters are not served; merge the adapter into the model's weights and serve those"
LORA = (
    Flag("enable-lora", "switch", "serve LoRA adapters.", refused=NO_LORA, harmless=(False,)),
    Flag("lora-modules", "words", "name=path, or JSON.", refused=NO_LORA),
    Flag("max-loras", "int", "adapters in one step.", refused=NO_LORA, harmless=(1,)),
    Flag("max-lora-rank", "int", "highest rank.", refused=NO_LORA, harmless=(16,)),
    Flag("max-cpu-loras", "int", "adapters kept in host memory.", refused=NO_LORA),
    Flag("lora-extra-vocab-size", "int", "rows for adapters' tokens.", refused=NO_LORA, harmless=(256,)),
    Flag("lora-dtype", "text", "of adapters.", refused=NO_LORA, harmless=("auto",)),
    Flag("default-mm-loras", "json", "adapters by kind of media.", refused=NO_LORA),
)

PARALLEL = (
    Flag(
        "tensor-parallel-size",
        "int",
        "devices that each layer is split over (1).",
        to="engine.tensor_parallel_size",
        short=("-tp",),
    ),
    Flag("pipeline-parallel-size", "int", "stages of layers.", refused=ONE_DEVICE, harmless=(1,), short=("-pp",)),
    Flag(
        "data-parallel-size",
        "int",
        "replicas of the model, each on tensor-parallel-size devices of its own (1).",
        to="engine.data_parallel_size",
        short=("-dp",),
    ),
    Flag(
        "enable-expert-parallel",
        "switch",
        "give each tensor-parallel device whole experts, and not a part of each.",
        to="engine.enable_expert_parallel",
    ),
    Flag("nnodes", "int", "hosts that serve the model together (1).", to="hosts.nnodes", short=("-n",)),
    Flag(
        "node-rank",
        "int",
        "which of them this is, from 0 (a TPU pod slice or a Slurm job tells).",
        to="hosts.node_rank",
        short=("-r",),
    ),
    Flag("master-addr", "text", "address of the host of rank 0 (as node-rank).", to="hosts.master_addr"),
    Flag(
        "master-port",
        "int",
        "where it waits for the others (29501); the port after it is used too.",
        to="hosts.master_port",
    ),
    Flag("distributed-executor-backend", "text", "how workers are started.", unused=ONE_PROCESS),
    Flag("disable-custom-all-reduce", "switch", "plain all-reduce.", unused="XLA makes the collectives"),
)

CACHE = (
    Flag("block-size", "int", "tokens in a page (by platform).", to="engine.block_size"),
    Flag(
        "gpu-memory-utilization",
        "float",
        "share of an accelerator's memory to use (0.9).",
        to="engine.gpu_memory_utilization",
    ),
    Flag(
        "kv-cache-dtype",
        "text",
        "of keys and values: int8 has a scale for each, fp8 (fp8_e4m3, fp8_e5m2) none (auto: the model's).",
        to="engine.kv_cache_dtype",
    ),
    Flag(
        "enable-prefix-caching", "switch", "share pages of equal beginnings (yes).", to="engine.enable_prefix_caching"
    ),
    Flag("prefix-caching-hash-algo", "text", "its hash.", unused="a keyed 128-bit hash is used, and hits are checked"),
    Flag(
        "swap-space", "float", "GiB for swapped requests.", unused="preempted requests are recomputed, none is swapped"
    ),
    Flag(
        "cpu-offload-gb",
        "float",
        "GiB of weights in host memory.",
        refused="weights stay on the device; quantise, or use more devices",
        harmless=(0.0,),
    ),
    Flag(
        "num-gpu-blocks-override", "int", "pages, instead of the settled number.", to="engine.num_gpu_blocks_override"
    ),
    Flag("kv-cache-memory-bytes", "size", "memory for pages, all devices together.", to="engine.kv_cache_memory_bytes"),
    Flag("calculate-kv-scales", "switch", "scales of an fp8 cache.", refused="the cache needs none", harmless=(False,)),
)

SCHEDULER = (
    Flag("max-num-batched-tokens", "size", "tokens in one step (by platform).", to="engine.max_num_batched_tokens"),
    Flag("max-num-seqs", "size", "requests that run at once (by platform).", to="engine.max_num_seqs"),
    Flag("max-num-queued", "size", "requests that may wait (256); more are answered 429.", to="engine.max_queued"),
    Flag(
        "max-decode-chunk",
        "size",
        "prompt tokens that may join a step in which others decode (as many as keep gaps short).",
        to="engine.max_decode_chunk",
    ),
    Flag(
        "max-decode-steps",
        "int",
        "steps of one dispatch while all requests decode and none waits (CPU: 1, else what 30 ms hold, at most 8).",
        to="engine.max_decode_steps",
    ),
    Flag(
        "scheduling-policy",
        "text",
        "who goes first (fcfs).",
        to="engine.scheduling_policy",
        choices=("fcfs", "priority"),
    ),
    Flag(
        "enable-chunked-prefill",
        "switch",
        "read long prompts in parts.",
        refused="prompts are always read in chunks; --max-num-batched-tokens says how large they may be",
        harmless=(True,),
    ),
    Flag("async-scheduling", "switch", "plan a step while another runs.", unused="steps always overlap"),
    Flag(
        "scheduler-cls",
        "text",
        "another scheduler.",
        refused=NO_PLUGINS,
    ),
)

GUIDED = "server.structured_outputs_config."
STRUCTURED = (
    Flag("structured-outputs-config", "json", "how constraints are enforced.", to="server.structured_outputs_config"),
    Flag(
        "guided-decoding-backend",
        "text",
        "old name of --structured-outputs-config.backend.",
        to="start.guided_decoding_backend",
    ),
    Flag(
        "guided-decoding-disable-fallback",
        "switch",
        "old name of --structured-outputs-config.disable_fallback.",
        to="start.guided_decoding_disable_fallback",
    ),
    Flag(
        "guided-decoding-disable-any-whitespace",
        "switch",
        "old name of --structured-outputs-config.disable_any_whitespace.",
        to="start.guided_decoding_disable_any_whitespace",
    ),
    Flag(
        "guided-decoding-disable-additional-properties",
        "switch",
        "old name of --structured-outputs-config.disable_additional_properties.",
        to="start.guided_decoding_disable_additional_properties",
    ),
)

OTHER = (
    Flag(
        "speculative-config",
        "json",
        "draft tokens ahead from the request's own text (CPU: 4 while a request is alone; 0 tokens are off): "
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}.',
        to="engine.speculative_config",
    ),
    Flag("kv-transfer-config", "json", "move pages between servers.", refused="a server keeps its pages to itself"),
    Flag("kv-events-config", "json", "publish page events.", refused="page events are not published; see /metrics"),
    Flag(
        "compilation-config",
        "json",
        "how steps are compiled.",
        unused="XLA compiles every step at start; XLA_FLAGS reaches it",
    ),
    Flag("O", "int", "level of compilation.", unused="XLA compiles every step at start", short=("-O",)),
    Flag("otlp-traces-endpoint", "text", "where traces go.", refused="traces are not sent; use /metrics and the log"),
    Flag(
        "show-hidden-metrics-for-version",
        "text",
        "show metrics under names that were withdrawn after that version.",
        to="server.show_hidden_metrics_for_version",
        choices=("0.10",),
    ),
    Flag("disable-cascade-attn", "switch", "no cascade attention.", unused="there is none"),
)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "Process": PROCESS,
    "Security": SECURITY,
    "API": API,
    "Logging": LOGGING,
    "Model": MODEL,
    "Loading": LOADING,
    "Multimodal": MULTIMODAL,
    "LoRA": LORA,
    "Parallel": PARALLEL,
    "Cache": CACHE,
    "Scheduler": SCHEDULER,
    "Structured outputs": STRUCTURED,
    "Other": OTHER,
}
FLAGS: tuple[Flag, ...] = tuple(flag for group in GROUPS.values() for flag in group)
