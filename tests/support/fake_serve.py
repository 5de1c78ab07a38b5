"""`python fake_serve.py [flags]`: runtime.serve over an engine and an app that only pretend.

What it pretends comes from the environment: FAKE_LOAD_S seconds of loading, FAKE_LOAD_ERROR a message to fail
with, FAKE_CHILD a file that gets the process id of a child started while loading, FAKE_SICK a file that makes
the engine unhealthy while it exists. GET /work?s=1.5 is a request that takes so long.
"""

import asyncio
import os
import subprocess
import sys
import time
import types

import sanic

import runtime.serve
from runtime.errors import ConfigError


class AsyncEngine:
    def __init__(self):
        self.engine = types.SimpleNamespace(
            plan=types.SimpleNamespace(reasons=(("max_model_len", "4,096", "asked"),)),
            loaded=types.SimpleNamespace(seconds={"weights": 0.1}),
        )
        self.num_in_flight = 0
        self.aborted = asyncio.Event()
        self.draining = False

    @classmethod
    def start(cls, config, progress=None, leader=None):
        progress("weights", 0, 2)
        if path := os.environ.get("FAKE_CHILD"):
            child = subprocess.Popen(["sleep", "60"])
            with open(path, "w") as file:
                file.write(str(child.pid))
        time.sleep(float(os.environ.get("FAKE_LOAD_S", 0)))
        if message := os.environ.get("FAKE_LOAD_ERROR"):
            raise (ConfigError if "remedy" in message else KeyError)(message)
        progress("weights", 2, 2)
        progress("decode 8", 1, 1)
        return cls()

    def attach(self, loop):
        self.loop = loop

    @property
    def is_healthy(self):
        return not os.path.exists(os.environ.get("FAKE_SICK", "/nonexistent"))

    @property
    def is_accepting(self):
        return self.is_healthy and not self.draining

    def drain(self):
        self.draining = True

    def abort_all(self):
        self.aborted.set()

    def stop(self):
        pass


def create_app(engine, config):
    app = sanic.Sanic("fake", configure_logging=False)
    app.config.MOTD = False

    @app.get("/health")
    async def health(request):
        return sanic.empty(200 if engine.is_accepting else 503)

    @app.get("/work")
    async def work(request):
        engine.num_in_flight += 1
        try:
            await asyncio.wait_for(engine.aborted.wait(), float(request.args.get("s")))
            return sanic.text("cut off", 503)
        except TimeoutError:
            return sanic.text("done")
        finally:
            engine.num_in_flight -= 1

    return app


def module(name, **names):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(names)


module("openai_api.app", create_app=create_app)
module("runtime.async_engine", AsyncEngine=AsyncEngine)
runtime.serve.WATCH_S = 0.2

if __name__ == "__main__":
    sys.exit(runtime.serve.main())
