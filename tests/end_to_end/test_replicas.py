"""Two replicas in one server: requests are spread over them, and every route is about both."""

import concurrent.futures
import re
import time

import httpx
import pytest
import server_process
import tiny
from quick_compile import QUICK

FLAGS = "--max-model-len 256 --max-num-seqs 2 --max-num-batched-tokens 16 --block-size 4 --num-gpu-blocks-override 128"
FLAGS += " --dtype float32 --speculative-config.num_speculative_tokens 0 --served-model-name tiny -dp 2"
TWO_DEVICES = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
    "JAX_PLATFORMS": "cpu",
    "VLLM_SERVER_DEV_MODE": "1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    checkpoint = str(tiny.make_checkpoint("llama", folder / "checkpoint"))
    flags = [*FLAGS.split(), "--cache-dir", f"{folder}/cache"]
    with server_process.ours(checkpoint, *flags, environment=TWO_DEVICES, ready_s=400) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def ask(client, number, **changes):
    body = {"model": "tiny", "prompt": list(range(5 + number, 30 + number)), "max_tokens": 12, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body | {"return_token_ids": True, "temperature": 0} | changes)
    assert answer.status_code == 200, answer.text
    return [choice["token_ids"] for choice in answer.json()["choices"]]


def by_engine(client, name, label=""):
    """{engine: value} of the metric's samples that have the label."""
    found = re.findall(rf'^{name}{{.*engine="(\d)".*{label}.*}} (\S+)$', client.get("/metrics").text, re.M)
    return {engine: float(value) for engine, value in found}


def test_the_plan_says_that_there_are_two(server):
    assert re.search(r"replicas +2 +asked: each with its own devices", server.banner)


def test_tokens_do_not_depend_on_the_replica(client):
    seeded = {"temperature": 1.0, "seed": 5, "n": 2}
    alone = [ask(client, number, **changes) for number in range(4) for changes in ({}, seeded)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, client, n, **changes) for n in range(4) for changes in ({}, seeded)]
        assert [each.result() for each in asked] == alone
    assert min(by_engine(client, "vllm:generation_tokens_total").values()) > 0
    assert by_engine(client, "runtime:recompiles_total") == {"0": 0.0}
    finished = by_engine(client, "vllm:request_success_total", 'finished_reason="length"')
    assert sum(finished.values()) == 2 * 4 * (1 + 2) and len(by_engine(client, "vllm:num_requests_running")) == 2


def test_a_conversation_comes_back_to_its_pages_until_they_are_reset(client):
    prompt = list(range(40, 200))
    ask(client, 0, prompt=prompt)
    hits = lambda: sum(by_engine(client, "vllm:prefix_cache_hits_total").values())
    before = hits()
    for turn in range(3):
        ask(client, 0, prompt=[*prompt, 7 + turn, 8])
    assert hits() - before >= 3 * 150
    assert client.post("/reset_prefix_cache").status_code == 200
    before = hits()
    ask(client, 0, prompt=prompt)
    assert hits() == before


def test_clients_that_leave_free_their_rows_on_both(client, server):
    """Four long streams fill both replicas, two rows each; all are broken off, but for one that a busy machine ends."""
    ended = lambda how: by_engine(client, "vllm:request_success_total", f'finished_reason="{how}"')
    whole = ended("length")
    body = {"model": "tiny", "max_tokens": 220, "ignore_eos": True, "stream": True, "temperature": 0}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as other:
        streams = [other.stream("POST", "/v1/completions", json=body | {"prompt": [9 + i] * 9}) for i in range(4)]
        answers = [stream.__enter__() for stream in streams]
        for answer in answers:
            next(answer.iter_lines())
        for stream in streams:
            stream.__exit__(None, None, None)
    end = time.monotonic() + 20
    while any(by_engine(client, "vllm:num_requests_running").values()):
        assert time.monotonic() < end
        time.sleep(0.05)
    left = ended("abort")
    assert all(left.values())
    assert {name: left[name] + more - whole[name] for name, more in ended("length").items()} == {"0": 2, "1": 2}
    assert client.get("/health").status_code == 200
