"""`python -m runtime.serve [MODEL]`: flags -> config -> engine -> app.

The order is what a person who waits would want: the command line is checked first, then the port is taken,
and only then is anything loaded. Until the server is ready the Doorman answers on that port.

SIGTERM while starting ends the process at once. While serving it drains: readiness answers 503, new requests
are refused, open ones get up to --drain-timeout to finish, and the exit code is 0, or 1 if some were cut
off. A second signal ends the process at once.
"""

import asyncio
import dataclasses
import functools
import gc
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its own folder is on the path, where the one above it belongs
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from runtime import __version__, banner, demo, listen, logs, wishes
from runtime.errors import ConfigError, RuntimeServerError
from runtime.flags import GROUPS
from runtime.hosts import Hosts, Place
from runtime.wishes import Fetch, Start

WATCH_S = 5.0
LINGER_S = 2.0  # for the last bytes of answers that have ended


def main(words: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns the exit code. An error is one line, with its remedy."""
    code = run(words)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        leave_at_once(code)  # JAX would wait for hosts that may be gone
    return code


def run(words: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(words):
        print(help_text())
        return 0
    if "--version" in words:
        print(__version__)
        return 0
    try:
        sections, notes = wishes.read(words, os.environ)
        start = Start(**sections["start"])
        logs.set_up(start.log_level, start.http_log_level, start.log_config_file)
        place = Hosts(**sections["hosts"]).settle()
        if place is not None and place.rank > 0:
            return follow(start, configs(sections), notes, place)
        context = listen.tls(start.ssl_certfile, start.ssl_keyfile, start.ssl_ca_certs, start.ssl_cert_reqs)
        with listen.bind(start.host, start.port, start.uds) as listener:
            import uvloop

            try:
                parts = (*configs(sections), place)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    return runner.run(serve(start, parts, notes, listener, context))
            finally:
                if start.uds:
                    Path(start.uds).unlink(missing_ok=True)
    except Exception as error:  # the boundary of the process: whatever it was, the user hears of it in a line
        if "--log-error-stack" in {word.replace("_", "-") for word in words}:
            raise
        known = isinstance(error, RuntimeServerError | ValueError) and "\n" not in str(error).strip()
        hint = "" if known else "; --log-error-stack shows where"
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message if known else f'{type(error).__name__}: {message}'}{hint}", file=sys.stderr)
        return 1


def configs(sections: Mapping[str, dict[str, Any]]):
    """(Fetch, EngineConfig, ServerConfig), checked before anything is loaded; the engine's model is not fetched yet.

    Raises:
        ConfigError: a value is out of bounds, values contradict each other, or a parser or template is not there.
    """
    from openai_api.config import Limits, ServerConfig
    from runtime.config import EngineConfig

    names = [sections["start"].get("model") or demo.DEMO_NAME]
    server: dict[str, Any] = {"served_names": names} | sections["server"]
    if "limits" in server:
        server["limits"] = wishes.limits(server["limits"], Limits)
    server_config = ServerConfig(**server)
    server_config.template_source()
    if server_config.tool_call_parser or server_config.reasoning_parser:
        from openai_api.readers import check_parsers

        check_parsers(server_config)
    return Fetch(**sections["fetch"]), EngineConfig(model="", **sections["engine"]), server_config


def help_text() -> str:
    """Every flag, by group; those that cannot be had are left out."""
    lines = ["usage: python -m runtime.serve [MODEL] [options]", ""]
    lines.append("MODEL is a Hugging Face folder, a .gguf file or a hub name; without it the demo model is served.")
    for title, flags in GROUPS.items():
        shown = [flag for flag in flags if flag.status == "works"]
        lines += ["", f"{title}:"] if shown else []
        for flag in shown:
            names = ", ".join([f"--{'[no-]' if flag.kind == 'switch' else ''}{flag.name}", *flag.short])
            kind = "text" if flag.kind == "each" else flag.kind
            value = "" if kind == "switch" else " " + ("|".join(flag.choices) or kind.upper())
            lines.append(f"  {names}{value}\n        {flag.help}")
    return "\n".join(lines)


async def serve(start: Start, parts: tuple, notes: Sequence[str], listener: socket.socket, context) -> int:
    """Loads behind the Doorman, then serves until a signal; returns the exit code."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave_at_once, 128 + number)
    if not sys.stdin or not sys.stdin.isatty():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # no terminal to lose: a service keeps serving
    progress = banner.Starting(show=start.show_progress)
    for line in notes:
        progress.says(line)
    progress.says(f"port taken: {listen.url(listener, bool(context))}")

    doorman = await loop.create_server(listen.Doorman, sock=listener.dup(), ssl=context)
    # Read beside the model, not after it.
    http_ready = loop.run_in_executor(None, importlib.import_module, "openai_api.app")
    clock = Clock()
    fetch, engine_config, server_config, place = parts
    engine = await loop.run_in_executor(None, load, start.model, fetch, engine_config, place, progress, clock)
    doorman.close()

    create_app = (await http_ready).create_app

    engine.attach(loop)
    stop = asyncio.Event()
    app = create_app(engine, server_config)
    app.on_response(functools.partial(hang_up_after, stop))
    http = await open_http(app, listener, context)
    clock.lap("http")
    # What was made so far lives for ever: no collection need look at it again.
    gc.collect()
    gc.freeze()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda n=number: leave_at_once(128 + n) if stop.is_set() else stop.set())
    say(ready_text(engine, server_config, listen.url(listener, bool(context)), clock.seconds))
    died = await until_stopped(engine, stop, start, context)
    return await drain(engine, http, 0.0 if died else start.drain_timeout_s) or int(died)


