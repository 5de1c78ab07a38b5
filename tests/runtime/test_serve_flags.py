"""Command lines become configs: every documented flag has a fate, and nothing is dropped in silence."""

import dataclasses
import re
from pathlib import Path

import pytest

from runtime import arguments, serve, wishes
from runtime.arguments import size
from runtime.errors import ConfigError
from runtime.flags import FLAGS, GROUPS
from runtime.hosts import Hosts

# Options of `vllm serve` as documented on 2025-10-17, by the group they are documented in.
DOCUMENTED = """
host port uds headless api-server-count disable-frontend-multiprocessing root-path middleware
api-key allowed-origins allowed-methods allowed-headers allow-credentials ssl-keyfile ssl-certfile ssl-ca-certs
ssl-cert-reqs enable-ssl-refresh trust-request-chat-template disable-fastapi-docs
h11-max-incomplete-event-size h11-max-header-count
served-model-name chat-template chat-template-content-format response-role return-tokens-as-token-ids
enable-auto-tool-choice tool-call-parser tool-parser-plugin tool-server exclude-tools-when-tool-choice-none
reasoning-parser enable-prompt-tokens-details enable-force-include-usage enable-request-id-headers
enable-server-load-tracking enable-tokenizer-info-endpoint enable-prompt-embeds max-logprobs logprobs-mode
logits-processor-pattern generation-config override-generation-config
enable-log-requests enable-log-outputs max-log-len disable-log-stats uvicorn-log-level disable-uvicorn-access-log
log-config-file log-error-stack
model runner convert task tokenizer tokenizer-mode trust-remote-code dtype seed max-model-len quantization revision
tokenizer-revision hf-overrides pooler-config skip-tokenizer-init enforce-eager disable-sliding-window model-impl
enable-sleep-mode rope-scaling rope-theta io-processor-plugin
load-format download-dir ignore-patterns safetensors-load-strategy
limit-mm-per-prompt media-io-kwargs mm-processor-kwargs mm-processor-cache-gb mm-processor-cache-type
interleave-mm-strings skip-mm-profiling mm-encoder-tp-mode allowed-local-media-path allowed-media-domains
enable-lora lora-modules max-loras max-lora-rank max-cpu-loras lora-extra-vocab-size lora-dtype default-mm-loras
tensor-parallel-size pipeline-parallel-size data-parallel-size enable-expert-parallel
block-size gpu-memory-utilization kv-cache-dtype enable-prefix-caching swap-space cpu-offload-gb
num-gpu-blocks-override kv-cache-memory-bytes
max-num-batched-tokens max-num-seqs scheduling-policy enable-chunked-prefill async-scheduling
structured-outputs-config guided-decoding-backend guided-decoding-disable-fallback
guided-decoding-disable-any-whitespace guided-decoding-disable-additional-properties
speculative-config kv-transfer-config kv-events-config compilation-config otlp-traces-endpoint
show-hidden-metrics-for-version config
""".split()
TABLE = {flag.name: flag for flag in FLAGS}
SAMPLE = {
    "text": "x",
    "int": "7",
    "size": "7",
    "float": "0.7",
    "json": '{"a": 1}',
    "list": '["a"]',
    "words": "a b",
    "each": "x",
}


def read(line, **environment):
    sections, notes = wishes.read(line.split(), environment)
    return sections | {"notes": notes}


def test_every_documented_flag_is_in_the_table():
    assert set(DOCUMENTED) - TABLE.keys() == set()


