"""What was accepted is never forgotten: one SQLite file, one writer thread, commits grouped.

Calls made while a commit is under way share the next one, so a burst of tasks costs few fsyncs. Every awaited call
returns only after its commit (WAL, synchronous FULL).

| table | one row for |
|---|---|
| tasks | each task id: its last dispatch, how often it was started, how it ended |
| owed  | each event that the orchestrator has not heard yet |
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

State = Literal["accepted", "succeeded", "failed"]
ResultT = TypeVar("ResultT")

KEEP_ENDED_SEC: Final = 7 * 24 * 3600
"""How long an ended task is remembered, so that a repeated dispatch is answered and not run again."""
_LATER_SEC: Final = 0.05
KEEP_OWED_SEC: Final = 24 * 3600
"""How long an event waits for somebody to listen."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    task_id TEXT PRIMARY KEY, dispatch TEXT NOT NULL, state TEXT NOT NULL, envelope BLOB, received_at REAL NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0, ended_at REAL, final_event BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_open ON tasks (received_at) WHERE state = 'accepted';
CREATE INDEX IF NOT EXISTS tasks_ended ON tasks (ended_at) WHERE ended_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS owed (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL, token TEXT NOT NULL, event BLOB NOT NULL,
    since REAL NOT NULL
);
"""


class JournalError(Exception):
    """The journal cannot be written: disk full, folder gone, file damaged. Nothing can be accepted then."""


@dataclass(frozen=True)
class Acceptance:
    """The answer to one dispatch.

    Attributes:
        dispatch: token of this dispatch; a later dispatch of the same task has another one.
        known: the state in which the task was already, or None if it is to be run now.
        final_event: the event that ended it, when it has ended before.
    """

    dispatch: str
    known: State | None
    final_event: bytes | None = None


@dataclass(frozen=True)
class OpenTask:
    """A task that was accepted and has not ended."""

    task_id: str
    dispatch: str
    envelope: bytes
    received_at: float
    starts: int


@dataclass(frozen=True)
class OwedEvent:
    """An event that must still be heard. `token` makes its publication unique."""

    seq: int
    task_id: str
    token: str
    event: bytes


@dataclass
class _Job:
    work: Callable[[sqlite3.Connection], object]
    future: asyncio.Future[object] | None
    value: object = None
    error: Exception | None = None


class TaskJournal:
    """See the module's text. Make and use it inside one event loop; `close` it at the end."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._later: deque[_Job] = deque()
        """What nobody waits for: it joins the next commit, or has its own after `_LATER_SEC`."""
        self._wake_planned = False
        self._connection = _open(path)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    async def accept(self, arrivals: list[tuple[str, bytes, float]]) -> list[Acceptance]:
        """Accept tasks, each given as id, envelope and time of receipt.

        A task that is open, or has succeeded, is not accepted again; one that failed is (WIRE 9.9).
        """
        return await self._do(lambda db: [_accept(db, *arrival) for arrival in arrivals])

    def note_start(self, task_id: str) -> None:
        """Count one start; durable soon, so that a task that ends the daemon is not started for ever."""
        query = "UPDATE tasks SET starts = starts + 1 WHERE task_id = ?"
        self._put_later(_Job(lambda db: db.execute(query, (task_id,)), None))

    async def end(self, ends: list[tuple[OwedEvent, State]]) -> list[int]:
        """Record how tasks ended, and that their final events are owed. Returns the events' numbers."""

        def work(db: sqlite3.Connection) -> list[int]:
            db.executemany(
                "UPDATE tasks SET state = ?, ended_at = ?, final_event = ?, envelope = NULL WHERE task_id = ?",
                [(state, time.time(), owed.event, owed.task_id) for owed, state in ends],
            )
            return [_owe(db, owed.task_id, owed.token, owed.event) for owed, _ in ends]

        return await self._do(work)

    async def owe(self, task_id: str, event: bytes) -> tuple[int, str]:
        """Record an event that is owed outside a task's normal life. Returns its number and token."""
        token = uuid.uuid4().hex
        return await self._do(lambda db: (_owe(db, task_id, token, event), token))

    async def forget(self, task_id: str) -> None:
        """Let a task that has ended be accepted again."""
        await self._do(lambda db: db.execute("DELETE FROM tasks WHERE task_id = ? AND state != 'accepted'", (task_id,)))

    def heard(self, numbers: list[int]) -> None:
        """Forget owed events that have been heard. Need not be durable: publishing again has no effect."""
        query = "DELETE FROM owed WHERE seq = ?"
        self._put_later(_Job(lambda db: db.executemany(query, [(number,) for number in numbers]), None))

    async def owed(self, limit: int, *, min_age_sec: float = 0.0) -> list[OwedEvent]:
        """The oldest events that are still owed.

        Args:
            limit: how many at most.
            min_age_sec: younger ones are left out: whoever recorded them is about to publish them.
        """
        now = time.time()
        # One from the future was recorded before the clock was set back.
        query = "SELECT seq, task_id, token, event FROM owed WHERE since <= ? OR since > ? ORDER BY seq LIMIT ?"
        return await self._do(
            lambda db: [OwedEvent(*row) for row in db.execute(query, (now - min_age_sec, now, limit))]
        )

    async def open_tasks(self) -> list[OpenTask]:
        """Tasks that were accepted and have not ended, oldest first."""
        columns = "task_id, dispatch, envelope, received_at, starts"
        query = f"SELECT {columns} FROM tasks WHERE state = 'accepted' ORDER BY received_at"  # noqa: S608 - constants
        return await self._do(lambda db: [OpenTask(*row) for row in db.execute(query)])

    async def envelope(self, task_id: str) -> bytes:
        """The envelope of an open task."""
        query = "SELECT envelope FROM tasks WHERE task_id = ? AND envelope IS NOT NULL"
        row = await self._do(lambda db: db.execute(query, (task_id,)).fetchone())
        if row is None:
            raise JournalError(f"task {task_id} is not open in {self._path}")
        return bytes(row[0])

    async def prune(self) -> None:
        """Forget ended tasks and unheard events that are too old."""

        def work(db: sqlite3.Connection) -> None:
            now = time.time()
            db.execute("DELETE FROM tasks WHERE ended_at < ?", (now - KEEP_ENDED_SEC,))
            db.execute("DELETE FROM owed WHERE since < ?", (now - KEEP_OWED_SEC,))

        await self._do(work)

    async def close(self) -> None:
        """Commit what is queued, end the thread, close the file."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        self._connection.close()

    async def _do(self, work: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        future: asyncio.Future[object] = self._loop.create_future()
        self._jobs.put(_Job(work, future))
        return await future  # type: ignore[return-value]  # the future carries what `work` returned

    def _put_later(self, job: _Job) -> None:
        self._later.append(job)
        if not self._wake_planned:
            self._wake_planned = True
            self._loop.call_later(_LATER_SEC, self._wake)

    def _wake(self) -> None:
        self._wake_planned = False
        if self._later:
            self._jobs.put(_Job(lambda _: None, None))

    def _write(self) -> None:
        open_for_more = True
        while open_for_more:
            jobs = [self._jobs.get()]
            while not self._jobs.empty():
                jobs.append(self._jobs.get())
            open_for_more = None not in jobs
            batch = [self._later.popleft() for _ in range(len(self._later))]
            batch += [job for job in jobs if job is not None]
            if batch:
                self._commit(batch)
                self._loop.call_soon_threadsafe(_answer, batch)

    def _commit(self, batch: list[_Job]) -> None:
        db = self._connection
        try:
            db.execute("BEGIN IMMEDIATE")
            for job in batch:
                job.value = job.work(db)
            db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - each caller gets it; the thread must live on
            if db.in_transaction:
                db.execute("ROLLBACK")
            for job in batch:
                job.error = JournalError(f"cannot write the journal {self._path}: {error}")
                job.error.__cause__ = error


def _answer(batch: list[_Job]) -> None:
    for job in batch:
        if job.future is None or job.future.done():
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.value)


def owes_anything(path: Path) -> bool:
    """Whether a journal that no process uses holds open tasks or unheard events."""
    if not path.exists():
        return False
    db = _open(path)
    try:
        query = "SELECT EXISTS (SELECT 1 FROM tasks WHERE state = 'accepted') OR EXISTS (SELECT 1 FROM owed)"
        return bool(db.execute(query).fetchone()[0])
    except sqlite3.Error as error:
        raise JournalError(f"cannot read the journal {path}: {error}") from error
    finally:
        db.close()


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_SCHEMA)
    except sqlite3.Error as error:
        raise JournalError(f"cannot open the journal {path}: {error}; free disk space or move the file away") from error
    return db


def _accept(db: sqlite3.Connection, task_id: str, envelope: bytes, received_at: float) -> Acceptance:
    row = db.execute("SELECT dispatch, state, final_event FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
    if row is not None and row[1] != "failed":
        return Acceptance(row[0], row[1], row[2])
    dispatch = uuid.uuid4().hex
    db.execute(
        "INSERT OR REPLACE INTO tasks (task_id, dispatch, state, envelope, received_at) "
        "VALUES (?, ?, 'accepted', ?, ?)",
        (task_id, dispatch, envelope, received_at),
    )
    return Acceptance(dispatch, None)


def _owe(db: sqlite3.Connection, task_id: str, token: str, event: bytes) -> int:
    cursor = db.execute(
        "INSERT INTO owed (task_id, token, event, since) VALUES (?, ?, ?, ?)", (task_id, token, event, time.time())
    )
    return int(cursor.lastrowid or 0)
