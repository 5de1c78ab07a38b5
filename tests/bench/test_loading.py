"""A load that holds too much beside the weights fails the bench; its rows have the fastest run and the most memory."""

import json
import sys

import pytest

from tests.bench import loading

MB = 10**6


@pytest.mark.parametrize(("beside", "code"), [(499 * MB, 0), (501 * MB, 1)])
def test_a_row_over_the_limit_fails(beside, code, monkeypatch, tmp_path, capsys):
    loads = []

    def measure(model, cache, *, devices=1, processes=1, quantization="", stacked=False):
        loads.append(devices)
        peak = beside if len(loads) == 3 else 100 * MB  # of one run of the first row
        first = {"seconds": 10.0 - len(loads) % 2, "before": 50 * MB, "peak": 1000 * MB + peak}
        return [first | {"weights": 1000 * MB, "beside": peak}] * processes

    monkeypatch.setattr(loading, "measure", measure)
    monkeypatch.setattr(loading, "make_checkpoint", lambda folder, num_bytes: num_bytes)
    words = [
        "--gigabytes",
        "0.001",
        "--kinds",
        "bf16",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "rows.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["loading", *words])
    monkeypatch.setattr(loading.shutil, "rmtree", lambda *args, **kwargs: None)
    assert loading.main() == code
    assert ("bf16 from safetensors on 1 held 478 MiB beside" in capsys.readouterr().out) == bool(code)
    first, *_ = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert first["beside"] == beside and first["seconds"] == 9.0