def test_each_row_has_one_fate():
    for flag in FLAGS:
        assert sum(map(bool, (flag.to, flag.unused, flag.refused))) == 1, flag.name
        assert flag.kind in arguments.KINDS and flag.help, flag.name
    assert len(TABLE) == len(FLAGS) == sum(map(len, GROUPS.values()))


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_each_flag_is_obeyed_noted_or_refused(flag):
    """Its documented spelling, and with underscores."""
    if flag.name == "config":
        return
    for name in (flag.name, flag.name.replace("-", "_")):
        words = (
            [f"--{name}"]
            if flag.kind == "switch"
            else [f"--{name}", *SAMPLE[flag.kind].split(" ", flag.kind != "json")]
        )
        if flag.choices:
            words = [f"--{name}", flag.choices[-1]]
        if flag.kind == "json":
            words = [f"--{name}", SAMPLE["json"]]
        if flag.refused and not (flag.kind == "switch" and True in flag.harmless):
            with pytest.raises(ConfigError, match=f"--{flag.name} .*cannot be had here: ."):
                arguments.parse(words, FLAGS)
            continue
        parsed = arguments.parse(words, FLAGS)
        if flag.to:
            section, field = flag.to.split(".")
            assert field in parsed[section] and not parsed.notes
        elif flag.unused:
            assert len(parsed.notes) == 1 and flag.name in parsed.notes[0] and not parsed.sections


def test_each_working_flag_names_a_field_that_exists():
    from openai_api.config import ServerConfig
    from runtime.config import EngineConfig

    fields = {
        "start": {field.name for field in dataclasses.fields(wishes.Start)} | {"config"},
        "engine": {field.name for field in dataclasses.fields(EngineConfig)},
        "server": {field.name for field in dataclasses.fields(ServerConfig)},
        "fetch": {field.name for field in dataclasses.fields(wishes.Fetch)},
        "hosts": {field.name for field in dataclasses.fields(Hosts)},
    }
    targets = [flag.to for flag in FLAGS if flag.to] + [target for target, _ in wishes.ENVIRONMENT.values()]
    wrong = [target for target in targets if target.split(".")[1] not in fields[target.split(".")[0]]]
    assert not wrong


def test_each_wish_has_a_flag():
    from runtime.config import EngineConfig

    without = {"model", "stacked"}  # positional; and layers are stacked by platform
    wishes_of_engine = {f"engine.{field.name}" for field in dataclasses.fields(EngineConfig)} - {
        f"engine.{name}" for name in without
    }
    assert wishes_of_engine <= {flag.to for flag in FLAGS}


def test_each_working_flag_is_read_by_somebody():
    """A field that only its dataclass names would be a flag dropped in silence."""
    root = Path(serve.__file__).resolve().parent.parent
    config_files = {"flags.py", "wishes.py", "arguments.py"}
    paths = [*(root / "runtime").rglob("*.py"), *(root / "http").rglob("*.py")]
    text = {path: path.read_text() for path in paths if path.name not in config_files}
    targets = [flag.to for flag in FLAGS if flag.to] + [target for target, _ in wishes.ENVIRONMENT.values()]
    unread = []
    for section, field in {tuple(target.split(".")) for target in targets}:
        if section in ("start", "fetch"):
            continue
        if not any(re.search(rf"\.{field}\b", source) for source in text.values()):
            unread.append(f"{section}.{field}")
    assert not unread


def test_values_reach_their_sections():
    asked = read(
        "some/model --port 8001 --max-model-len 4K --no-enable-prefix-caching --served-model-name a b -tp=1 -q=int8"
    )
    assert asked["start"] == {"model": "some/model", "port": 8001}
    assert asked["engine"] == {
        "max_model_len": 4096, "enable_prefix_caching": False, "quantization": "int8", "tensor_parallel_size": 1
    }  # fmt: skip
    assert asked["server"] == {"served_names": ["a", "b"]}


