"""How the CPU's kernels get to the disk; what compiles them is replaced by commands that leave a trace."""

import logging
import os
import subprocess
import sys

import numba
import pytest

from pallas_kernels.cpu import build


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path


def leave_trace(folder, name):
    return f"open({str(folder / name)!r}, 'a').write('.')"


def test_kernels_are_compiled_once(folder):
    for _ in range(2):
        build.compile_apart([leave_trace(folder, "one"), leave_trace(folder, "other")])
    assert (folder / "one").read_text() == (folder / "other").read_text() == "."


def test_a_process_that_fails_is_reported_and_asked_again(folder, caplog):
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            build.compile_apart([f"{leave_trace(folder, 'one')}; raise ValueError('no such instruction')"])
    assert (folder / "one").read_text() == ".."
    assert caplog.text.count("no such instruction") == 2


def test_processes_that_start_together_compile_once(folder):
    command = f"import time; time.sleep(1); {leave_trace(folder, 'one')}"
    start = f"from pallas_kernels.cpu import build; build.compile_apart([{command!r}])"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "kernels")}
    running = [subprocess.Popen([sys.executable, "-c", start], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert (folder / "one").read_text() == "."


def test_without_a_folder_to_write_no_process_is_started(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    build.compile_apart([leave_trace(tmp_path, "one")])
    assert not (tmp_path / "one").exists()
