"""Rank 0 of several hosts: takes the others in, and tells them each program before it runs it here.

All hosts run the same programs in the same order on their parts of the same arrays. What differs from step to step is
the packed vector (and masks), which the engine makes on this host only; it is sent ahead of the dispatch. The engine
does not know: it calls `led(loaded)`, whose programs tell the followers first.
"""

import dataclasses
import functools
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from runtime import hosts
from runtime.agreement import differences
from runtime.channel import Channel, Gone
from runtime.config import Memory
from runtime.errors import ConfigError, EngineStopped
from runtime.hosts import Place
from runtime.loading import Loaded

log = logging.getLogger(__name__)

HELLO_S = 30.0  # for a host that has connected to say who it is
ANSWER_S = 120.0  # for followers to answer what takes them no longer than it takes here
PARTING_S = 10.0


class Leader:
    """The followers, as rank 0 sees them.

    Args:
        place: of rank 0.
        on_loss: called once, on some thread, with what happened to a follower that is gone.

    Raises:
        ConfigError: the ports cannot be had.
    """

    def __init__(self, place: Place, on_loss: Callable[[str], None]):
        self.place = place
        self.on_loss = on_loss
        self._channels: dict[int, Channel] = {}
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._lost: str | None = None
        self._stopping = False
        self._lock = threading.Lock()
        hosts.check_port(place.port + 1)
        hosts.check_port(place.port)
        self._listener = socket.create_server(("", place.port))

    def join(self, facts: Mapping[str, str]) -> None:
        """Waits for all followers, refuses those that differ, and starts JAX on all hosts.

        Raises:
            ConfigError: not all came.
        """
        deadline = time.monotonic() + hosts.JOIN_S
        while True:
            self._forget_those_that_left()
            if len(self._channels) == self.place.count - 1:
                break
            self._listener.settimeout(10.0)
            try:
                connection, (peer, *_) = self._listener.accept()
            except TimeoutError:
                have, count, port = len(self._channels) + 1, self.place.count, self.place.port
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{have} of {count} hosts are here after {hosts.JOIN_S:g} s; start the others with the same "
                        f"--master-addr and --master-port {port}"
                    ) from None
                log.info("%d of %d hosts are here; waiting for the others on port %d", have, count, port)
                continue
            self._take_in(Channel(connection, peer), facts)
        self._listener.close()
        for rank, channel in self._channels.items():
            try:
                channel.send("welcome")
            except Gone as error:
                raise ConfigError(f"host {rank} left while others were waited for: {error}") from error
            channel.keep_alive()
            self._answers[rank] = queue.Queue()
            threading.Thread(target=self._listen, args=(rank,), name=f"host {rank}", daemon=True).start()
        self.place.start_jax()

    def settle_memory(self, memory: Memory) -> Memory:
        """The least that a device has on any host: the plan must suit all."""
        found = [Memory(**answer["memory"]) for answer in self._ask("memory").values()]
        least = Memory(min(m.total for m in [memory, *found]), min(m.free for m in [memory, *found]))
        self._tell("memory", memory=dataclasses.asdict(least))
        return least

    def compare(self, facts: Mapping[str, str]) -> None:
        """Raises: ConfigError: a follower has settled on other numbers."""
        for rank, answer in self._ask("plan").items():
            if wrong := differences(facts, answer["facts"], f"host {rank}"):
                raise ConfigError(f"hosts differ: {wrong}")

    def agree(self, names: set[str]) -> set[str]:
        """Of these names those that every host gives. Waits for all, as for their reading of weights."""
        common = names.intersection(*(answer["names"] for answer in self._ask("agree", hosts.JOIN_S).values()))
        self._tell("agree", names=sorted(common))
        return common

    def led(self, loaded: Loaded) -> Loaded:
        """The same, whose programs also run on the followers."""

        def new_state():
            # The one call that is answered: it follows a failure, and whose that was is known then.
            self._ask("new_state")
            return loaded.new_state()

        def load_history(state, slot, tokens_U):
            self._tell("load_history", np.asarray(slot), tokens_U)
            return loaded.load_history(state, slot, tokens_U)

        def load_tables(state, slot, tables):
            self._tell("load_tables", np.asarray(slot), *map(np.asarray, jax.tree.leaves(tables)))
            return loaded.load_tables(state, slot, tables)

        def step(name, run, weights, state, packed, mask_SW):
            masks = (mask_SW,) if isinstance(mask_SW, np.ndarray) else ()
            self._tell("step", packed, *masks, bucket=name)
            return run(weights, state, packed, mask_SW)

        steps = {bucket: functools.partial(step, str(bucket), run) for bucket, run in loaded.steps.items()}
        return dataclasses.replace(
            loaded, steps=steps, new_state=new_state, load_history=load_history, load_tables=load_tables
        )

    def stop(self) -> None:
        """Sends the followers home."""
        with self._lock:
            self._stopping = True
        if self._lost is not None:
            return  # JAX would wait for the one that is gone
        try:
            self._tell("stop")
            jax.distributed.shutdown()
        except (EngineStopped, RuntimeError) as error:
            log.warning("the hosts did not part in order: %s", error)

    def _forget_those_that_left(self) -> None:
        """Others may take the ranks of hosts that joined and ended before all were here."""
        for rank, channel in list(self._channels.items()):
            if channel.has_ended:
                log.warning("host %d (%s) left before all were here", rank, channel.peer)
                channel.close()
                del self._channels[rank]

    def _take_in(self, channel: Channel, facts: Mapping[str, str]) -> None:
        try:
            channel.wait_at_most(HELLO_S)
            hello, _ = channel.receive()
            rank = hello["rank"]
            self._forget_those_that_left()
            reason = self._reason_to_refuse(rank, hello["facts"], facts)
            if reason is None:
                log.info("host %d has joined from %s", rank, channel.peer)
                self._channels[rank] = channel
                return
            log.error("a host at %s is refused: %s", channel.peer, reason)
            channel.send("refused", reason=reason)
        except (Gone, KeyError, TypeError, AttributeError) as error:
            log.warning("%s connected and did not join: %s", channel.peer, error)
        channel.close()

    def _reason_to_refuse(self, rank, theirs: Mapping[str, Any], ours: Mapping[str, str]) -> str | None:
        if not isinstance(rank, int) or not 0 < rank < self.place.count:
            return f"its rank is {rank!r}; those of the others are 1 to {self.place.count - 1}"
        if rank in self._channels:
            return f"rank {rank} has joined before, from {self._channels[rank].peer}; give each host a rank of its own"
        return differences(ours, theirs, f"host {rank}") or None

    def _tell(self, kind: str, *arrays: np.ndarray, **fields: Any) -> None:
        """Raises: EngineStopped: a follower is gone."""
        if self._lost is not None:
            raise EngineStopped(self._lost)
        for rank, channel in self._channels.items():
            try:
                channel.send(kind, *arrays, **fields)
            except Gone as error:
                self._lose(rank, str(error))
                raise EngineStopped(self._lost or "") from error

    def _ask(self, kind: str, limit_s: float | None = None) -> dict[int, dict[str, Any]]:
        """{rank: answer} of every follower, within ANSWER_S where no other limit is given.

        Raises:
            EngineStopped: one is gone, or answers too late.
        """
        self._tell(kind)
        limit_s = limit_s or ANSWER_S
        deadline, found = time.monotonic() + limit_s, {}
        while len(found) < len(self._answers):
            for rank, answers in self._answers.items():
                if rank not in found:
                    try:
                        found[rank] = answers.get(timeout=0.1)
                    except queue.Empty:
                        if time.monotonic() > deadline:
                            self._lose(rank, f"it did not answer for {limit_s:g} s")
            if self._lost is not None:
                raise EngineStopped(self._lost)
        return found

    def _listen(self, rank: int) -> None:
        """On a thread for each follower: its answers, and its end."""
        try:
            while True:
                message, _ = self._channels[rank].receive()
                if message["kind"] == "answer":
                    self._answers[rank].put(message)
                elif message["kind"] == "stumbled":
                    log.error("host %d: a step failed: %s", rank, message.get("reason"))
                else:
                    raise Gone(f"it said: {message.get('reason')}")
        except Gone as error:
            self._lose(rank, str(error))
            self._channels[rank].close()

    def _lose(self, rank: int, why: str) -> None:
        with self._lock:
            if self._stopping or self._lost is not None:
                return
            self._lost = f"host {rank} of {self.place.count} ({self._channels[rank].peer}) is gone: {why}"
        log.error("%s", self._lost)
        self.on_loss(self._lost)
