"""The other hosts: each does on its part of the arrays what rank 0 says, until that stops or is gone."""

import dataclasses
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from runtime import hosts
from runtime.channel import Channel, Gone
from runtime.config import Memory
from runtime.errors import ConfigError
from runtime.hosts import Place
from runtime.loading import Loaded

log = logging.getLogger(__name__)

RETRY_S = 1.0
ANSWER_S = 3600.0  # the first program may be long in coming


class Follower:
    """This host's connection to rank 0.

    Args:
        place: of this host.
    """

    def __init__(self, place: Place):
        self.place = place
        self._channel: Channel | None = None
        self._messages: queue.Queue[tuple[dict[str, Any], list[np.ndarray]]] = queue.Queue()
        self._stopping = False

    def join(self, facts: Mapping[str, str]) -> None:
        """Connects, is taken in, and starts JAX on all hosts.

        Raises:
            ConfigError: rank 0 is not there, or refuses this host.
        """
        channel = self._connect()
        try:
            channel.send("hello", rank=self.place.rank, facts=dict(facts))
            channel.wait_at_most(hosts.JOIN_S)
            answer, _ = channel.receive()
        except Gone as error:
            channel.close()
            raise ConfigError(f"host 0 at {self.place.address} did not take this host in: {error}") from error
        if answer["kind"] != "welcome":
            channel.close()
            raise ConfigError(f"host 0 at {self.place.address} refuses this host: {answer.get('reason')}")
        self._channel = channel
        channel.keep_alive()
        threading.Thread(target=self._listen, name="host 0", daemon=True).start()
        self.place.start_jax()

    def settle_memory(self, memory: Memory) -> Memory:
        """What rank 0 has found to be the least of all hosts."""
        self._expect("memory")
        self._answer(memory=dataclasses.asdict(memory))
        message, _ = self._expect("memory")
        return Memory(**message["memory"])

    def compare(self, facts: Mapping[str, str]) -> None:
        """Tells rank 0 what was settled here."""
        self._expect("plan")
        self._answer(facts=dict(facts))

    def agree(self, names: set[str]) -> set[str]:
        """Of these names those that every host gives."""
        self._expect("agree")
        self._answer(names=sorted(names))
        message, _ = self._expect("agree")
        return set(message["names"])

    def follow(self, loaded: Loaded) -> None:
        """Runs what rank 0 runs; returns when it stops in order."""
        steps = {str(bucket): (bucket, run) for bucket, run in loaded.steps.items()}
        tables = jax.tree.structure(loaded.usual_tables)
        state: Any = loaded.state
        while True:
            message, arrays = self._messages.get()
            kind = message["kind"]
            if kind == "stop":
                jax.distributed.shutdown()
                return
            if kind == "new_state":
                state = jax.block_until_ready(loaded.new_state())
                self._answer()
            elif state is not None:  # else a step failed; rank 0 fails in the same one and asks for new state
                try:
                    if kind == "step":
                        bucket, run = steps[message["bucket"]]
                        packed, *masks = arrays
                        mask_SW = masks[0] if masks else loaded.no_mask[bucket.num_rows]
                        state, _ = run(loaded.weights, state, packed, mask_SW)
                    elif kind == "load_history":
                        state = loaded.load_history(state, *arrays)
                    elif kind == "load_tables":
                        state = loaded.load_tables(state, arrays[0], jax.tree.unflatten(tables, arrays[1:]))
                except Exception as error:  # the boundary: rank 0 decides what becomes of it
                    log.error("a step failed: %s", error, exc_info=error)
                    self._tell("stumbled", reason=f"{type(error).__name__}: {error}")
                    state = None

    def give_up(self, reason: str) -> None:
        """Tells rank 0 why this host ends."""
        if self._channel is not None:
            self._stopping = True
            self._tell("failed", reason=reason)

    def _connect(self) -> Channel:
        address, deadline = (self.place.address, self.place.port), time.monotonic() + hosts.JOIN_S
        said = 0.0
        while True:
            try:
                return Channel(socket.create_connection(address, timeout=10.0), address[0])
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"host 0 was not at {address[0]}:{address[1]} for {hosts.JOIN_S:g} s "
                        f"({error.strerror or error}); see --master-addr and --master-port"
                    ) from None
                if time.monotonic() - said > 10.0:
                    said = time.monotonic()
                    log.info("waiting for host 0 at %s:%d (%s)", *address, error.strerror or error)
                time.sleep(RETRY_S)

    def _expect(self, kind: str) -> tuple[dict[str, Any], list[np.ndarray]]:
        message, arrays = self._messages.get(timeout=ANSWER_S)
        if message["kind"] != kind:
            raise ConfigError(f"host 0 said {message['kind']!r} where {kind!r} was expected")
        return message, arrays

    def _answer(self, **fields: Any) -> None:
        self._tell("answer", **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        assert self._channel is not None
        try:
            self._channel.send(kind, **fields)
        except Gone:
            pass  # whoever listens hears of it, and ends this process

    def _listen(self) -> None:
        """On a thread of its own: a program may be waiting for rank 0 on the devices for ever."""
        assert self._channel is not None
        try:
            while not self._stopping:
                message, arrays = self._channel.receive()
                self._stopping = message["kind"] == "stop"
                self._messages.put((message, arrays))
        except Gone as error:
            if not self._stopping:
                print(f"error: host 0 ({self.place.address}) is gone: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        finally:
            self._channel.close()
