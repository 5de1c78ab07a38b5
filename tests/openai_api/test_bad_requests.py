"""Every bad request of the table is refused in words, costs the engine nothing, and leaves a neighbour's stream alone.

One stream runs from the first row to the last. It is given one step a row, so the engine's steps can be counted.
"""

import asyncio
import json
import re
import threading

import bad_requests
import pytest
import tiny
from live_server import LiveServer

from openai_api.config import ServerConfig
from runtime.async_engine import AsyncEngine
from runtime.config import EngineConfig

ROWS = bad_requests.rows()
STREAM = {"prompt": "Hello world", "max_tokens": 480, "seed": 7, "ignore_eos": True, "return_token_ids": True}
NOT_FOR_CALLERS = re.compile(r"0x[0-9a-f]{6,}|Traceback|File \"|site-packages|\.py\b|https://errors\.pydantic")
MAX_STEPS_HELD = 300  # so that the stream cannot end before the rows do


class Stepped:
    """Counts an engine's steps and the choices it was given; while held, a step waits to be allowed."""

    def __init__(self, engine):
        self.num_steps = self.num_added = 0
        self.allowed = threading.Semaphore(0)
        self.is_held = False
        self._step, self._add = engine.step, engine.add
        engine.step, engine.add = self.step, self.add

    def step(self):
        if self.is_held:
            self.allowed.acquire()
        self.num_steps += 1
        return self._step()

    def add(self, choices):
        self.num_added += len(choices)
        self._add(choices)

    def release(self):
        self.is_held = False
        self.allowed.release()


class Bystander:
    """A stream that is open while the rows run."""

    def __init__(self, server, stepped):
        self.server, self.stepped, self.token_ids = server, stepped, []
        self.error = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        *chunks, _ = self.server.events(bad_requests.COMPLETIONS, STREAM)
        self.error = next((chunk["error"] for chunk in chunks if "error" in chunk), None)
        self.token_ids = [i for chunk in chunks for part in chunk["choices"] for i in part["token_ids"]]

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 16, "num_gpu_blocks_override": 80}
    engine = AsyncEngine.start(EngineConfig(model=str(folder), dtype="float32", cache_dir="", **sizes))
    live = LiveServer(engine, ServerConfig(served_names=["tiny"]))
    live.call(attach(engine))
    yield live
    live.close()
    engine.stop()


async def attach(engine):
    engine.attach(asyncio.get_running_loop())


@pytest.fixture(scope="module")
def stepped(server):
    """Steps with a stream beside the rows; at the end they are those of the stream alone."""
    stepped = Stepped(server.engine.engine)
    alone = Bystander(server, stepped)
    alone.join()
    expected, num_steps = alone.token_ids, stepped.num_steps
    assert len(expected) == STREAM["max_tokens"]
    stepped.is_held = True
    beside = Bystander(server, stepped)
    server.wait_for(lambda: server.engine.num_in_flight == 1)
    yield stepped
    stepped.release()
    beside.join()
    assert beside.error is None and beside.token_ids == expected
    assert stepped.num_steps == 2 * num_steps and stepped.num_added == 2


def send(server, row):
    body = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    return server.client.request(row.method, row.path, content=body, headers=row.headers)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_bad_request_is_refused_and_costs_nothing(server, stepped, row):
    if stepped.num_steps < MAX_STEPS_HELD:
        stepped.allowed.release()
    response = send(server, row)
    assert response.status_code == row.status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["type"], error["param"]) == (row.status, row.kind, row.param), error
    assert row.says in error["message"] and len(error["message"]) < 2000
    assert not NOT_FOR_CALLERS.search(error["message"])
    assert server.engine.num_in_flight == 1, "the stream goes on, and nothing was queued beside it"


def test_the_table_is_long_enough():
    assert len(ROWS) >= 120 and len({str(row) for row in ROWS}) > 250
