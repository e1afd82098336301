"""What the tests' orchestrator can be told to do wrong, and the layer that does it on real connections."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import h11
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

Kind = Literal["upload", "result", "download", "other"]
Lie = Literal["", "short", "endless", "trickle", "ignore_range", "wrong_range", "wrong_content", "gzip", "no_etag"]


@dataclass(frozen=True)
class Fault:
    """What happens to one call.

    Attributes:
        status: answer this; 0 is the honest answer.
        headers: of that answer.
        body: of that answer.
        early: answer before a byte of the body is read.
        cut_after: end the connection when so many bytes of the body have come in (of a download: gone out).
        hang: say nothing until `HttpOrchestrator.release` or until the client has gone.
        stored: do the work first, and only then hang, cut or answer `status`.
        lie: how a download is wrong, see `HttpOrchestrator.lie`.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"told to fail"
    early: bool = False
    cut_after: int | None = None
    hang: bool = False
    stored: bool = False
    lie: Lie = ""


@dataclass(frozen=True)
class Seen:
    """One call as the server saw it.

    Attributes:
        headers: names in lower case.
        body_bytes: how much of its body has come in; of a download how much has gone out.
        status: what was answered; None while nothing was.
        done: whether the call is over, answered or not.
    """

    kind: Kind
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body_bytes: int = 0
    status: int | None = None
    done: bool = False


class ConnectionGoneError(Exception):
    """The layer has cut the connection under a call."""


class ConnectionProtocol(H11Protocol):
    """uvicorn's own; lets a call reach its connection, as `scope["state"]["connection"]`."""

    def __init__(self, *args: Any, app_state: dict[str, Any], **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(*args, app_state=dict(app_state), **kwargs)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state["connection"] = transport
        super().connection_made(transport)


class FaultLayer:
    """ASGI layer around the app: remembers each call, and does to it what was asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._seen: list[Seen] = []
        self._released = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, kind: Kind, fault: Fault, times: int) -> None:
        with self._lock:
            self._faults[kind].extend([fault] * times)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def seen(self) -> list[Seen]:
        with self._lock:
            return list(self._seen)

    def begin(self) -> None:
        """Note the loop that runs from here on."""
        self._released = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def release(self) -> None:
        """Let all calls that hang go on. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.release_here)

    def release_here(self) -> None:
        """The same, on the loop itself."""
        self._released.set()
        self._released = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(self, scope, receive, send)
        try:
            await call.run(self._app)
        except (ConnectionGoneError, ClientDisconnect, h11.LocalProtocolError):
            pass  # the very thing that was asked for, or the client has left
        finally:
            call.change(done=True)

    def _arrived(self, seen: Seen) -> tuple[int, Fault]:
        with self._lock:
            self._seen.append(seen)
            waiting = self._faults[seen.kind]
            return len(self._seen) - 1, waiting.popleft() if waiting else Fault()

    def _change(self, number: int, **changes: Any) -> None:  # noqa: ANN401 - fields of Seen
        with self._lock:
            self._seen[number] = replace(self._seen[number], **changes)

    async def _wait(self, connection: asyncio.Transport) -> None:
        """Until `release`, or until the client has gone."""
        released = self._released
        while not released.is_set() and not connection.is_closing():
            await asyncio.sleep(0.01)


class _Call:
    """One call on its way through the layer."""

    def __init__(self, layer: FaultLayer, scope: Scope, receive: Receive, send: Send) -> None:
        self._layer = layer
        self._scope = scope
        self._receive = receive
        self._send = send
        self._bytes = 0
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._kind = kind_of(scope["method"], scope["path"])
        self._number, self._fault = layer._arrived(
            Seen(self._kind, scope["method"], scope["path"], scope["query_string"].decode("latin-1"), headers)
        )
        scope["state"]["fault"] = self._fault

    def change(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Seen
        self._layer._change(self._number, **changes)

    async def run(self, app: ASGIApp) -> None:
        fault = self._fault
        if fault.stored:
            await app(self._scope, self._counting_receive, _nowhere)
        if fault.hang:
            await self._layer._wait(self._scope["state"]["connection"])
        if fault.stored and fault.cut_after is not None:
            self._cut()
        if fault.status:
            if not (fault.early or fault.stored):
                await self._drain()
            await self._answer()
        elif fault.stored:
            await self._plain(200, {"content-type": "application/json"}, b'{"ok":true}')
        else:
            await app(self._scope, self._counting_receive, self._counting_send)

    async def _drain(self) -> None:
        while True:
            message = await self._counting_receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    async def _answer(self) -> None:
        await self._plain(self._fault.status, self._fault.headers, self._fault.body)

    async def _plain(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        pairs.append((b"content-length", str(len(body)).encode()))
        await self._counting_send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._counting_send({"type": "http.response.body", "body": body})

    async def _counting_receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and self._kind != "download":
            self._bytes += len(message.get("body", b""))
            self.change(body_bytes=self._bytes)
            limit = self._fault.cut_after
            if limit is not None and not self._fault.stored and self._bytes >= limit:
                self._cut()
        return message

    async def _counting_send(self, message: Message) -> None:
        if self._scope["state"]["connection"].is_closing():  # what comes now is the app's own error page
            raise ConnectionGoneError
        if message["type"] == "http.response.start":
            self.change(status=message["status"])
        elif self._kind == "download":
            message = self._cut_short(message)
        await self._send(message)
        limit = self._fault.cut_after
        if self._kind == "download" and limit is not None and self._bytes >= limit:
            self._scope["state"]["connection"].close()  # what was sent still goes out
            raise ConnectionGoneError

    def _cut_short(self, message: Message) -> Message:
        body = message.get("body", b"")
        if (limit := self._fault.cut_after) is not None and self._bytes + len(body) >= limit:
            body = body[: limit - self._bytes]
            message = {**message, "body": body, "more_body": True}
        self._bytes += len(body)
        self.change(body_bytes=self._bytes)
        return message

    def _cut(self) -> None:
        self._scope["state"]["connection"].abort()
        raise ConnectionGoneError


def kind_of(method: str, path: str) -> Kind:
    """What a call is, by WIRE 6."""
    if "/files" in path:
        return "upload" if method not in {"GET", "HEAD"} else "download"
    return "result" if path.rstrip("/").endswith("/results") and method != "GET" else "other"


async def _nowhere(_message: Message) -> None:
    pass
