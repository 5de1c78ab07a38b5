"""Log lines: whose level is whose, and one line an event whatever the text holds."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import logs
from runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("", "jax", "sanic.root", "sanic.error", "sanic.access", "sanic.server")


@pytest.fixture(autouse=True)
def as_before():
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger, logger.level, list(logger.handlers), logger.disabled) for logger in loggers]
    yield
    for logger, level, handlers, disabled in before:
        logger.setLevel(level)
        logger.handlers[:], logger.disabled = handlers, disabled


def test_the_servers_own_level_and_that_of_http():
    logs.set_up("debug", "warning")
    assert logging.getLogger().level == logging.DEBUG and logging.getLogger("sanic.error").level == logging.WARNING
    logs.set_up("ERROR", "trace")
    assert logging.getLogger().level == logging.ERROR and logging.getLogger("sanic.access").level == logging.DEBUG


@pytest.mark.parametrize("levels, says", [(("loud",), "VLLM_LOGGING_LEVEL"), (("info", "loud"), "--uvicorn-log-level")])
def test_an_unknown_level_names_where_it_came_from(levels, says):
    with pytest.raises(ConfigError, match=says):
        logs.set_up(*levels)


def test_a_text_cannot_forge_a_line():
    formatter = logs.OneLine("%(levelname)s %(message)s")
    record = logging.LogRecord("a", logging.INFO, "", 0, "got %s", ("x\nERROR \x1b[31mforged\r",), None)
    assert formatter.format(record) == "INFO got x\\nERROR \\x1b[31mforged\\r"


# In a process of its own: a new configuration closes every handler there is, the test runner's among them.
TRY = """
import logging, sys
from runtime import logs
from runtime.errors import ConfigError
for path in sys.argv[1:]:
    try:
        logs.set_up(config_file=path)
        logging.getLogger("runtime").info("hello")
        print("taken")
    except ConfigError as error:
        print(error)
"""


def test_a_file_takes_over_and_a_bad_one_is_named(tmp_path):
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "lines"), "level": "INFO"}
    good = {"version": 1, "handlers": {"file": handler}, "root": {"handlers": ["file"], "level": "INFO"}}
    bad = ["{", "[]", '{"version": 2}', '{"version": 1, "root": {"handlers": ["none"]}}']
    paths = []
    for number, text in enumerate([json.dumps(good), *bad]):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(text)
    paths.append(tmp_path / "missing.json")
    done = subprocess.run(
        [sys.executable, "-c", TRY, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    first, *others = done.stdout.splitlines()
    assert first == "taken" and (tmp_path / "lines").read_text() == "hello\n"
    assert len(others) == len(paths) - 1
    for path, line in zip(paths[1:], others, strict=True):
        assert line.startswith(f"--log-config-file {path} is no logging configuration in JSON: ")
