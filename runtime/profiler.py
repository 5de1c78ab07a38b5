"""Traces of what the process and its devices do, for TensorBoard or Perfetto, begun and ended by hand."""

import asyncio

from runtime.errors import RequestRefused


class Profiler:
    """One trace at a time.

    Args:
        folder: where traces are written, each in a folder of its own.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._is_on = False

    async def start(self) -> None:
        """Begins a trace.

        Raises:
            RequestRefused: one is under way.
        """
        if self._is_on:
            raise RequestRefused("a trace is under way; POST /stop_profile ends it")
        self._is_on = True
        import jax

        await asyncio.to_thread(jax.profiler.start_trace, self._folder)

    async def stop(self) -> None:
        """Ends the trace and writes it, which takes seconds.

        Raises:
            RequestRefused: none is under way.
        """
        if not self._is_on:
            raise RequestRefused("no trace is under way; POST /start_profile begins one")
        self._is_on = False
        import jax

        await asyncio.to_thread(jax.profiler.stop_trace)