@pytest.mark.parametrize(
    "text, number",
    [("4096", 4096), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2m", 2_000_000), ("1M", 2**20), ("1g", 10**9)],
)
def test_sizes_are_read_as_people_write_them(text, number):
    assert size(text) == number


@pytest.mark.parametrize("text", ["1.5", "1.5K", "k", "4KB", "", "1e3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="whole number"):
        arguments.parse(["--max-model-len", text], FLAGS)


@pytest.mark.parametrize(
    "line, says",
    [
        ("--max-modle-len 5", "did you mean --max-model-len"),
        ("--no-enable-prefix-cache", "did you mean --no-enable-prefix-caching"),
        ("--port", "needs a value"),
        ("--port x", "a whole number"),
        ("--port --host h", "needs a value"),
        ("--dtype int3", "choose one of auto"),
        ("--structured-outputs-config [1]", "a JSON object"),
        ("--override-generation-config {", "a JSON object"),
        ("--allowed-origins {}", "a JSON list"),
        ("--enable-log-requests=yes", "takes no value"),
        ("--port.x 1", "--port.x is not a flag"),
        ("a b", "one word too many"),
        ("a --model b", "two models"),
        ("--no-enable-chunked-prefill", "always read in chunks"),
        ("--pipeline-parallel-size 2", "not cut that way"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(line, says):
    with pytest.raises(ConfigError, match="(?s).") as caught:
        arguments.parse(line.split(), FLAGS)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ["--pipeline-parallel-size 1", "-pp 1", "--enable-chunked-prefill", "--load-format auto", "--max-loras 1"]
)
def test_asking_for_what_happens_anyway_is_fine(line):
    assert read(line)["notes"] == ()


@pytest.mark.parametrize("line", ["-O3", "-O 3", "-O=3", "--enforce-eager", "--swap-space 4"])
def test_flags_without_meaning_here_are_noted(line):
    [note] = read(line)["notes"]
    assert "changes nothing here: " in note


def test_objects_take_dotted_keys():
    name = "--override-generation-config"
    line = f'{name} {{"a":1}} {name}.rope_theta 1e6 --override_generation_config.text-config.name x {name}.l+ 1'
    found = read(f"{line} {name}.l+=2")["engine"]["override_generation_config"]
    assert found == {"a": 1, "rope_theta": 1e6, "text-config": {"name": "x"}, "l": [1, 2]}


def test_old_names_lie_under_the_new_object():
    line = "--guided-decoding-backend guidance --guided-decoding-disable-fallback"
    asked = read(f"{line} --structured-outputs-config.backend auto")
    assert asked["server"]["structured_outputs_config"] == {"backend": "auto", "disable_fallback": True}


def test_a_config_file_supplies_what_the_command_line_leaves_out(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: from/file\nport: 9000\nmax_model_len: 2k\nenable-log-requests: true\nenable_prefix_caching: false\n"
        "served-model-name: [x, y]\noverride-generation-config: {a: 1, b: 2}\nallowed-origins: ['o']\nseed:\n"
    )
    asked = read(f"--port 9001 --config {path} --override-generation-config.b 3")
    assert asked["start"] == {"model": "from/file", "port": 9001}
    assert asked["engine"] == {
        "max_model_len": 2000,
        "enable_prefix_caching": False,
        "override_generation_config": {"a": 1, "b": 3},
    }
    assert asked["server"] == {"enable_log_requests": True, "served_names": ["x", "y"], "allowed_origins": ["o"]}
    assert read(f"from/line --config={path}")["start"]["model"] == "from/line"


@pytest.mark.parametrize(
    "text, says",
    [
        ("prot: 1", "did you mean --port"),
        ("- a", "one `option: value` a line"),
        ("a: [", "not YAML"),
        (None, "No such"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(f"--config {path}")
    assert says in str(caught.value) and "c.yaml" in str(caught.value)


def test_the_environment_fills_in_and_flags_win():
    asked = read("--api-key k1 k2", VLLM_API_KEY="other", VLLM_HTTP_TIMEOUT_KEEP_ALIVE="7", OTHER="x")
    assert asked["server"]["api_keys"] == ["k1", "k2"]
    assert read("", VLLM_API_KEY="other")["server"]["api_keys"] == ["other"]
    with pytest.raises(ConfigError, match="VLLM_HTTP_TIMEOUT_KEEP_ALIVE"):
        read("", VLLM_HTTP_TIMEOUT_KEEP_ALIVE="soon")


@pytest.mark.parametrize(
    "name, text, section, field, value",
    [
        ("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7", "server", "keep_alive_s", 7.0),
        ("VLLM_SERVER_DEV_MODE", "1", "server", "dev_mode", True),
        ("VLLM_SERVER_DEV_MODE", "0", "server", "dev_mode", False),
        ("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "1", "start", "keep_alive_on_engine_death", True),
        ("VLLM_LOGGING_LEVEL", "DEBUG", "start", "log_level", "DEBUG"),
        ("VLLM_LOG_STATS_INTERVAL", "2.5", "server", "log_stats_interval_s", 2.5),
        ("HF_TOKEN", "t", "fetch", "token", "t"),
    ],
)
def test_each_variable_of_the_environment_sets_its_field(name, text, section, field, value):
    assert read("", **{name: text})[section][field] == value


def test_a_variable_that_nothing_reads_is_noted():
    read_elsewhere = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    notes = read("", VLLM_USE_MODELSCOPE="True", VLLM_LOGGING_LEVEL="INFO", PATH="x", **read_elsewhere)["notes"]
    assert notes == ("VLLM_USE_MODELSCOPE is set and changes nothing here",)


@pytest.mark.parametrize("line, environment", [("--api-key=", {}), ("", {"VLLM_API_KEY": ""})])
def test_an_empty_key_never_means_open(line, environment):
    with pytest.raises(ConfigError, match="leave the server open"):
        wishes.read(line.split(), environment)


def test_help_lists_what_works_and_nothing_else(capsys):
    assert serve.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for flag in FLAGS:
        spelled = f"--[no-]{flag.name}" if flag.kind == "switch" else f"--{flag.name}"
        assert (f"  {spelled}" in shown) == (flag.status == "works"), flag.name


def configs(line):
    return serve.configs(wishes.read(line.split(), {})[0])


def test_limits_are_flags():
    _, _, server = configs("--limits.max_n 3 --limits.request_timeout_s 7")
    assert (server.limits.max_n, server.limits.request_timeout_s, server.limits.max_stop) == (3, 7, 16)


@pytest.mark.parametrize(
    "line, says",
    [
        ("--limits.max_m 3", "did you mean max_n"),
        ("--limits.max_n 0", "a number above 0"),
        ("--limits.max_n x", "a number above 0"),
        ("--limits.max_n 1.5", "a number above 0"),
        ("--structured-outputs-config.backend outlines", "llguidance"),
        ("--structured-outputs-config.bakend auto", "did you mean backend"),
        ("--guided-decoding-backend lm-format-enforcer", "llguidance"),
        ("--structured-outputs-config.disable_fallback 3", "must be a bool"),
        ("--enable-auto-tool-choice", "needs --tool-call-parser"),
        ("--tool-call-parser none-such", "none-such"),
        ("--reasoning-parser none-such", "none-such"),
        ("--chat-template ./none.jinja", "neither a file"),
        ("--enable-log-outputs", "needs --enable-log-requests"),
        ("--gpu-memory-utilization 1.5", "(0, 1]"),
        ("--max-num-seqs 0", "at least 1"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(line, says):
    with pytest.raises(ConfigError) as caught:
        configs(line)
    assert says in str(caught.value)


def test_middleware_may_be_named_again_and_in_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("middleware: [m.A, m.B]\n")
    assert read("--middleware m.A --middleware=m.B")["server"]["middleware"] == ["m.A", "m.B"]
    assert read(f"--config {path}")["server"]["middleware"] == ["m.A", "m.B"]


def test_header_limits_have_the_names_of_another_server():
    words = "--h11-max-header-count 20 --h11-max-incomplete-event-size 32K"
    assert read(words)["server"]["limits"] == {"max_headers": 20, "max_header": 32768}
    assert read(words + " --limits.max_headers 30")["server"]["limits"]["max_headers"] == 30
