"""Looks at a broker the way a worker will use it: may it do what it must, is the clock right, are the buffers sane?"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from redis import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from orchestrator_client import channels
from orchestrator_client.connection import redacted, sync_client
from orchestrator_client.task_client import talking
from orchestrator_client.task_states import decoded

_ROUND_TRIPS = 5
_PROBE_TTL_SEC = 10


@dataclass(frozen=True)
class BrokerReport:
    """What a broker said.

    Attributes:
        version: the server's name and version; empty when it does not tell.
        round_trip_ms: the fastest of some PINGs.
        clock_ahead_sec: how far the broker's clock is ahead of ours, less the way there.
        denied: sentences about what this user may not do, though a worker must.
        unchecked: permissions that could not be looked up.
        pubsub_limit_bytes: hard output limit of a subscriber; 0 is none; None when the server does not tell.
    """

    version: str
    round_trip_ms: float
    clock_ahead_sec: float
    denied: tuple[str, ...]
    unchecked: tuple[str, ...]
    pubsub_limit_bytes: int | None


def probe_broker(url: str, topic: str) -> BrokerReport:
    """Ask a broker.

    Raises:
        BrokerUnreachableError: no broker answers.
        BrokerRefusedError: it refuses the address or the credentials.
    """
    with sync_client(url) as client, talking(redacted(url)):
        client.ping()
        round_trip = min(_timed_ping(client) for _ in range(_ROUND_TRIPS))
        publish_denied, unchecked = _publish_rights(client, topic)
        return BrokerReport(
            version=_version(client),
            round_trip_ms=round_trip * 1000,
            clock_ahead_sec=_clock_ahead(client, round_trip),
            denied=(*_key_rights(client), *_subscribe_rights(client, topic), *publish_denied),
            unchecked=unchecked,
            pubsub_limit_bytes=_pubsub_limit(client),
        )


def _timed_ping(client: Redis) -> float:
    started = time.perf_counter()
    client.ping()
    return time.perf_counter() - started


def _clock_ahead(client: Redis, round_trip: float) -> float:
    try:
        seconds, microseconds = client.time()
    except ResponseError:
        return 0.0
    return seconds + microseconds / 1e6 - (time.time() - round_trip / 2)


def _version(client: Redis) -> str:
    try:
        info = client.info("server")
    except ResponseError:
        return ""
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info.get('redis_version', ''))}".strip()


def _pubsub_limit(client: Redis) -> int | None:
    try:
        answer = client.config_get("client-output-buffer-limit")
    except ResponseError:  # managed servers hide CONFIG
        return None
    words = " ".join(str(value) for value in answer.values()).split()
    try:
        return int(words[words.index("pubsub") + 1])
    except (ValueError, IndexError):
        return None


def _key_rights(client: Redis) -> list[str]:
    """Try what a worker writes, under names that nobody else has, and remove it again."""
    worker_id = f"doctor-{secrets.token_hex(6)}"
    task, worker = channels.task_key(worker_id), channels.worker_key(worker_id)
    heartbeat, claim = channels.heartbeat_key(worker_id), channels.claim_key(worker_id)
    pipe = client.pipeline(transaction=False)
    pipe.hset(worker, "status", "STARTING")
    pipe.expire(worker, _PROBE_TTL_SEC)
    pipe.set(heartbeat, "1", ex=_PROBE_TTL_SEC)
    pipe.hset(task, "status", "QUEUED")
    pipe.expire(task, _PROBE_TTL_SEC)
    pipe.set(claim, worker_id, nx=True, ex=_PROBE_TTL_SEC)
    pipe.eval("return redis.call('HGET', KEYS[1], 'status')", 1, task)  # final events are published by a script
    pipe.srem(channels.WORKER_IDS, worker_id)  # adding it, even for a moment, would show it to orchestrators
    pipe.delete(worker, heartbeat, task, claim)
    return sorted({str(answer) for answer in pipe.execute(raise_on_error=False) if isinstance(answer, RedisError)})


def _subscribe_rights(client: Redis, topic: str) -> list[str]:
    pubsub = client.pubsub()  # type: ignore[no-untyped-call]  # a gap in redis-py's types
    try:
        for channel in (topic, channels.TASK_CONTROL):
            pubsub.subscribe(channel)
            pubsub.get_message(timeout=1.0)
    except NoPermissionError as error:
        return [f"subscribe: {error}"]
    finally:
        pubsub.close()
    return []


def _publish_rights(client: Redis, topic: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Look up what may be published; trying it would send messages to everybody."""
    wanted = (channels.TASK_EVENTS, channels.WORKER_EVENTS, channels.TASK_CONTROL, topic)
    try:
        user = decoded(client.acl_whoami())
        answers = [client.acl_dryrun(user, "PUBLISH", channel, "x") for channel in wanted]
        answers.append(client.acl_dryrun(user, "SADD", channels.WORKER_IDS, "x"))
    except ResponseError:
        return (), wanted
    return tuple(f"publish: {text}" for answer in answers if (text := decoded(answer)) != "OK"), ()
