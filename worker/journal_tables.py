"""The journal's tables, and each change of them as one function of a connection. Transactions are the caller's.

| table | one row for |
|---|---|
| tasks | each task id: its last dispatch, how often it was started, how it ended |
| deliveries | each result that has to reach an orchestrator over HTTP, and how far it is; refused ones stay for later |
| owed | each event that the orchestrator has not heard yet |
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from dataclasses import dataclass
from typing import Final, Literal

State = Literal["accepted", "delivering", "succeeded", "failed"]

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS tasks (
    task_id TEXT PRIMARY KEY, dispatch TEXT NOT NULL, state TEXT NOT NULL, envelope BLOB, received_at REAL NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0, ended_at REAL, final_event BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_open ON tasks (received_at) WHERE state = 'accepted';
CREATE INDEX IF NOT EXISTS tasks_delivering ON tasks (received_at) WHERE state = 'delivering';
CREATE INDEX IF NOT EXISTS tasks_ended ON tasks (ended_at) WHERE ended_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS deliveries (
    task_id TEXT PRIMARY KEY, dispatch TEXT NOT NULL, work TEXT NOT NULL, plan BLOB NOT NULL, progress BLOB NOT NULL,
    since REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owed (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL, token TEXT NOT NULL, event BLOB NOT NULL,
    since REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Arrival:
    """A dispatch that asks to be accepted.

    Attributes:
        task_id: the task.
        envelope: the message as it came.
        received_at: seconds since the epoch.
        work: digest of what is to be computed; empty when its result stays here. A result that could not be delivered
            serves a later dispatch of equal work.
        refused: whether it cannot run here, so that an earlier result that was not delivered stays.
    """

    task_id: str
    envelope: bytes
    received_at: float
    work: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Acceptance:
    """The answer to one dispatch.

    Attributes:
        dispatch: token of this dispatch; a later dispatch of the same task has another one.
        known: the state in which the task was already, or None if it is to be run now.
        final_event: the event that ended it, when it has ended before.
        undelivered: the finished work that was not delivered before; it is to be delivered now, and not run.
        keeps_result: whether an earlier result that was not delivered stays beside a refused dispatch.
    """

    dispatch: str
    known: State | None
    final_event: bytes | None = None
    undelivered: StoredDelivery | None = None
    keeps_result: bool = False


@dataclass(frozen=True)
class OpenTask:
    """A task that was accepted and has not ended; `keeps_result` as in `Acceptance`."""

    task_id: str
    dispatch: str
    envelope: bytes
    received_at: float
    starts: int
    keeps_result: bool = False


@dataclass(frozen=True)
class OwedEvent:
    """An event that must still be heard. `token` makes its publication unique."""

    seq: int
    task_id: str
    token: str
    event: bytes


@dataclass(frozen=True)
class StoredDelivery:
    """A result on its way to an orchestrator, or one that was refused.

    Attributes:
        task_id: the task.
        dispatch: which dispatch its end answers.
        work: see `Arrival.work`.
        plan: what has to be sent; opaque here.
        progress: what has been; opaque here.
        since: when this dispatch's delivery began, seconds since the epoch.
    """

    task_id: str
    dispatch: str
    work: str
    plan: bytes
    progress: bytes
    since: float


DELIVERY_COLUMNS: Final = "d.task_id, d.dispatch, d.work, d.plan, d.progress, d.since"


def accept(db: sqlite3.Connection, arrival: Arrival) -> Acceptance:
    task_id = arrival.task_id
    row = db.execute("SELECT dispatch, state, final_event FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
    if row is not None and row[1] != "failed":
        return Acceptance(row[0], row[1], row[2])
    if row is not None and arrival.work:
        same = db.execute("SELECT 1 FROM deliveries WHERE task_id = ? AND work = ?", (task_id, arrival.work)).fetchone()
        if same is not None and (stored := reopen(db, task_id)) is not None:
            return Acceptance(stored.dispatch, None, undelivered=stored)
    keeps_result = False
    if arrival.refused:
        kept = db.execute("SELECT 1 FROM deliveries WHERE task_id = ?", (task_id,)).fetchone()
        keeps_result = kept is not None
    else:
        db.execute("DELETE FROM deliveries WHERE task_id = ?", (task_id,))
    if row is not None:
        _forget_unheard(db, task_id)
    dispatch = uuid.uuid4().hex
    db.execute(
        "INSERT OR REPLACE INTO tasks (task_id, dispatch, state, envelope, received_at) "
        "VALUES (?, ?, 'accepted', ?, ?)",
        (task_id, dispatch, arrival.envelope, arrival.received_at),
    )
    return Acceptance(dispatch, None, keeps_result=keeps_result)


def _forget_unheard(db: sqlite3.Connection, task_id: str) -> None:
    """Drop the end of an earlier dispatch that nobody could hear so far: said late, it would undo the present one."""
    db.execute("DELETE FROM owed WHERE task_id = ?", (task_id,))


def drop_delivery(db: sqlite3.Connection, task_id: str) -> None:
    """Forget a delivery that nobody can carry out; its task counts as failed."""
    db.execute("DELETE FROM deliveries WHERE task_id = ?", (task_id,))
    db.execute(
        "UPDATE tasks SET state = 'failed', ended_at = ? WHERE task_id = ? AND state = 'delivering'",
        (time.time(), task_id),
    )


def reopen(db: sqlite3.Connection, task_id: str) -> StoredDelivery | None:
    dispatch = uuid.uuid4().hex
    changed = db.execute(
        "UPDATE tasks SET state = 'delivering', dispatch = ?, ended_at = NULL, final_event = NULL "
        "WHERE task_id = ? AND state = 'failed' AND EXISTS (SELECT 1 FROM deliveries WHERE task_id = ?)",
        (dispatch, task_id, task_id),
    )
    if changed.rowcount == 0:
        return None
    db.execute("UPDATE deliveries SET dispatch = ?, since = ? WHERE task_id = ?", (dispatch, time.time(), task_id))
    _forget_unheard(db, task_id)
    query = f"SELECT {DELIVERY_COLUMNS} FROM deliveries AS d WHERE task_id = ?"  # noqa: S608 - constants
    return StoredDelivery(*db.execute(query, (task_id,)).fetchone())


def store_delivery(db: sqlite3.Connection, delivery: StoredDelivery) -> None:
    values = (delivery.task_id, delivery.dispatch, delivery.work, delivery.plan, delivery.progress, delivery.since)
    db.execute(
        "INSERT OR REPLACE INTO deliveries (task_id, dispatch, work, plan, progress, since) VALUES (?, ?, ?, ?, ?, ?)",
        values,
    )


def end(db: sqlite3.Connection, ends: list[tuple[OwedEvent, State]]) -> list[int]:
    for owed, _ in ends:
        _forget_unheard(db, owed.task_id)
    db.executemany(
        "UPDATE tasks SET state = ?, ended_at = ?, final_event = ?, envelope = NULL WHERE task_id = ?",
        [(state, time.time(), owed.event, owed.task_id) for owed, state in ends],
    )
    return [owe(db, owed.task_id, owed.token, owed.event) for owed, _ in ends]


def owe(db: sqlite3.Connection, task_id: str, token: str, event: bytes) -> int:
    cursor = db.execute(
        "INSERT INTO owed (task_id, token, event, since) VALUES (?, ?, ?, ?)", (task_id, token, event, time.time())
    )
    return int(cursor.lastrowid or 0)
