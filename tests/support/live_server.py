"""A real server on 127.0.0.1, in a thread of the test's process."""

import asyncio
import contextlib
import json
import socket
import threading

import httpx

from openai_api.app import create_app
from openai_api.config import ServerConfig


class LiveServer:
    """Serves an engine until closed. `client` talks to it.

    Attributes:
        url: where it listens, without a slash at its end.
        loop: its event loop; `call` runs a coroutine there.
    """

    def __init__(self, engine, config: ServerConfig | None = None):
        self.engine = engine
        self.app = create_app(engine, config or ServerConfig())
        if self.app.config.KEEP_ALIVE_TIMEOUT == ServerConfig().keep_alive_s:
            self.app.config.KEEP_ALIVE_TIMEOUT = 60  # a slow test must not meet a connection that has just been closed
        self.app.config.TOUCHUP = False  # it rewrites classes of Sanic, once a process
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._is_up.wait(10), "the server did not start"
        self.client = httpx.Client(base_url=self.url, timeout=20, verify=False, trust_env=False)

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def events(self, path: str, body: dict) -> list:
        """Every event of a stream, parsed; the last is "[DONE]"."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        found = []
        for block in response.text.removesuffix("\n\n").split("\n\n"):
            if block.startswith(":"):
                continue
            assert block.startswith("data: "), block
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        return found

    def call(self, coroutine, timeout_s: float = 10):
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def wait_for(self, condition, timeout_s: float = 10) -> None:
        """Until condition() is true on the server's loop; fails after timeout_s."""

        async def poll():
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(0.005)

        self.call(poll(), timeout_s + 1)

    def close(self) -> None:
        self.client.close()
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._socket.close()
        self.loop.close()

    async def _serve(self):
        http = await self.app.create_server(sock=self._socket, asyncio_server_kwargs={"start_serving": False})
        await http.startup()
        await http.before_start()
        await http.start_serving()
        await http.after_start()
        self._is_up.set()
        await self._stop.wait()
        http.close()
        await http.before_stop()
        for connection in list(http.connections):
            connection.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while http.connections:
                    await asyncio.sleep(0.01)
        await http.after_stop()
