"""Some of the published builds compile for TPUs in the fast tests too; `make tpu` compiles them all.

In a process of their own, which alone finds libtpu in the folder where `make test` puts it.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from published import FAST

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "tpu"
TEST = "tests/runtime/test_builds.py::test_steps_fit_and_copy_neither_pages_nor_weights"


def what_is_missing(path: list[str]) -> str:
    """Why nothing can be compiled for a TPU with what is there, or ""."""
    (wanted,) = (Requirement(r) for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu"))
    found = [each.version for each in importlib.metadata.distributions(name="libtpu", path=path)]
    if found and found[0] in wanted.specifier:
        return ""
    has = f"libtpu {found[0]} is there" if found else "libtpu is not there"
    return f"{has}, and JAX compiles for TPUs with {wanted.name}{wanted.specifier}: make .cache/tpu/.ready fetches it"


def test_some_published_models_compile_for_tpus():
    path = [str(FOLDER), *sys.path]
    if reason := what_is_missing(path):
        pytest.skip(reason)
    environment = {name: of for name, of in os.environ.items() if not name.startswith(("PYTEST", "XLA_FLAGS"))}
    tests = [f"{TEST}[{build}]" for build in FAST]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "tpu", *tests],
        env=environment | {"PYTHONPATH": str(FOLDER)}, cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0 and f"{len(FAST)} passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


def test_a_missing_compiler_is_said(tmp_path):
    assert re.fullmatch(
        r"libtpu is not there, .* libtpu==0\..*: make \.cache/tpu/\.ready .*", what_is_missing([str(tmp_path)])
    )
    other = tmp_path / "libtpu-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: libtpu\nVersion: 0.0.1\n")
    assert what_is_missing([str(tmp_path)]).startswith("libtpu 0.0.1 is there, and JAX")
