"""Every error raised on purpose, as one tree.

    RuntimeServerError
    ├── ConfigError           the server cannot start as asked
    │   └── DoesNotFit        the devices' memory is too small for it
    ├── RequestRefused        this request asks for something impossible; no work was done for it
    │   └── UnknownModel      it names a model that is not served
    ├── Unavailable           the request is fine, but not now
    │   ├── Busy              the queue is full; try again in retry_after_s
    │   ├── NotReady          still starting, or draining before a stop
    │   └── EngineStopped     the engine is gone, and with it every open request
    ├── DeadlinePassed        the request took longer than it was allowed
    └── StepFailed            a step that held this request raised; other requests go on

A message says what was found, what was needed and what to do. It is shown to the caller, so it never holds a path, a
traceback or a key.
"""

MAX_NAME_LENGTH = 100


class RuntimeServerError(Exception):
    """The root: anything below it was raised on purpose, with a message for people."""


class ConfigError(RuntimeServerError, ValueError):
    """A flag or a model folder that cannot be served; raised before the server listens."""


class DoesNotFit(ConfigError):
    """The weights, or the keys and values of one request, are more than the memory there is."""


class RequestRefused(RuntimeServerError, ValueError):
    """The request is at fault. `param` is the field to change, where one is to blame."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class UnknownModel(RequestRefused):
    """The request names a model that is not served here."""

    def __init__(self, model: str):
        super().__init__(f"The model `{shown(model)}` does not exist.", param="model")


class Unavailable(RuntimeServerError):
    """Try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Busy(Unavailable):
    """As many requests wait as may wait."""

    def __init__(self, retry_after_s: float = 1.0, message: str = "the queue is full; try again later"):
        super().__init__(message, retry_after_s)


class NotReady(Unavailable):
    """The server is starting, or draining before it stops, or the request waited too long for its turn."""


class EngineStopped(Unavailable):
    """The engine is gone; whoever waits on it gets this."""

    def __init__(
        self, message: str = "the engine has stopped; the server log has the cause", retry_after_s: float = 5.0
    ):
        super().__init__(message, retry_after_s)


class DeadlinePassed(RuntimeServerError):
    """The request was aborted because it outlived its deadline."""


class StepFailed(RuntimeServerError):
    """The step that held this request raised; the cause is in the server log."""


def shown(text: str, limit: int = MAX_NAME_LENGTH) -> str:
    """A caller's text made fit for a message or a log line: control characters escaped, and shortened to `limit`."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return clean if len(text) <= limit else clean + "…"
