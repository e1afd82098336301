"""The journal: what was accepted is known after a crash, and committed before anybody is told."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from worker.task_journal import JournalError, OwedEvent, State, TaskJournal, owes_anything


@pytest.fixture
async def journal(tmp_path: Path):
    journal = TaskJournal(tmp_path / "journal.sqlite3")
    yield journal
    await journal.close()


async def end(journal: TaskJournal, task_id: str, dispatch: str, state: State) -> int:
    [number] = await journal.end([(OwedEvent(-1, task_id, dispatch, b"event"), state)])
    return number


async def test_an_accepted_task_is_on_disk_when_accept_returns(tmp_path: Path, journal: TaskJournal):
    [answer] = await journal.accept([("t1", b"{}", 1.0)])

    assert answer.known is None
    with sqlite3.connect(tmp_path / "journal.sqlite3") as other:
        rows = other.execute("SELECT task_id, state, dispatch FROM tasks").fetchall()
    other.close()
    assert rows == [("t1", "accepted", answer.dispatch)]


async def test_a_second_dispatch_of_an_open_task_is_a_duplicate(journal: TaskJournal):
    [first, second] = await journal.accept([("t1", b"a", 1.0), ("t1", b"b", 2.0)])

    assert second.known == "accepted"
    assert second.dispatch == first.dispatch
    assert await journal.envelope("t1") == b"a"


async def test_a_succeeded_task_is_answered_with_its_event(journal: TaskJournal):
    [first] = await journal.accept([("t1", b"a", 1.0)])
    await end(journal, "t1", first.dispatch, "succeeded")

    [again] = await journal.accept([("t1", b"a", 2.0)])

    assert (again.known, again.final_event) == ("succeeded", b"event")


async def test_a_failed_task_is_accepted_anew_under_another_token(journal: TaskJournal):
    [first] = await journal.accept([("t1", b"a", 1.0)])
    journal.note_start("t1")
    await end(journal, "t1", first.dispatch, "failed")

    [again] = await journal.accept([("t1", b"b", 2.0)])

    assert again.known is None
    assert again.dispatch != first.dispatch
    [task] = await journal.open_tasks()
    assert (task.envelope, task.starts) == (b"b", 0)


async def test_an_end_and_the_event_it_owes_are_one_step(journal: TaskJournal):
    [first] = await journal.accept([("t1", b"a", 1.0)])

    number = await end(journal, "t1", first.dispatch, "succeeded")

    [owed] = await journal.owed(10)
    assert (owed.seq, owed.task_id, owed.token, owed.event) == (number, "t1", first.dispatch, b"event")
    assert await journal.open_tasks() == []


async def test_heard_events_are_forgotten_and_the_others_keep_their_order(journal: TaskJournal):
    numbers = [(await journal.owe(f"t{n}", b"e"))[0] for n in range(4)]

    journal.heard([numbers[0], numbers[2]])

    assert [owed.task_id for owed in await journal.owed(10)] == ["t1", "t3"]


async def test_everything_survives_a_close_without_warning(tmp_path: Path):
    path = tmp_path / "j" / "journal.sqlite3"
    first = TaskJournal(path)
    await first.accept([("t1", b"a", 1.0), ("t2", b"b", 2.0)])
    first.note_start("t1")
    await first.close()

    assert owes_anything(path)
    second = TaskJournal(path)
    tasks = await second.open_tasks()
    await second.close()

    assert [(task.task_id, task.envelope, task.starts) for task in tasks] == [("t1", b"a", 1), ("t2", b"b", 0)]


async def test_a_journal_owes_nothing_once_all_is_heard(tmp_path: Path, journal: TaskJournal):
    [first] = await journal.accept([("t1", b"a", 1.0)])
    number = await end(journal, "t1", first.dispatch, "failed")
    journal.heard([number])
    await journal.owed(1)

    assert not owes_anything(tmp_path / "journal.sqlite3")
    assert not owes_anything(tmp_path / "absent.sqlite3")


async def test_many_callers_share_commits_and_each_gets_its_own_answer(journal: TaskJournal):
    answers = await asyncio.gather(*(journal.accept([(f"t{n}", b"", float(n))]) for n in range(200)))

    assert all(answer.known is None for [answer] in answers)
    assert len({answer.dispatch for [answer] in answers}) == 200


async def test_a_failing_write_reaches_its_caller_and_the_thread_lives_on(journal: TaskJournal):
    def fail(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(JournalError, match="disk is full"):
        await journal._do(fail)

    [answer] = await journal.accept([("t1", b"", 1.0)])
    assert answer.known is None


async def test_old_ends_and_old_owed_events_are_pruned(journal: TaskJournal):
    [first] = await journal.accept([("old", b"", 1.0)])
    await end(journal, "old", first.dispatch, "succeeded")
    [second] = await journal.accept([("open", b"", 1.0)])
    await journal._do(lambda db: db.execute("UPDATE tasks SET ended_at = 1 WHERE ended_at IS NOT NULL"))
    await journal._do(lambda db: db.execute("UPDATE owed SET since = 1"))

    await journal.prune()

    assert await journal.owed(10) == []
    assert [task.dispatch for task in await journal.open_tasks()] == [second.dispatch]
    [again] = await journal.accept([("old", b"", 2.0)])
    assert again.known is None


async def test_a_damaged_file_is_named_in_the_error(tmp_path: Path):
    path = tmp_path / "journal.sqlite3"
    path.write_bytes(b"this is no database, and it is long enough to be read as one" * 100)

    with pytest.raises(JournalError, match=r"journal\.sqlite3"):
        TaskJournal(path)
