"""Messages between the hosts of one model over a TCP connection: a small JSON object, and arrays as they lie in memory.

Nothing received is ever run or unpickled. The connection is neither encrypted nor does it ask who is there, and nor is
JAX's own between hosts: both are for a network whose machines trust each other.

Each side says every few seconds that it lives, so that a host which is cut off is noticed as well as one that ends.
"""

import json
import math
import select
import socket
import struct
import threading
from typing import Any

import numpy as np

SILENCE_S = 30.0  # without a word a host counts as gone
BEAT_S = 3.0
ALIVE = "alive"
MAX_HEAD_BYTES, MAX_BODY_BYTES = 1 << 20, 1 << 30
_PREFIX = struct.Struct("<IQ")  # bytes of the head, bytes of all arrays
DTYPES = ("int32", "uint32", "float32", "bool")


class Gone(Exception):
    """The other side has ended, or said nothing for too long."""


class Channel:
    """One connection. Any thread may send; one receives.

    Args:
        connection: a connected socket, which this closes in the end.
        peer: the other side's address, for messages.
    """

    def __init__(self, connection: socket.socket, peer: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE_S)
        self.peer = peer
        self._socket = connection
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def has_ended(self) -> bool:
        """Whether the other side has ended it, as far as is known; for while nobody receives."""
        try:
            is_told, _, _ = select.select([self._socket], [], [], 0)
            return bool(is_told) and not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def wait_at_most(self, seconds: float) -> None:
        """How long receive() and send() may take."""
        self._socket.settimeout(seconds)

    def keep_alive(self) -> None:
        """From now on each side says now and then that it lives, and does not wait any longer for the other."""
        self._socket.settimeout(SILENCE_S)
        threading.Thread(target=self._beat, name="alive", daemon=True).start()

    def send(self, kind: str, *arrays: np.ndarray, **fields: Any) -> None:
        """Sends a message.

        Args:
            arrays: of a dtype in DTYPES, any shape.
            fields: what JSON can hold.

        Raises:
            Gone: the other side does not listen any more.
        """
        described = [[array.dtype.name, array.shape] for array in arrays]
        head = json.dumps({"kind": kind, "arrays": described} | fields).encode()
        body = [np.ascontiguousarray(array).tobytes() for array in arrays]
        try:
            with self._lock:
                self._socket.sendall(b"".join([_PREFIX.pack(len(head), sum(map(len, body))), head, *body]))
        except OSError as error:
            raise Gone(_why(error)) from error

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The next message that is more than a sign of life: its fields with "kind", and its arrays.

        Raises:
            Gone: there will be none.
        """
        while True:
            try:
                num_head, num_body = _PREFIX.unpack(self._read(_PREFIX.size))
                if num_head > MAX_HEAD_BYTES or num_body > MAX_BODY_BYTES:
                    raise Gone("it sent what is no message of ours")
                head, body = json.loads(self._read(num_head)), self._read(num_body)
                if head["kind"] != ALIVE:
                    return head, _arrays(head.pop("arrays"), body)
            except OSError as error:
                raise Gone(_why(error)) from error
            except (ValueError, KeyError, TypeError) as error:
                raise Gone(f"it sent what is no message of ours ({error})") from error

    def close(self) -> None:
        """Ends the connection; whoever receives hears of it."""
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            new = self._socket.recv_into(view[got:])
            if not new:
                raise Gone("it ended the connection")
            got += new
        return data

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                self.send(ALIVE)
            except Gone:
                return


def _arrays(described, body):
    arrays, start = [], 0
    for name, shape in described:
        if name not in DTYPES:
            raise ValueError(f"dtype {name}")
        dtype, count = np.dtype(name), math.prod(shape)
        arrays.append(np.frombuffer(body, dtype, count, start).reshape(shape))
        start += count * dtype.itemsize
    return arrays


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it said nothing for too long"
    return f"its connection broke: {error.strerror or error}"
