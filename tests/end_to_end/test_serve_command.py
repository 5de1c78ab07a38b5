"""`python -m runtime.serve` on a tiny checkpoint: what a person does first, as a person does it."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "tests" / "examples"
SMALL = ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
START_LIMIT_S = 240  # a cold machine compiles kernels and steps first


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server: its process, its log and its address."""
    folder = tmp_path_factory.mktemp("served")
    checkpoint = tiny.make_checkpoint("llama", folder / "checkpoint")
    # The user's folder holds ./models, as theirs often do.
    (folder / "models").mkdir()
    command = [sys.executable, "-m", "runtime.serve", str(checkpoint), "--host", "127.0.0.1", "--port", "0", *SMALL]
    command += ["--served-model-name", "SmolLM2-135M-Instruct", "tiny"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )
        try:
            process.log = folder / "log"
            end = time.monotonic() + START_LIMIT_S
            while "  in all " not in process.log.read_text():
                assert process.poll() is None and time.monotonic() < end, process.log.read_text()
                time.sleep(0.05)
            process.url = re.search(r"is ready at (\S+)", process.log.read_text())[1]
            yield process
        finally:
            process.kill()
            process.wait()


def test_the_banner_tells_the_plan(server):
    banner = server.log.read_text().split("is ready at")[1]
    for words in ("max_model_len", "num_pages", "weights", "seconds: "):
        assert words in banner


def test_answers_carry_no_header_without_a_meaning(server):
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as answer:
        assert answer.headers["content-type"] == "application/json" and "" not in answer.headers.values()


@pytest.mark.skipif(not shutil.which("curl"), reason="runs the printed command")
def test_the_curl_line_works_as_printed(server):
    line = next(line.strip() for line in server.log.read_text().splitlines() if line.strip().startswith("curl "))
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60)
    assert '"object":"chat.completion"' in done.stdout.replace('": "', '":"'), done


def test_the_client_of_the_readme_works(server, tmp_path, capsys):
    text = (EXAMPLES / "client.py").read_text()
    assert "http://localhost:8000" in text
    example = tmp_path / "client.py"
    example.write_text(text.replace("http://localhost:8000", server.url))
    runpy.run_path(str(example))
    assert capsys.readouterr().out.endswith("\n")


def test_a_stop_is_quick_and_clean(server):
    sent = time.monotonic()
    server.send_signal(signal.SIGTERM)
    assert server.wait(10) == 0 and time.monotonic() - sent < 5
    assert "Traceback" not in server.log.read_text()
