"""Raw connections to the broker: cheap enough that the benchmark is not what is measured.

Commands are packed and replies parsed by hiredis; bodies stay bytes and are looked into only after the clock stopped.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Self

import hiredis

_CHUNK: Final = 1024**2
_LOOK_EVERY_SEC: Final = 1.0

Word = str | bytes | int


class BenchError(Exception):
    """A measurement that cannot be trusted or finished; the text says why."""


class Heard(NamedTuple):
    """One message of a subscription and when it was read from the socket (`time.perf_counter`)."""

    at: float
    channel: bytes
    body: bytes


class BrokerLink:
    """One blocking connection.

    Args:
        port: the broker's port on this host.
        check: called about every second while nothing comes; raises when waiting on makes no sense.
    """

    def __init__(self, port: int, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *words: Word) -> None:
        """Send one command; its reply has to be read later."""
        self._socket.sendall(packed(*words))

    def send_packed(self, commands: bytes) -> None:
        """Send commands that `packed` has made."""
        self._socket.sendall(commands)

    def call(self, *words: Word) -> object:
        """Send one command and return its reply."""
        self.send(*words)
        return self.replies(1, time.perf_counter() + 10)[0]

    def replies(self, count: int, deadline: float) -> list[object]:
        """Read that many replies.

        Raises:
            BenchError: the deadline passed, or a reply is an error.
        """
        found: list[object] = []
        while len(found) < count:
            while len(found) < count and (reply := self._reader.gets()) is not False:
                if isinstance(reply, hiredis.ReplyError):
                    raise BenchError(f"the broker answered: {reply}")
                found.append(reply)
            if len(found) < count:
                self.fill(deadline)
        return found

    def fill(self, deadline: float) -> float:
        """Read one piece from the socket; returns when that was.

        Raises:
            BenchError: the deadline passed.
        """
        while True:
            left = deadline - time.perf_counter()
            if left <= 0:
                raise BenchError("nothing came within the time allowed")
            self._socket.settimeout(min(left, _LOOK_EVERY_SEC))
            try:
                data = self._socket.recv(_CHUNK)
            except TimeoutError:
                self.check()
                continue
            now = time.perf_counter()
            if not data:
                raise BenchError("the broker closed the connection")
            self._reader.feed(data)
            return now


class Subscription(BrokerLink):
    """A connection that hears channels."""

    def __init__(self, port: int, channels: tuple[str, ...], check: Callable[[], None] = lambda: None) -> None:
        super().__init__(port, check)
        self.send("SUBSCRIBE", *channels)
        self.replies(len(channels), time.perf_counter() + 10)

    def read(self, deadline: float) -> list[Heard]:
        """Return what one piece of the socket's data holds; may be empty.

        Raises:
            BenchError: the deadline passed.
        """
        at = self.fill(deadline)
        found = []
        while (reply := self._reader.gets()) is not False:
            if isinstance(reply, list) and reply[0] == b"message":
                found.append(Heard(at, reply[1], reply[2]))
        return found

    def read_quietly(self, until: float) -> list[Heard]:
        """Return all that comes until a moment: a pause that does not let the socket fill up."""
        found = []
        while time.perf_counter() < until:
            try:
                found += self.read(until)
            except BenchError:
                self.check()
        return found

    def rest(self) -> list[Heard]:
        """Return everything that was published before now and not read yet: the broker answers a PING in order."""
        self.send("PING", "rest")
        deadline = time.perf_counter() + 30
        found: list[Heard] = []
        while True:
            at = self.fill(deadline)
            while (reply := self._reader.gets()) is not False:
                if isinstance(reply, list) and reply[0] == b"message":
                    found.append(Heard(at, reply[1], reply[2]))
                elif reply == [b"pong", b"rest"]:
                    return found


def packed(*words: Word) -> bytes:
    """One command as bytes."""
    command: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub allows one word only
    return command
