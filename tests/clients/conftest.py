"""A real server for other people's clients.

`make clients` runs each file here in an environment that holds that client; a file whose client is not installed is
not collected. The environment of the server itself is named by two variables:

    SERVER_PYTHON     its interpreter; the one that runs the tests when it is not set
    CLIENTS_MODEL     what it serves; a tiny model of random weights when it is not set
"""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from server_process import ROOT, ServerProcess

FILES = {
    "test_aiperf.py": "aiperf",
    "test_generated.py": "openapi_python_client",
    "test_instructor.py": "instructor",
    "test_langchain.py": "langchain_openai",
    "test_litellm.py": "litellm",
    "test_lm_eval.py": "lm_eval",
    "test_openai_client.py": "openai",
}
collect_ignore = [name for name, package in FILES.items() if importlib.util.find_spec(package) is None]

PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)
MAKE_TINY = "import sys, tiny; tiny.make_checkpoint('llama', sys.argv[1], max_position_embeddings=4096)"
FLAGS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-tokenizer-info-endpoint"]
FLAGS += ["--host", "127.0.0.1", "--port", "0", "--served-model-name", "tiny", "--max-model-len", "4096"]
# White space is left out, or random weights would write little else.
FLAGS += ["--max-num-seqs", "8", "--structured-outputs-config", '{"disable_any_whitespace": true}']


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny model, made where its libraries are."""
    folder = tmp_path_factory.mktemp("tiny")
    places = os.pathsep.join([str(ROOT), str(ROOT / "http"), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": places, "JAX_PLATFORMS": "cpu"}
    subprocess.run([PYTHON, "-c", MAKE_TINY, str(folder)], cwd=ROOT, env=environment, check=True, timeout=300)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint):
    """url: of the API, without a slash at its end. model: the served name."""
    model = os.environ.get("CLIENTS_MODEL", str(checkpoint))
    with ServerProcess([PYTHON, "-m", "runtime.serve", model, *FLAGS], ready_s=300) as process:
        yield types.SimpleNamespace(root=process.url, url=f"{process.url}/v1", model="tiny")
