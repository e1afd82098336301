"""Who this worker is, and that nobody else is (WIRE 0 step 1, 9.7).

Each worker id has a folder of durable state, locked while its daemon lives. A daemon without a WORKER_ID takes over the
id of a dead one in the same RESULTS_DIR that still owes something; so nothing is lost without a pinned id either.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import redis.asyncio as aioredis
import structlog
from redis.exceptions import ResponseError

from orchestrator_client.channels import WORKER_EVENTS, WORKER_IDS, heartbeat_key, worker_key
from orchestrator_client.errors import BrokerRefusedError
from orchestrator_client.messages import WorkerEvent
from worker.host_facts import host_id
from worker.settings import Settings, random_worker_id
from worker.task_journal import JournalError, owes_anything

JOURNAL_FILE: Final = "journal.sqlite3"
_LOCK_FILE: Final = "lock"
_POLL_SEC: Final = 0.25

_Facts = dict[bytes, bytes]
"""A registration as it stands in Redis."""
_RANDOM_ID: Final = re.compile(r"[0-9a-f]{16}")

log = structlog.get_logger()


class IdInUseError(Exception):
    """Another live process has this WORKER_ID."""


@dataclass(frozen=True)
class StateFolder:
    """The locked folder of one worker id. The lock ends with the process."""

    worker_id: str
    path: Path
    lock: int

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / JOURNAL_FILE

    def release(self) -> None:
        """Give the id up."""
        os.close(self.lock)


def take_identity(settings: Settings) -> StateFolder:
    """Choose and lock a worker id.

    Raises:
        IdInUseError: a live process of this host has the wanted id.
        OSError: the folder cannot be made.
    """
    if settings.worker_id:
        state = _lock(settings.state_root, settings.worker_id)
        if state is None:
            holder = _holder(settings.state_root / settings.worker_id)
            raise IdInUseError(
                f"WORKER_ID={settings.worker_id!r} is in use by the live process {holder} with the same RESULTS_DIR "
                f"{settings.results_dir}; stop it or choose another WORKER_ID"
            )
        return state
    for folder in sorted(settings.state_root.glob("*/")):
        # Only ids that were random: a pinned one belongs to whoever pinned it, also while its daemon is down.
        state = _lock(settings.state_root, folder.name) if _RANDOM_ID.fullmatch(folder.name) else None
        if state is None:
            continue
        try:
            owing = owes_anything(state.journal)
        except JournalError as error:
            log.warning("skipping the folder of a dead worker", action="start", folder=str(folder), error=str(error))
            state.release()
            continue
        if owing:
            log.info("taking over the id of a dead worker with unfinished work", action="start", worker_id=folder.name)
            return state
        shutil.rmtree(folder, ignore_errors=True)  # a random id that will not come back
        state.release()
    state = _lock(settings.state_root, random_worker_id())
    if state is None:
        raise IdInUseError("a random id is in use; start again")
    return state


async def take_over(client: aioredis.Redis, worker_id: str) -> None:
    """Make sure that a registration under this id is dead, then unregister it, so that its tasks are requeued.

    Raises:
        IdInUseError: its owner is alive.
        BrokerRefusedError: the key holds something else, or may not be read.
        DISCONNECTED: the broker is away.
    """
    key = worker_key(worker_id)
    try:
        await client.hget(key, "worker_id")
    except ResponseError as error:
        raise BrokerRefusedError(
            f"the key {key} in the broker cannot be used: {error}; another system may use it: "
            "take another database in REDIS_URL, or another WORKER_ID"
        ) from error
    facts: _Facts = await client.hgetall(key)  # type: ignore[assignment]  # the client does not decode
    if not facts:
        return
    if not _surely_dead(facts) and await client.exists(heartbeat_key(worker_id)):
        interval = _number(facts.get(b"heartbeat_interval_sec"), default=30)
        log.info(
            "this id is registered; watching whether its owner lives",
            action="start",
            worker_id=worker_id,
            seconds=interval,
        )
        deadline = time.monotonic() + interval + 1
        while time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SEC)
            if await client.hget(key, "last_seen") != facts.get(b"last_seen"):
                host = facts.get(b"host_id", b"an unknown host").decode(errors="replace").partition(":")[0]
                raise IdInUseError(
                    f"WORKER_ID={worker_id!r} is in use: process {_number(facts.get(b'pid'))} on {host} "
                    "keeps its heartbeat; stop it or choose another WORKER_ID"
                )
    event = WorkerEvent(type="UNREGISTER", worker_id=worker_id)
    async with client.pipeline(transaction=True) as pipe:
        pipe.srem(WORKER_IDS, worker_id)
        pipe.delete(key)
        pipe.delete(heartbeat_key(worker_id))
        pipe.publish(WORKER_EVENTS, event.encode())
        await pipe.execute()
    log.info("unregistered the dead owner of this id; its tasks are requeued", action="start", worker_id=worker_id)


def process_home() -> str:
    """Where a process id means something: host, boot and process namespace."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"{host_id()}:{namespace}"


def _surely_dead(facts: _Facts) -> bool:
    """Whether the owner ran on this host and its process is gone, or its process id is now ours."""
    pid = _number(facts.get(b"pid"))
    same_host = facts.get(b"host_id", b"").decode(errors="replace") == process_home()
    return same_host and (pid == os.getpid() or not psutil.pid_exists(pid))


def _number(value: bytes | None, default: int = 0) -> int:
    return int(value) if value is not None and value.isdigit() and len(value) < 10 else default


def _lock(root: Path, worker_id: str) -> StateFolder | None:
    folder = root / worker_id
    root.mkdir(parents=True, exist_ok=True, mode=0o700)  # the journal holds the headers of tasks' destinations
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return StateFolder(worker_id, folder, descriptor)


def _holder(folder: Path) -> str:
    return (folder / _LOCK_FILE).read_text().strip() or "(unknown)"
