"""What was accepted is never forgotten: one SQLite file, one writer thread, commits grouped.

Calls made while a commit is under way share the next one, so a burst of tasks costs few fsyncs. Every awaited call
returns only after its commit (WAL, synchronous FULL).
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
from typing import Final, TypeVar

from worker import journal_tables
from worker.journal_tables import Acceptance, Arrival, OpenTask, OwedEvent, State, StoredDelivery

ResultT = TypeVar("ResultT")

KEEP_ENDED_SEC: Final = 7 * 24 * 3600
"""How long an ended task is remembered, so that a repeated dispatch is answered and not run again."""
_LATER_SEC: Final = 0.05
KEEP_OWED_SEC: Final = 24 * 3600
"""How long an event waits for somebody to listen."""


class JournalError(Exception):
    """The journal cannot be written: disk full, folder gone, file damaged. Nothing can be accepted then."""


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

    async def accept(self, arrivals: list[Arrival]) -> list[Acceptance]:
        """Accept tasks.

        A task that is open, or has succeeded, is not accepted again; one that failed is (WIRE 9.9), unless it failed
        only because its result could not be delivered: then that result is to be delivered (WIRE 9.28).
        """
        return await self._do(lambda db: [journal_tables.accept(db, arrival) for arrival in arrivals])

    def note_start(self, task_id: str) -> None:
        """Count one start; durable soon, so that a task that ends the daemon is not started for ever."""
        query = "UPDATE tasks SET starts = starts + 1 WHERE task_id = ?"
        self._put_later(_Job(lambda db: db.execute(query, (task_id,)), None))

    def take_back_start(self, task_id: str) -> None:
        """Do not count the last start: the run was given up, and not because of this task or of the daemon's end."""
        query = "UPDATE tasks SET starts = MAX(starts - 1, 0) WHERE task_id = ?"
        self._put_later(_Job(lambda db: db.execute(query, (task_id,)), None))

    async def end(self, ends: list[tuple[OwedEvent, State]], deliveries: list[StoredDelivery]) -> list[int]:
        """Record how tasks ended, and that their final events are owed; or that their results are to be delivered.

        Returns:
            The numbers of the owed events.
        """

        def work(db: sqlite3.Connection) -> list[int]:
            db.executemany(
                "UPDATE tasks SET state = 'delivering', envelope = NULL WHERE task_id = ?",
                [(delivery.task_id,) for delivery in deliveries],
            )
            for delivery in deliveries:
                journal_tables.store_delivery(db, delivery)
            return journal_tables.end(db, ends)

        return await self._do(work)

    async def note_delivery(self, delivery: StoredDelivery) -> None:
        """Record where a delivery goes and how far it is: what is sent is not sent again after a restart."""
        query = "UPDATE deliveries SET plan = ?, progress = ? WHERE task_id = ?"
        await self._do(lambda db: db.execute(query, (delivery.plan, delivery.progress, delivery.task_id)))

    async def end_delivery(self, owed: OwedEvent, state: State, *, keep: bool) -> int:
        """Record how a delivery ended; with `keep` it can be begun again by `reopen`. Returns the event's number."""

        def work(db: sqlite3.Connection) -> int:
            if not keep:
                db.execute("DELETE FROM deliveries WHERE task_id = ?", (owed.task_id,))
            return journal_tables.end(db, [(owed, state)])[0]

        return await self._do(work)

    async def open_deliveries(self) -> list[StoredDelivery]:
        """Deliveries that have not ended, oldest first."""
        query = (
            f"SELECT {journal_tables.DELIVERY_COLUMNS} FROM deliveries AS d JOIN tasks AS t USING (task_id) "  # noqa: S608 - constants
            "WHERE t.state = 'delivering' ORDER BY d.since"
        )
        return await self._do(lambda db: [StoredDelivery(*row) for row in db.execute(query)])

    async def reopen(self, task_id: str) -> StoredDelivery | None:
        """Begin a failed delivery again as a dispatch of its own; None if there is none."""
        return await self._do(lambda db: journal_tables.reopen(db, task_id))

    async def drop_delivery(self, task_id: str) -> None:
        """Forget a delivery that nobody can carry out; its task counts as failed."""
        await self._do(lambda db: journal_tables.drop_delivery(db, task_id))

    async def owe(self, task_id: str, event: bytes) -> tuple[int, str]:
        """Record an event that is owed outside a task's normal life. Returns its number and token."""
        token = uuid.uuid4().hex
        return await self._do(lambda db: (journal_tables.owe(db, task_id, token, event), token))

    async def forget(self, task_id: str) -> None:
        """Let a task that has ended be accepted again."""
        query = "DELETE FROM tasks WHERE task_id = ? AND state IN ('succeeded', 'failed')"
        await self._do(lambda db: db.execute(query, (task_id,)))

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
        kept = "EXISTS (SELECT 1 FROM deliveries AS d WHERE d.task_id = tasks.task_id)"
        columns = f"task_id, dispatch, envelope, received_at, starts, {kept}"
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
            db.execute("DELETE FROM tasks WHERE ended_at < ? AND state != 'delivering'", (now - KEEP_ENDED_SEC,))
            db.execute("DELETE FROM deliveries WHERE task_id NOT IN (SELECT task_id FROM tasks)")
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
    """Whether a journal that no process uses holds open tasks, undelivered results or unheard events."""
    if not path.exists():
        return False
    db = _open(path)
    try:
        query = (
            "SELECT EXISTS (SELECT 1 FROM tasks WHERE state IN ('accepted', 'delivering')) "
            "OR EXISTS (SELECT 1 FROM deliveries) OR EXISTS (SELECT 1 FROM owed)"
        )
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
        db.executescript(journal_tables.SCHEMA)
    except sqlite3.Error as error:
        raise JournalError(f"cannot open the journal {path}: {error}; free disk space or move the file away") from error
    return db
