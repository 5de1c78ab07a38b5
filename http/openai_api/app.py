"""create_app(engine, config) -> Sanic: routes, error table, policy, start and stop."""

import asyncio
import contextlib
import itertools

from sanic import Sanic
from sanic.exceptions import RequestCancelled

from openai_api import errors, middleware
from openai_api.chat_rendering import ChatRenderer
from openai_api.config import ServerConfig
from openai_api.gate import Gate, watch_writers
from openai_api.readers import check_parsers
from openai_api.routes import (
    chat,
    completions,
    developer,
    docs,
    health,
    invocations,
    metrics,
    models,
    profile,
    tokenize,
    unsupported,
)
from openai_api.served import ServedModels
from openai_api.transport import Server
from runtime import statistics
from runtime.metrics import Exposition, HttpMetrics
from runtime.profiler import Profiler

BLUEPRINTS = (
    completions.blueprint,
    chat.blueprint,
    tokenize.blueprint,
    models.blueprint,
    health.blueprint,
    metrics.blueprint,
    invocations.blueprint,
    unsupported.blueprint,
)
_numbers = itertools.count()  # Sanic wants a name of its own for each app of a process
NEVER_S = 7 * 24 * 3600.0  # Sanic's own timers count silence; deadlines are ours


def create_app(engine, config: ServerConfig) -> Sanic:
    """The whole server but for its socket.

    Args:
        engine: an AsyncEngine, or anything with its face (see tests/support/fake_engine.py).

    Raises:
        ConfigError: a parser, a template or a middleware that is not there.
    """
    check_parsers(config)
    app = Server(f"openai_api_{next(_numbers)}", configure_logging=False)
    limits = config.limits
    app.config.update(
        RESPONSE_TIMEOUT=NEVER_S,
        REQUEST_TIMEOUT=NEVER_S,
        KEEP_ALIVE_TIMEOUT=config.keep_alive_s,
        REQUEST_MAX_SIZE=1 << 40,  # bodies are measured where they are read
        REQUEST_MAX_HEADER_SIZE=limits.max_header,
        ACCESS_LOG=False,
        AUTO_EXTEND=False,  # sanic_ext, if it is installed, would add routes and CORS of its own
        FALLBACK_ERROR_FORMAT="json",
    )
    http_metrics = HttpMetrics()
    context = app.ctx
    context.engine, context.config = engine, config
    context.models = ServedModels(config, engine)
    context.chat = ChatRenderer(engine, config)
    context.streams = set()
    context.gate = Gate(config, http_metrics)
    engine_metrics = engine.metrics
    if engine_metrics is not None:
        engine_metrics.model_name = context.models.names[0]
        engine_metrics.shows_hidden = config.show_hidden_metrics_for_version is not None
    shown = None if config.disable_log_stats else engine_metrics
    context.exposition = Exposition.of(*filter(None, (shown, http_metrics)))
    context.gate.attach(app)
    app.error_handler.add(Exception, errors.handle)
    app.error_handler.add(RequestCancelled, errors.handle)
    blueprints = [*BLUEPRINTS, *_asked_for(config)]
    root = config.root_path.rstrip("/")
    for blueprint in blueprints:
        app.blueprint(blueprint)
        if root:
            app.blueprint(blueprint, url_prefix=root + (blueprint.url_prefix or ""), name_prefix="below_root")
    context.profiler = Profiler(config.profile_dir) if config.profile_dir else None
    context.outermost = middleware.around(app, config.middleware)
    _add_background(app, limits.stalled_writer_s)
    if shown is not None and config.log_stats_interval_s > 0:
        _add_statistics(app, shown, config.log_stats_interval_s)
    return app


def _asked_for(config):
    """The routes that flags and the environment switch on and off."""
    if config.enable_tokenizer_info_endpoint:
        yield tokenize.info
    if config.dev_mode:
        yield developer.blueprint
    if config.profile_dir:
        yield profile.blueprint
    if not config.disable_docs:
        yield docs.blueprint


def _add_background(app, stalled_writer_s):
    @app.after_server_start
    async def start(app):
        app.ctx.watcher = asyncio.create_task(watch_writers(app.ctx.streams, stalled_writer_s))
        app.ctx.opening = asyncio.create_task(app.ctx.chat.start())

    @app.before_server_stop
    async def stop(app):
        for task in (app.ctx.watcher, app.ctx.opening):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await app.ctx.chat.close()


def _add_statistics(app, metrics, interval_s):
    @app.after_server_start
    async def start(app):
        app.ctx.teller = asyncio.create_task(statistics.tell(metrics, interval_s))

    @app.before_server_stop
    async def stop(app):
        app.ctx.teller.cancel()
