"""One real engine behind a real server, shared by the tests of traffic."""

import asyncio

import pytest
import tiny
from live_server import LiveServer
from quick_compile import fully_compiled

from openai_api.config import ServerConfig
from runtime.async_engine import AsyncEngine
from runtime.config import EngineConfig


@pytest.fixture(scope="session")
def server(tmp_path_factory, worker_id):
    folder, base = tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model")), tmp_path_factory.getbasetemp()
    steps = base / "steps" if worker_id == "master" else base.parent / "steps"  # of all processes
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=64,
        block_size=4,
        num_gpu_blocks_override=400,  # fewer than 16 long rows need, so that some are preempted
        scheduling_policy="priority",
        cache_dir=str(steps),
    )
    with fully_compiled():
        engine = AsyncEngine.start(config)
    flags = ServerConfig(
        served_names=["tiny"],
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        trust_request_chat_template=True,
    )
    live = LiveServer(engine, flags)
    live.call(attach(engine))
    yield live
    live.close()
    engine.stop()


async def attach(engine):
    engine.attach(asyncio.get_running_loop())
