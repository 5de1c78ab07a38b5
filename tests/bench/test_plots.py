"""Pictures are drawn of what was measured, and of a part of it."""

import json
import sys

import pytest

from tests.bench import plots

TIMES = {"p50": 20.0, "p99": None, "mean": 21.0}


def row(level):
    return {"input_len": 128, "concurrency": level, "out_tok_s": 40.0 * level, "ttft_ms": TIMES, "itl_ms": TIMES}


def draw(monkeypatch, tmp_path, **measured):
    for name, content in measured.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["plots", "--measured", str(tmp_path), "--to", str(tmp_path / "to")])
    return plots.main()


SCALE = {"rows": [row(1), row(8), row(1) | {"input_len": 512}]}
SERVE = {
    "bfloat16": {"results": {"1:128:128": row(1), "1:1024:32": row(1)}},
    "peer": {"results": {"1:128:128": row(1)}},
}


@pytest.mark.parametrize(
    ("measured", "files"),
    [
        ({"scale": SCALE, "serve": SERVE}, ["latency.svg", "throughput.svg"]),
        ({"serve": SERVE}, ["throughput.svg"]),
        ({"scale": SCALE}, ["latency.svg", "throughput.svg"]),
    ],
)
def test_what_was_measured_is_drawn(monkeypatch, tmp_path, measured, files):
    assert draw(monkeypatch, tmp_path, **measured) == 0
    drawn = sorted((tmp_path / "to").iterdir())
    assert [file.name for file in drawn] == files
    assert all("requests at once" in file.read_text() for file in drawn)


def test_nothing_measured_is_said(monkeypatch, tmp_path, capsys):
    assert draw(monkeypatch, tmp_path) == 1
    assert "run make bench" in capsys.readouterr().err