class Clock:
    """Seconds by phase, in order."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str, parts: Mapping[str, float] | None = None) -> None:
        """Ends a phase; where its parts are known they are shown, and the rest under its name."""
        now = time.monotonic()
        self.seconds |= parts or {}
        self.seconds[name] = now - self.last - sum((parts or {}).values())
        self.last = now


def load(model: str | None, fetch: Fetch, config, place: Place | None, progress: banner.Starting, clock: Clock):
    """Everything that blocks: the model's files, the other hosts, the engine. Runs on a thread of its own."""
    leader = None
    if place is not None:  # its ports are taken before the model is fetched
        from runtime.leader import Leader

        leader = Leader(place, on_loss=end_starting)
    found = fetched(model, fetch, config, progress)
    clock.lap("fetch")

    from runtime.async_engine import AsyncEngine

    clock.lap("import")
    engine = AsyncEngine.start(found, progress, leader)
    clock.lap("engine", engine.engine.loaded.seconds)
    return engine


def fetched(model: str | None, fetch: Fetch, config, progress: banner.Starting):
    """The config, with the model's files on this disk."""
    path = fetch.model(model, progress)
    progress.says(f"model: {path}")
    return dataclasses.replace(config, model=str(path), tokenizer=fetch.tokenizer(config.tokenizer))


def end_starting(why: str) -> None:
    """Another host is gone while the model is loaded: what is on the devices may wait for it for ever."""
    say(f"error: {why}; its log has the cause", sys.stderr)
    leave_at_once(1)


