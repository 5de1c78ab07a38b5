"""Two processes with a device each serve one model as one process does, and end together."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import tiny
from quick_compile import QUICK

from converters.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent.parent
EIGHT_HEADS = {"num_attention_heads": 8, "head_dim": 8}
SIZES = {"max-model-len": 96, "max-num-seqs": 2, "max-num-batched-tokens": 16, "block-size": 4}
SIZES |= {"num-gpu-blocks-override": 64, "dtype": "float32", "speculative-config.num_speculative_tokens": 0}
FLAGS = [word for name, value in SIZES.items() for word in (f"--{name}", f"{value}")]
READY_S = 400
USUAL = {"max_tokens": 10, "ignore_eos": True, "return_token_ids": True}
ASKED = {
    "greedy": {"prompt": list(range(5, 40)), "temperature": 0},
    "seeded": {"prompt": list(range(7, 20)), "temperature": 1.0, "seed": 3, "top_p": 0.9},
    "two choices": {"prompt": list(range(7, 20)), "temperature": 1.0, "seed": 4, "n": 2},
    "with its own tables": {"prompt": [9, 8, 7], "temperature": 0, "logit_bias": {"11": 5.0}, "frequency_penalty": 0.5},
    "under a constraint": {"prompt": [9, 8, 7], "temperature": 0, "structured_outputs": {"regex": "[a-f]{8}"}},
}


class Host:
    """One process of a server, and what it prints."""

    def __init__(self, checkpoint, log, *flags, devices=1):
        self.log = log
        command = [sys.executable, "-m", "runtime.serve", str(checkpoint), *FLAGS, *flags]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
            "VLLM_SERVER_DEV_MODE": "1",
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def wait_for(self, words):
        end = time.monotonic() + READY_S
        while words not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def free_pair() -> int:
    """A port that is free, as is the next one: of those that no system gives out by itself."""
    for _ in range(100):
        port = secrets.choice(range(20000, 30000))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise AssertionError("no two free ports side by side")


class Server:
    """The hosts of one model, ready; `url` is where rank 0 answers."""

    def __init__(self, folder, checkpoint, *flags, count=2, devices=1, caches=None):
        with socket.create_server(("127.0.0.1", 0)) as one:
            http, master = one.getsockname()[1], free_pair()
        several = ["--nnodes", f"{count}", "--master-addr", "127.0.0.1", "--master-port", f"{master}"]
        common, caches = [*(several if count > 1 else []), *flags], caches or [folder / "cache"] * count
        rank = lambda i: ["--node-rank", f"{i}", *(["--headless"] if i else [])] if count > 1 else []
        self.url, self.hosts = f"http://127.0.0.1:{http}", []
        for i in range(count):
            listens = [] if i else ["--host", "127.0.0.1", "--port", f"{http}", "--served-model-name", "tiny"]
            self.hosts.append(
                Host(
                    checkpoint,
                    folder / f"{count}-{i}.log",
                    "--cache-dir",
                    f"{caches[i]}",
                    *common,
                    *rank(i),
                    *listens,
                    devices=devices,
                )  # fmt: skip
            )

    def __enter__(self):
        try:
            self.hosts[0].wait_for("  in all ")
            for i, host in enumerate(self.hosts[1:], 1):
                host.wait_for(f"host {i} of {len(self.hosts)} is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in self.hosts:
            host.stop()

    def post(self, path, **body):
        return httpx.post(f"{self.url}{path}", json={"model": "tiny", **body}, timeout=60, trust_env=False)

    def get(self, path):
        return httpx.get(f"{self.url}{path}", timeout=60, trust_env=False)

    def answers(self):
        """{what was asked: the tokens of each choice}."""
        found = {}
        for name, asked in ASKED.items():
            answer = self.post("/v1/completions", **USUAL | asked)
            assert answer.status_code == 200, (name, answer.text)
            found[name] = [choice["token_ids"] for choice in answer.json()["choices"]]
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return tiny.make_checkpoint("llama", folder / "checkpoint", **EIGHT_HEADS)


@pytest.fixture(scope="module")
def alone(folder, checkpoint):
    """What one process with one device answers."""
    with Server(folder, checkpoint, count=1) as server:
        yield server.answers()


@pytest.fixture(scope="module")
def pair(folder, checkpoint):
    with Server(folder, checkpoint, "-tp", "2") as server:
        yield server


def test_two_processes_give_the_tokens_of_one(pair, alone):
    assert pair.answers() == alone
    assert pair.post("/reset_prefix_cache").status_code == 200
    assert pair.answers() == alone
    lines = pair.get("/metrics").text.splitlines()
    (recompiles,) = (line for line in lines if line.startswith("runtime:recompiles_total"))
    assert recompiles.endswith(" 0.0") and any(line.startswith("vllm:prefix_cache_hits_total") for line in lines)
    assert pair.get("/health").status_code == pair.get("/ready").status_code == 200


def entries_of(*folders):
    """{entry of weights: when it was made}."""
    found = [entry for folder in folders for entry in (folder / "weights").iterdir()]
    assert all((entry / "complete").exists() for entry in found)
    return {entry: entry.stat().st_mtime_ns for entry in found}


def test_hosts_find_the_weights_that_each_of_them_kept_or_convert_all_anew(tmp_path, folder, checkpoint, pair, alone):
    """Each in a folder of its own. One host's entry is then gone, then damaged; a sound one is left as it is."""
    caches = [tmp_path / "one", tmp_path / "two"]
    for cache in caches:  # what the pair compiled: these are about weights
        shutil.copytree(folder / "cache" / "steps", cache / "steps")
    made, unused = {}, "the weights that are kept here are not used: another host"

    def start(*says):
        """The folders in which weights were kept anew."""
        with Server(tmp_path, checkpoint, "-tp", "2", caches=caches) as server:
            answer = server.post("/v1/completions", **USUAL | ASKED["greedy"]).json()
            assert [choice["token_ids"] for choice in answer["choices"]] == alone["greedy"]
            logs = [host.log.read_text() for host in server.hosts]
        for log, words in zip(logs, says, strict=True):
            assert (words in log) if words else ("not used" not in log and "converting" not in log), log
        before, now = dict(made), entries_of(*caches)
        made.clear()
        made.update(now)
        return [entry.parent.parent.name for entry, when in now.items() if before.get(entry) != when]

    assert start("", "") == ["one", "two"]
    assert start("", "") == []
    shutil.rmtree(caches[1] / "weights")
    assert start(f"{unused} has none", "") == ["two"]
    victim = max((caches[0] / "weights").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert start("is damaged; converting again", f"{unused}'s are damaged") == ["one"]


def test_a_stop_ends_both_in_order(pair):
    first, second = (host.process for host in pair.hosts)
    first.send_signal(signal.SIGTERM)
    assert (first.wait(30), second.wait(30)) == (0, 0)
    assert "host 1 of 2 stops, as host 0 has" in pair.hosts[1].log.read_text()


def test_a_host_that_dies_in_the_middle_is_named_and_ends_the_server(folder, checkpoint):
    with Server(folder, checkpoint, "-tp", "2") as server:
        first, second = server.hosts
        events = []

        def read():
            body = {"model": "tiny", "stream": True, **USUAL, **ASKED["greedy"], "max_tokens": 60}
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer,
            ):
                for line in answer.iter_lines():
                    events.extend([line.removeprefix("data: ")] if line else [])
                    if len(events) == 3:
                        second.process.send_signal(signal.SIGKILL)

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(60)
        assert not reader.is_alive() and len(events) >= 3
        assert "error" in json.loads(next(event for event in reversed(events) if event != "[DONE]")), events[-3:]
        with contextlib.suppress(httpx.HTTPError):  # it may have ended by now
            assert server.get("/health").status_code == 503
        assert first.process.wait(30) == 1
        log = first.log.read_text()
        assert "host 1 of 2 (127.0.0.1) is gone: it" in log, log
        assert "error: the engine has stopped" in log


