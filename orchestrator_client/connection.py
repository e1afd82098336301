"""The only place that makes Redis connections, and the only one that knows what a lost server looks like."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import redis
import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)
from redis.retry import Retry as SyncRetry

from orchestrator_client.errors import BrokerRefusedError

DISCONNECTED = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, InvalidResponse, OSError, asyncio.TimeoutError)
"""Everything that means "no usable server now, try again": redis-py's two network errors have no common base, and a
server that was demoted to replica answers with ReadOnlyError."""

_CONNECT_TIMEOUT_SEC = 5.0
COMMAND_TIMEOUT_SEC = 10.0
_IDLE_CHECK_SEC = 15
_FIRST_PAUSE_SEC = 0.1
_LONGEST_PAUSE_SEC = 5.0


def _pool(url: str, *, connections: int, reply_timeout_sec: float | None = COMMAND_TIMEOUT_SEC) -> ConnectionPool:
    # No retry inside redis-py: what to do after a lost connection differs from caller to caller, and its retry would
    # hide that messages were missed.
    return ConnectionPool.from_url(
        url,
        max_connections=connections,
        protocol=2,
        socket_connect_timeout=_CONNECT_TIMEOUT_SEC,
        socket_timeout=reply_timeout_sec,
        socket_keepalive=True,
        health_check_interval=_IDLE_CHECK_SEC,
        retry=Retry(NoBackoff(), 0),
    )


def command_client(url: str) -> aioredis.Redis:
    """A client for commands. Connects at the first use; raises `DISCONNECTED` errors instead of retrying."""
    return aioredis.Redis.from_pool(_pool(url, connections=8))  # closes the pool with itself


def batch_client(url: str) -> aioredis.Redis:
    """A client for long pipelines over one connection, without a timeout for each reply.

    A timer for each of a thousand replies costs more than reading them: whoever uses this sets one `asyncio.timeout`
    of COMMAND_TIMEOUT_SEC around the whole.
    """
    return aioredis.Redis.from_pool(_pool(url, connections=1, reply_timeout_sec=None))


def subscriber_connection(url: str) -> AbstractConnection:
    """One bare connection for a subscriber, not yet connected; nothing reconnects it behind the caller's back."""
    connection: AbstractConnection = _pool(url, connections=1).make_connection()  # type: ignore[no-untyped-call]
    return connection


def sync_client(url: str) -> redis.Redis:
    """A blocking client for short-lived programs, never for the daemon. Connects at the first use, does not retry.

    Raises:
        BrokerRefusedError: the address has an option that does not exist or has an unusable value.
    """
    try:
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_connect_timeout=_CONNECT_TIMEOUT_SEC,
            socket_timeout=COMMAND_TIMEOUT_SEC,
            socket_keepalive=True,
            health_check_interval=_IDLE_CHECK_SEC,
            retry=SyncRetry(NoBackoff(), 0),
        )
        pool.make_connection()  # unknown options would otherwise surface as a TypeError at the first command
    except (TypeError, ValueError) as error:
        raise BrokerRefusedError(f"the broker address {redacted(url)} cannot be used: {error}") from error
    return redis.Redis(connection_pool=pool)


_URL_OPTIONS = ("db", "ssl_", "client_name", "username", "password")


def check_url(url: str) -> None:
    """Look whether connections can be made from a URL, without connecting.

    Raises:
        ValueError: a part of it is wrong; the text says which, and what is allowed.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss", "unix"} or not (parts.hostname or parts.path):
        raise ValueError("expected redis://HOST:PORT/DB, rediss://… or unix:///PATH")
    parts.port  # noqa: B018 - raises ValueError for a port that is no number
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdigit():
        raise ValueError(f"the database {database!r} is no number: expected redis://HOST:PORT/DB")
    for name in parse_qs(parts.query, keep_blank_values=True):
        if not name.startswith(_URL_OPTIONS):
            raise ValueError(f"the option {name!r} is not supported: expected db, client_name or ssl_… options")
    try:
        _pool(url, connections=1).make_connection()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ValueError(f"no connection can be made from it: {error}") from error


def redacted(url: str) -> str:
    """The address without credentials, for logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address that cannot be read)"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def pauses() -> Iterator[float]:
    """Seconds to wait between attempts to reconnect: doubling to 5 s, with jitter, for ever."""
    pause = _FIRST_PAUSE_SEC
    while True:
        yield pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not secrecy
        pause = min(pause * 2, _LONGEST_PAUSE_SEC)


async def check_access(client: aioredis.Redis, url: str) -> None:
    """Make one round trip.

    Raises:
        BrokerRefusedError: the server refused the credentials or the database.
        DISCONNECTED: there is no server, or it does not answer.
    """
    try:
        await client.ping()
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise BrokerRefusedError(
            f"the broker at {redacted(url)} refused the credentials in REDIS_URL: {error}"
        ) from error
    except ResponseError as error:
        if "DB index" in str(error):
            raise BrokerRefusedError(f"the broker at {redacted(url)} has no such database: {error}") from error
        raise RedisConnectionError(str(error)) from error  # it is up and has a problem of its own: a reason to wait
