"""aiperf: https://github.com/ai-dynamo/aiperf"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients
NUM_REQUESTS, NUM_TOKENS = 12, 10


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_profile(server, checkpoint, tmp_path, endpoint):
    words = [str(Path(sys.executable).parent / "aiperf"), "profile", "--model", server.model, "--url", server.root]
    words += ["--endpoint-type", endpoint, "--streaming", "--tokenizer", str(checkpoint), "--random-seed", "1"]
    words += ["--request-count", str(NUM_REQUESTS), "--concurrency", "4", "--ui", "none"]
    words += ["--synthetic-input-tokens-mean", "40", "--output-tokens-mean", str(NUM_TOKENS)]
    words += ["--extra-inputs", f"min_tokens:{NUM_TOKENS}", "--extra-inputs", "ignore_eos:true"]
    words += ["--artifact-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(next(tmp_path.rglob("profile_export_aiperf.json")).read_text())
    assert found["request_count"]["avg"] == NUM_REQUESTS and not found.get("error_summary")
    for name in ("time_to_first_token", "inter_token_latency", "request_latency", "output_token_throughput"):
        assert found[name]["avg"] > 0, name
