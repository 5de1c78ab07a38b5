"""Hosts of one model find each other, refuse those that differ, and notice when one is gone; no device is involved."""

import dataclasses
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime import agreement, channel, hosts, leader
from runtime.buckets import Bucket
from runtime.channel import Channel, Gone
from runtime.config import EngineConfig, Memory
from runtime.errors import ConfigError, EngineStopped
from runtime.follower import Follower
from runtime.hosts import Hosts, Place
from runtime.leader import Leader

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"jax": "0.12", "max_model_len": "64"}
SLURM = {"JOB_ID": "7", "STEP_NODELIST": "node[003-004]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"nnodes": 0}, "--nnodes 0 must be at least 1"),
        ({"node_rank": 1}, "--node-rank 1 needs --nnodes"),
        ({"headless": True}, "give --nnodes too"),
        ({"nnodes": 2}, "--nnodes 2 needs --node-rank here: neither a TPU pod slice nor"),
        ({"nnodes": 2, "node_rank": 1}, "--nnodes 2 needs --master-addr here"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, "--node-rank 2 is not one of 2 hosts"),
        ({"nnodes": 2, "node_rank": -1}, "--node-rank -1 is not one of 2 hosts"),
        ({"nnodes": 2, "node_rank": 0, "headless": True}, "--headless on rank 0 would leave nobody"),
        ({"nnodes": 2, "node_rank": 0, "master_port": 65535}, "choose one from 1 to 65534"),
    ],
)
def test_a_place_that_cannot_be_is_refused(asked, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        Hosts(**asked).settle()


def test_a_host_alone_has_no_place():
    assert Hosts().settle() is None and Hosts(node_rank=0).settle() is None


def test_flags_say_the_place():
    assert Hosts(nnodes=2, node_rank=0).settle() == Place(0, 2, "127.0.0.1", 29501)
    asked = Hosts(nnodes=3, node_rank=2, master_addr="10.0.0.1", master_port=7000, headless=True)
    assert asked.settle() == Place(2, 3, "10.0.0.1", 7000)


def test_a_cluster_says_the_place_that_flags_leave_out(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert Hosts(nnodes=2).settle() == Place(1, 2, "node003", 29501)
    assert Hosts(nnodes=2, master_addr="10.0.0.1").settle() == Place(1, 2, "10.0.0.1", 29501)
    with pytest.raises(ConfigError, match="--nnodes is 4, and this cluster runs 2 processes"):
        Hosts(nnodes=4).settle()


def connected():
    """Two ends of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]


@pytest.fixture
def pair():
    ends = [Channel(end, "the other") for end in connected()]
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [np.arange(7, dtype=np.int32)],
        [np.int32(3)[()], np.zeros((0, 4), np.float32), np.array([[True, False]]), np.full((3, 2), 2**31, np.uint32)],
        [np.arange(3_000_000, dtype=np.int32)],
    ],
)
def test_arrays_arrive_as_they_were(pair, arrays):
    arrays = [np.asarray(array) for array in arrays]
    sender = threading.Thread(target=lambda: pair[0].send("step", *arrays, bucket="decode 8x8"))
    sender.start()
    message, found = pair[1].receive()
    sender.join()
    assert message == {"kind": "step", "bucket": "decode 8x8"} and len(found) == len(arrays)
    for array, expected in zip(found, arrays, strict=True):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", channel._PREFIX.pack(2, 0) + b"[]", channel._PREFIX.pack(9, 0) + b"not JSON!"]
)
def test_a_stranger_is_not_listened_to(data):
    ours, theirs = connected()
    with theirs:
        theirs.sendall(data)
        listens = Channel(ours, "a stranger")
        with pytest.raises(Gone, match="no message of ours"):
            listens.receive()
        listens.close()


def test_an_end_is_noticed_at_once(pair):
    pair[0].close()
    with pytest.raises(Gone, match="it ended the connection"):
        pair[1].receive()
    with pytest.raises(Gone):
        for _ in range(3):
            pair[1].send("step")


def test_silence_is_noticed_and_a_sign_of_life_is_none(pair, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_S", 0.3)
    monkeypatch.setattr(channel, "BEAT_S", 0.05)
    pair[0].keep_alive()
    pair[1].keep_alive()
    threading.Timer(0.8, pair[0].send, ["step"]).start()
    start = time.monotonic()
    assert pair[1].receive()[0] == {"kind": "step"} and time.monotonic() - start > 0.7
    monkeypatch.setattr(pair[0], "send", lambda *_: None)  # as a process that was stopped
    with pytest.raises(Gone, match="said nothing"):
        pair[1].receive()


def free_port():
    """A port that is free, as the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                hosts.check_port(port + 1)
                return port
            except ConfigError:
                continue


@pytest.fixture
def join(monkeypatch):
    """Starts a leader that waits for `count` - 1 others, on a thread; JAX is not asked."""
    monkeypatch.setattr(Place, "start_jax", lambda self: None)
    monkeypatch.setattr(os, "_exit", lambda code: None)  # followers are in this process here
    opened = []

    def start(count=2):
        place, outcome = Place(0, count, "127.0.0.1", free_port()), queue.Queue()
        company = Leader(place, on_loss=lambda why: outcome.put(("lost", why)))
        opened.append(company)

        def wait():
            try:
                outcome.put(("joined", company.join(FACTS)))
            except Exception as error:
                outcome.put(("failed", error))

        threading.Thread(target=wait, daemon=True).start()
        return company, outcome

    yield start
    for company in opened:
        company._listener.close()
        for connection in company._channels.values():
            connection.close()
    for _ in range(20):  # a thread that joins starts one that listens, which must not outlive the patch of os._exit
        if not (left := [t for t in threading.enumerate() if t.name.startswith("host ")]):
            break
        left[0].join(2)


def follower(company, rank=1):
    return Follower(Place(rank, company.place.count, "127.0.0.1", company.place.port))


def test_a_host_that_differs_is_refused_with_both_values_and_may_come_again(join, caplog):
    company, outcome = join()
    with pytest.raises(ConfigError, match=r"refuses this host: max_model_len is '64' on host 0 and '32' on host 1$"):
        follower(company).join(FACTS | {"max_model_len": "32"})
    assert "max_model_len is '64' on host 0 and '32' on host 1" in caplog.text
    with pytest.raises(ConfigError, match="jax is '0.12' on host 0 and None on host 1"):
        follower(company).join({"max_model_len": "64"})
    with pytest.raises(ConfigError, match="its rank is 5; those of the others are 1 to 1"):
        follower(company, rank=5).join(FACTS)
    assert outcome.empty()
    follower(company).join(FACTS)
    assert outcome.get(timeout=10) == ("joined", None)


def test_a_rank_is_given_once(join):
    company, outcome = join(3)
    others = [follower(company, 1), follower(company, 2)]
    first = threading.Thread(target=others[0].join, args=(FACTS,), name="host joins", daemon=True)
    first.start()
    while not company._channels:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=r"rank 1 has joined before, from 127\.0\.0\.1"):
        follower(company, 1).join(FACTS)
    others[1].join(FACTS)
    first.join(10)
    assert outcome.get(timeout=10) == ("joined", None)


def test_a_host_that_left_before_all_were_there_is_replaced(join, caplog):
    company, outcome = join(3)
    with socket.create_connection(("127.0.0.1", company.place.port)) as connection:
        leaves = Channel(connection, "host 0")
        leaves.send("hello", rank=1, facts=FACTS)
        while not company._channels:
            time.sleep(0.01)
        leaves.close()
    threads = [
        threading.Thread(target=follower(company, i).join, args=(FACTS,), name="host joins", daemon=True)
        for i in (2, 1)
    ]
    for thread in threads:
        thread.start()
    assert outcome.get(timeout=10) == ("joined", None)
    assert "host 1 (127.0.0.1) left before all were here" in caplog.text


def test_a_stranger_does_not_keep_hosts_from_joining(join, caplog):
    company, outcome = join()
    with socket.create_connection(("127.0.0.1", company.place.port)) as stranger:
        stranger.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert stranger.recv(10) == b""
    follower(company).join(FACTS)
    assert outcome.get(timeout=10) == ("joined", None) and "did not join" in caplog.text


def test_a_port_that_is_taken_is_told():
    port = free_port()
    with socket.create_server(("", port + 1)), pytest.raises(ConfigError, match=f"port {port + 1} cannot be had"):
        Leader(Place(0, 2, "127.0.0.1", port), on_loss=print)


def joined(join, count=2):
    company, outcome = join(count)
    others = [follower(company, rank) for rank in range(1, count)]
    threads = [threading.Thread(target=other.join, args=(FACTS,), name="host joins", daemon=True) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert outcome.get(timeout=10) == ("joined", None)
    return company, others, outcome


def test_hosts_settle_on_the_least_memory_and_compare_plans(join):
    company, others, _ = joined(join, 3)
    amounts = [Memory(100, 50), Memory(90, 60), Memory(120, 40)]
    found = {}

    def tell(other, memory, plan):
        found[other.place.rank] = other.settle_memory(memory)
        other.compare(plan)

    plans = [{"num_pages": "8"}, {"num_pages": "7"}]
    threads = [
        threading.Thread(target=tell, args=each, daemon=True) for each in zip(others, amounts[1:], plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert company.settle_memory(amounts[0]) == Memory(90, 40)
    with pytest.raises(ConfigError, match="num_pages is '8' on host 0 and '7' on host 2"):
        company.compare({"num_pages": "8"})
    for thread in threads:
        thread.join(10)
    assert found == {1: Memory(90, 40), 2: Memory(90, 40)}


def test_hosts_agree_on_what_all_of_them_have(join):
    company, others, _ = joined(join, 3)
    found = {}

    def tell(other, *asked):
        found[other.place.rank] = [other.agree(names) for names in asked]

    asked = {1: [{"own", "whole"}, set()], 2: [{"whole"}, {"sound"}]}
    threads = [threading.Thread(target=tell, args=(other, *asked[other.place.rank]), daemon=True) for other in others]
    for thread in threads:
        thread.start()
    assert company.agree({"own", "whole"}) == {"whole"} and company.agree({"sound"}) == set()
    for thread in threads:
        thread.join(10)
    assert found == {1: [{"whole"}, set()], 2: [{"whole"}, set()]}


def test_a_host_that_ends_is_named_and_no_step_is_told_to_it(join):
    company, others, outcome = joined(join, 3)
    others[1]._channel.close()
    assert outcome.get(timeout=10) == ("lost", "host 2 of 3 (127.0.0.1) is gone: it ended the connection")
    with pytest.raises(EngineStopped, match="host 2 of 3"):
        company._tell("step")


def test_a_host_that_fails_says_why(join):
    company, (other,), outcome = joined(join)
    other.give_up("ConversionError: shard 3 is missing")
    kind, why = outcome.get(timeout=10)
    assert kind == "lost" and why.endswith("is gone: it said: ConversionError: shard 3 is missing")


def test_a_host_that_does_not_answer_is_gone(join, monkeypatch):
    monkeypatch.setattr(leader, "ANSWER_S", 0.2)
    company, _, outcome = joined(join)
    with pytest.raises(EngineStopped, match="did not answer"):
        company.settle_memory(Memory(1, 1))
    assert outcome.get(timeout=10)[0] == "lost"


FOLLOWS = """
import sys
from runtime.follower import Follower
from runtime.hosts import Place
Place.start_jax = lambda self: None
follower = Follower(Place(1, 2, "127.0.0.1", int(sys.argv[1])))
follower.join({"jax": "0.12", "max_model_len": "64"})
print("joined", flush=True)
follower._messages.get()  # as if it waited for the devices, for ever
"""


@pytest.mark.parametrize("how", ["ends", "is stopped"])
def test_a_follower_ends_with_rank_0(join, how, monkeypatch):
    monkeypatch.setattr(channel, "BEAT_S", 0.1)
    company, outcome = join()
    script = FOLLOWS if how == "ends" else f"from runtime import channel\nchannel.SILENCE_S = 1.0\n{FOLLOWS}"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(company.place.port)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert outcome.get(timeout=60) == ("joined", None)
        assert process.stdout.readline() == "joined\n"
        if how == "ends":
            company._channels[1].close()
        else:
            monkeypatch.setattr(company._channels[1], "_closed", threading.Event())
            company._channels[1]._closed.set()
            monkeypatch.setattr(company._channels[1], "send", lambda *_, **__: None)
        assert process.wait(20) == 1
        why = "it ended the connection" if how == "ends" else "it said nothing"
        assert re.search(rf"^error: host 0 \(127\.0\.0\.1\) is gone: {why}", process.stderr.read(), re.M)


@dataclasses.dataclass
class Loaded:
    """What a leader and a follower use of runtime.loading.Loaded."""

    steps: Any
    load_history: Any
    load_tables: Any
    new_state: Any
    usual_tables: Any
    no_mask: Any
    weights: Any = None
    state: Any = "state"


class Devices:
    """Programs that write down what they were called with."""

    def __init__(self):
        self.calls = []

    def program(self, name, result):
        def run(*args):
            arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, np.ndarray | np.generic)]
            self.calls.append((name, [np.asarray(array).tolist() for array in arrays]))
            if any(isinstance(arg, str) and arg == "broken" for arg in args):
                raise RuntimeError("the device is on fire")
            return result

        return run

    def loaded(self, **changes):
        return Loaded(
            steps={Bucket(8, 8, True): self.program("step", ("state", "out"))},
            load_history=self.program("load_history", "state"),
            load_tables=self.program("load_tables", changes.get("after_tables", "state")),
            new_state=self.program("new_state", "state"),
            usual_tables={"bias": np.zeros(2, np.float32), "ids": np.zeros(3, np.int32)},
            no_mask={8: jnp.zeros((8, 2), jnp.uint32)},
        )


def test_followers_run_what_rank_0_runs_in_its_order(join, monkeypatch):
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    company, (other,), _ = joined(join)
    here, there = Devices(), Devices()
    thread = threading.Thread(target=other.follow, args=(there.loaded(),), daemon=True)
    thread.start()
    led = company.led(here.loaded())
    ((bucket, step),) = led.steps.items()
    tables = {"bias": np.array([0.5, 2.0], np.float32), "ids": np.array([4, 5, 6], np.int32)}
    led.load_tables("state", np.int32(3), tables)
    led.load_history("state", np.int32(3), np.arange(4, dtype=np.int32))
    step(led.weights, "state", np.arange(9, dtype=np.int32), led.no_mask[8])
    step(led.weights, "state", np.arange(9, dtype=np.int32), np.full((8, 2), 7, np.uint32))
    led.new_state()
    assert [name for name, _ in there.calls] == ["load_tables", "load_history", "step", "step", "new_state"]
    assert there.calls == here.calls
    company.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_a_step_that_fails_on_a_follower_is_told_and_repaired(join, caplog):
    company, (other,), outcome = joined(join)
    there = Devices()
    threading.Thread(target=other.follow, args=(there.loaded(after_tables="broken"),), daemon=True).start()
    led = company.led(Devices().loaded())
    ((_, step),) = led.steps.items()
    packed = np.arange(3, dtype=np.int32)
    led.load_tables("state", np.int32(0), led.usual_tables)  # what its next step gets is broken
    for _ in range(3):
        step(led.weights, "state", packed, led.no_mask[8])
    led.new_state()
    step(led.weights, "state", packed, led.no_mask[8])
    led.new_state()
    assert [name for name, _ in there.calls] == ["load_tables", "step", "new_state", "step", "new_state"]
    assert "host 1: a step failed: RuntimeError: the device is on fire" in caplog.text and outcome.empty()


def test_facts_name_every_option_that_changes_a_program():
    config = EngineConfig(model="here", cache_dir="there", tensor_parallel_size=4)
    checkpoint = type("Checkpoint", (), {"fingerprint": lambda self, dated: f"content {dated}"})()
    found = agreement.facts(Place(0, 2, "a", 1), config, checkpoint)
    other = agreement.facts(Place(1, 2, "b", 2), EngineConfig(model="elsewhere", tensor_parallel_size=2), checkpoint)
    assert agreement.differences(found, found, "host 1") == ""
    assert agreement.differences(found, other, "host 1") == "tensor_parallel_size is '4' on host 0 and '2' on host 1"
    assert {"jax", "jaxlib", "XLA_FLAGS", "the model's files", "kv_cache_dtype", "nnodes"} <= found.keys()
