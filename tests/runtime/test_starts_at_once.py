"""Servers that start at the same time on one cache folder keep one set of weights and of steps, and all answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import one_start
import tiny

from runtime import weights

ROOT = Path(__file__).resolve().parents[2]


def test_two_starts_at_once_share_a_cache_folder(tmp_path, monkeypatch):
    model, cache, gate = (str(tmp_path / name) for name in ("model", "cache", "gate"))
    tiny.make_checkpoint("llama", model)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    command = [sys.executable, str(ROOT / "tests" / "support" / "one_start.py"), model, cache, gate]
    servers = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for server in servers:
            assert server.stdout.readline() == "here\n"  # all is imported: neither is ahead
        Path(gate).touch()
        first, second = (json.loads(server.communicate(timeout=300)[0]) for server in servers)
    finally:
        for server in servers:
            server.kill()
    assert len(first["tokens"]) == 8 and first["tokens"] == second["tokens"]
    for name in ("weights", "steps"):
        assert len(list((Path(cache) / name).iterdir())) == 1, name  # whole, and nothing unfinished beside it
    monkeypatch.setattr(weights, "load_weights", None)  # what is kept is not converted again
    third = one_start.start(model, cache)
    assert third["tokens"] == first["tokens"]
    assert "restore steps" in third["phases"] and "restore steps" not in first["phases"] + second["phases"]