def follow(start: Start, parts: tuple, notes: Sequence[str], place: Place) -> int:
    """The life of every host but that of rank 0: no HTTP; it ends with rank 0."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to tidy, and this thread may wait for the devices
    progress = banner.Starting(show=start.show_progress)
    for line in notes:
        progress.says(line)
    fetch, engine_config, _ = parts

    from runtime.follower import Follower
    from runtime.loading import load as load_replicas

    follower = Follower(place)
    try:
        (loaded,) = load_replicas(fetched(start.model, fetch, engine_config, progress), progress, follower)
        say(f"{place} is ready; HTTP is answered by host 0 at {place.address}")
        follower.follow(loaded)
    except Exception as error:
        follower.give_up(f"{type(error).__name__}: {error}")
        raise
    say(f"{place} stops, as host 0 has")
    return 0


async def open_http(app, listener: socket.socket, context):
    """Starts the app on the socket that was taken at the beginning."""
    app.config.MOTD = app.config.AUTO_EXTEND = False
    http = await app.create_server(
        sock=listener, ssl=context, backlog=listen.BACKLOG, asyncio_server_kwargs={"start_serving": False}
    )
    await http.startup()
    await http.before_start()
    await http.start_serving()
    await http.after_start()
    return http


async def hang_up_after(stop: asyncio.Event, request, response) -> None:
    """Once the server is to stop, each answer is the last on its connection: the next goes to another server."""
    if stop.is_set() and request.stream is not None:
        request.stream.keep_alive = False


async def until_stopped(engine, stop: asyncio.Event, start: Start, context) -> bool:
    """Waits for a signal, or for the engine to be found dead twice in a row; True for the latter."""
    sick = 0
    seen = certificates(start)
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), WATCH_S)
        except TimeoutError:
            sick = 0 if engine.is_healthy else sick + 1
            if sick >= 2 and not start.keep_alive_on_engine_death:
                say("error: the engine has stopped; the log has the cause", sys.stderr)
                return True
            if start.enable_ssl_refresh and (now := certificates(start)) != seen:
                seen = now
                refresh(context, start)
    return False


def certificates(start: Start) -> list[float]:
    """When the TLS files last changed."""
    paths = [start.ssl_certfile, start.ssl_keyfile or start.ssl_certfile, start.ssl_ca_certs]
    return [os.stat(path).st_mtime if os.path.exists(path) else 0.0 for path in paths if path]


def refresh(context, start: Start) -> None:
    """Loads changed TLS files into the context that serves; a half-written pair is left for the next look."""
    try:
        listen.tls(start.ssl_certfile, start.ssl_keyfile, start.ssl_ca_certs, start.ssl_cert_reqs)
    except ConfigError as error:
        say(f"warning: {error}", sys.stderr)
        return
    context.load_cert_chain(start.ssl_certfile, start.ssl_keyfile)
    if start.ssl_ca_certs:
        context.load_verify_locations(start.ssl_ca_certs)


async def drain(engine, http, timeout_s: float) -> int:
    """Lets open requests finish, ends the others with an error, and closes; 0 when none was cut off."""
    engine.drain()
    deadline = time.monotonic() + timeout_s
    while engine.num_in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    cut_off = engine.num_in_flight
    if cut_off:
        say(f"warning: {cut_off} requests were cut off after {timeout_s:g} s; see --drain-timeout", sys.stderr)
        engine.abort_all()
    http.close()
    await http.before_stop()
    linger = time.monotonic() + LINGER_S
    while http.connections and time.monotonic() < linger:
        for connection in list(http.connections):
            connection.close_if_idle()
        await asyncio.sleep(0.02)
    for connection in list(http.connections):
        connection.abort()
    await http.after_stop()
    await asyncio.get_running_loop().run_in_executor(None, engine.stop)
    return int(bool(cut_off))


def ready_text(engine, server_config, url: str, seconds: Mapping[str, float]) -> str:
    name = server_config.served_names[0]
    message = {"role": "user", "content": "What is the capital of France?"}
    return banner.ready(
        url,
        name,
        engine.engine.plan.reasons,
        seconds,
        needs_key=bool(server_config.api_keys),
        limits=server_config.limits,
        body={"model": name, "messages": [message], "max_tokens": 32, "temperature": 0},
    )


def say(text: str, stream=None) -> None:
    """Prints; a reader that went away is no reason to stop serving."""
    try:
        print(text, file=stream or sys.stdout, flush=True)
    except OSError:
        pass


def leave_at_once(code: int) -> None:
    """Ends this process and its children without waiting for any thread."""
    for child in children():
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os._exit(code)


def children() -> list[int]:
    """Process ids of our children, where the system tells them."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
