"""A subscription that never stays deaf: one bare connection, own PING deadline, reconnects for ever.

redis-py's PubSub re-subscribes silently after a lost connection, which hides that messages were missed. Here each
connection is one subscription: when it ends, the caller is told and the gap is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from orchestrator_client.connection import pauses, redacted, subscriber_connection

_READ_TIMEOUT_SEC: Final = 1.0
_PING_AFTER_SEC: Final = 4.0
"""Silence after which the server is asked whether it is there."""
_DEAD_AFTER_SEC: Final = 12.0
"""Silence after which the connection counts as dead (promise: noticed within 15 s)."""
_YIELD_EVERY: Final = 32
"""Buffered messages are read without suspending; after this many the other tasks of the loop get a turn."""

log = structlog.get_logger()


class Subscriber:
    """Keeps a subscription to some channels alive and hands over each message.

    Args:
        url: the broker.
        channels: what to subscribe to.
        on_message: called for each message with channel and body, in order; must not block.
        on_subscribed: awaited after each (re-)subscription has been confirmed, before the first message.
        on_lost: called when the subscription is lost, or could not be made; must not block.
    """

    def __init__(
        self,
        url: str,
        channels: tuple[str, ...],
        on_message: Callable[[str, bytes], None],
        on_subscribed: Callable[[], Awaitable[None]],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._url = url
        self._channels = channels
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._on_lost = on_lost
        self.gaps = 0
        """How often the subscription was interrupted: each time, messages may have been missed."""

    async def run(self) -> None:
        """Stay subscribed until cancelled."""
        subscribed_before = False
        waits = pauses()
        while True:
            connection = subscriber_connection(self._url)
            try:
                await self._subscribe(connection)
                if subscribed_before:
                    self.gaps += 1
                    log.warning("subscribed again; messages may have been missed", action="resubscribe", gaps=self.gaps)
                subscribed_before = True
                waits = pauses()
                await self._on_subscribed()
                await self._read(connection)
            except (TimeoutError, RedisError, OSError) as error:
                self._on_lost()
                pause = next(waits)
                log.warning(
                    "subscription lost, reconnecting",
                    action="reconnect", broker=redacted(self._url), error=str(error), pause_sec=round(pause, 2),
                )  # fmt: skip
                await asyncio.sleep(pause)
            finally:
                await connection.disconnect(nowait=True)

    async def _subscribe(self, connection: AbstractConnection) -> None:
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_command("SUBSCRIBE", *self._channels, check_health=False)
        for _ in self._channels:
            await connection.read_response()

    async def _read(self, connection: AbstractConnection) -> None:
        heard = time.monotonic()
        pinged = heard
        messages = 0
        while True:
            reply = await connection.read_response(timeout=_READ_TIMEOUT_SEC)
            now = time.monotonic()
            if reply is not None:
                heard = now
                if isinstance(reply, list) and reply[0] == b"message":
                    self._on_message(reply[1].decode(), reply[2])
                messages += 1
                if messages % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                continue
            if now - heard > _DEAD_AFTER_SEC:
                raise RedisConnectionError(f"no answer to PING for {now - heard:.0f} s")
            if now - max(heard, pinged) > _PING_AFTER_SEC:
                await connection.send_command("PING", check_health=False)
                pinged = now
