"""Connections that listen while they send: a peer's early answer is heard before its hang-up.

A server that refuses a large body (413, 401) may answer after the headers and close. httpx reads nothing before it has
sent everything, or has failed to; by then the answer can be lost with the connection, and a refusal for good would look
like a broken network. This module is imported only with httpx, see `http_link`.

It reaches into private parts of httpx and httpcore: `AsyncClient._transport` and `_mounts`, `AsyncHTTPTransport._pool`,
`AsyncConnectionPool._network_backend`. They were checked with httpx 0.28.1 and httpcore 1.0.9.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterable
from typing import Any, Final

import httpcore
import httpx
import structlog

log = structlog.get_logger()

_READ_BYTES: Final = 65536
_GO_ON: Final = re.compile(rb"HTTP/1\.[01] [12]")
"""What is no reason to stop sending: an interim answer, or a success said early. (`uploads` looks whether that came
before the end of the body.)"""


def listen_while_sending(client: httpx.AsyncClient) -> None:
    """Let all connections of a client, those to proxies too, be `ListeningStream`s.

    httpcore takes a network backend, but httpx offers no way to hand one in; hence the private names. If they change,
    everything works but the early answer, and a warning says so.
    """
    try:
        for transport in (client._transport, *client._mounts.values()):  # noqa: SLF001 - see above
            if isinstance(transport, httpx.AsyncHTTPTransport):
                pool = transport._pool  # noqa: SLF001 - see above
                pool._network_backend = ListeningBackend(pool._network_backend)  # noqa: SLF001 - see above
    except AttributeError as error:
        log.warning(
            "this httpx is not the one that we know: a refusal during an upload may be seen as a broken connection",
            action="http",
            httpx=httpx.__version__,
            httpcore=httpcore.__version__,
            error=str(error),
        )


class ListeningBackend(httpcore.AsyncNetworkBackend):
    """httpcore's own backend; its connections become `ListeningStream`s."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend) -> None:
        self._inner = inner

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect."""
        return ListeningStream(await self._inner.connect_tcp(host, port, timeout, local_address, socket_options or ()))

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await self._inner.sleep(seconds)


class ListeningStream(httpcore.AsyncNetworkStream):
    """A connection that reads ahead from the first write to the next read."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner
        self._heard: asyncio.Task[bytes] | None = None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's interface
        """Send all of it, unless the peer answers with a refusal or hangs up first.

        Raises:
            httpcore.WriteError: the peer has answered or hung up. httpcore goes on to read what it said.
            httpcore.WriteTimeout: the peer took nothing for `timeout` seconds.
        """
        if self._heard is None:
            self._heard = asyncio.create_task(self._inner.read(_READ_BYTES, None))
        sending = asyncio.create_task(self._inner.write(buffer, timeout))
        try:
            await asyncio.wait({sending, self._heard}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done() and not self._is_reason_to_stop():
                await asyncio.wait({sending})
        finally:
            if not sending.done():
                await _end(sending)
        if sending.cancelled():
            raise httpcore.WriteError("the peer answered before it had everything")
        if isinstance(error := sending.exception(), OSError):  # what anyio leaves unmapped, TLS errors mostly
            raise httpcore.WriteError(str(error)) from error
        if isinstance(error, httpcore.WriteError):
            # The hang-up was noticed by writing; what the peer said before is on its way to the listener.
            await asyncio.wait({self._heard}, timeout=timeout)
        sending.result()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's interface
        """Read what comes.

        Raises:
            httpcore.ReadTimeout: nothing came for `timeout` seconds.
            httpcore.ReadError: the connection broke.
        """
        if self._heard is not None:
            await asyncio.wait({self._heard}, timeout=timeout)
            if not self._heard.done():
                raise httpcore.ReadTimeout
            heard, self._heard = self._heard, None
            try:
                return heard.result()
            except OSError as error:
                raise httpcore.ReadError(str(error)) from error
        try:
            return await self._inner.read(max_bytes, timeout)
        except ssl.SSLError as error:
            raise httpcore.ReadError(str(error)) from error

    async def aclose(self) -> None:
        """Close."""
        heard, self._heard = self._heard, None
        if heard is not None:
            await _end(heard)
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
    ) -> httpcore.AsyncNetworkStream:
        """Speak TLS from here on."""
        return ListeningStream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's interface
        """Facts about the connection."""
        return self._inner.get_extra_info(info)

    def _is_reason_to_stop(self) -> bool:
        if self._heard is None or not self._heard.done():
            return False
        if self._heard.cancelled() or self._heard.exception() is not None:
            return True
        return not _GO_ON.match(self._heard.result())


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end; what it says is of no interest any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