def test_a_host_with_other_flags_is_refused_and_its_successor_served(folder, checkpoint):
    with contextlib.ExitStack() as stack:
        server = Server(folder, checkpoint, "-tp", "2")
        stack.callback(server.__exit__)
        first, second = server.hosts
        second.stop()  # before it can join
        words = first.process.args
        master = words[words.index("--master-port") + 1]
        flags = ["--cache-dir", f"{folder}/cache", "--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1"]
        other = Host(checkpoint, folder / "other.log", *flags, "--master-port", master, "-tp", "1")
        stack.callback(other.stop)
        assert other.process.wait(READY_S) == 1
        says = "refuses this host: tensor_parallel_size is '2' on host 0 and '1' on host 1"
        assert says in other.log.read_text() and "Traceback" not in other.log.read_text()
        successor = Host(checkpoint, folder / "successor.log", *flags, "--master-port", master, "-tp", "2")
        stack.callback(successor.stop)
        first.wait_for("  in all ")
        assert "tensor_parallel_size is '2' on host 0 and '1' on host 1" in first.log.read_text()
        assert server.post("/v1/completions", prompt=[5, 6], max_tokens=2).status_code == 200
        first.process.send_signal(signal.SIGKILL)
        assert successor.process.wait(30) != 0
        assert "error: host 0 (127.0.0.1) is gone: it ended the connection" in successor.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", [row.name for row in FAMILIES.values()])
def test_every_family_on_two_processes_of_two_devices(family, tmp_path):
    checkpoint = tiny.make_checkpoint(family, tmp_path / "checkpoint", **EIGHT_HEADS)
    with Server(tmp_path, checkpoint, count=1) as one:
        alone = one.answers()
    with Server(tmp_path, checkpoint, "-tp", "4", devices=2) as two:
        assert two.answers() == alone
