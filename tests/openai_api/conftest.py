import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.config import ServerConfig


@pytest.fixture
def serve():
    """Starts servers: serve(engine options…, config={…}) -> LiveServer."""
    servers = []

    def start(script="Hello world, this is a test.", *, config=None, **options):
        config = {"trust_model_template": True} | (config or {})  # else each server starts a process for it
        server = LiveServer(FakeEngine(script, **options), ServerConfig(**config))
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(serve):
    return serve()
