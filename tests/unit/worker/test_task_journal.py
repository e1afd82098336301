"""The journal: what was accepted is known after a crash, and committed before anybody is told."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from pathlib import Path

import pytest

from worker.journal_tables import Arrival, OwedEvent, State, StoredDelivery
from worker.task_journal import JournalError, TaskJournal, owes_anything


@pytest.fixture
async def journal(tmp_path: Path):
    journal = TaskJournal(tmp_path / "journal.sqlite3")
    yield journal
    await journal.close()


async def end(journal: TaskJournal, task_id: str, dispatch: str, state: State) -> int:
    [number] = await journal.end([(OwedEvent(-1, task_id, dispatch, b"event"), state)], [])
    return number


async def test_an_accepted_task_is_on_disk_when_accept_returns(tmp_path: Path, journal: TaskJournal):
    [answer] = await journal.accept([Arrival("t1", b"{}", 1.0)])

    assert answer.known is None
    with sqlite3.connect(tmp_path / "journal.sqlite3") as other:
        rows = other.execute("SELECT task_id, state, dispatch FROM tasks").fetchall()
    other.close()
    assert rows == [("t1", "accepted", answer.dispatch)]


async def test_a_second_dispatch_of_an_open_task_is_a_duplicate(journal: TaskJournal):
    [first, second] = await journal.accept([Arrival("t1", b"a", 1.0), Arrival("t1", b"b", 2.0)])

    assert second.known == "accepted"
    assert second.dispatch == first.dispatch
    assert await journal.envelope("t1") == b"a"


async def test_a_succeeded_task_is_answered_with_its_event(journal: TaskJournal):
    [first] = await journal.accept([Arrival("t1", b"a", 1.0)])
    await end(journal, "t1", first.dispatch, "succeeded")

    [again] = await journal.accept([Arrival("t1", b"a", 2.0)])

    assert (again.known, again.final_event) == ("succeeded", b"event")


async def test_a_failed_task_is_accepted_anew_under_another_token(journal: TaskJournal):
    [first] = await journal.accept([Arrival("t1", b"a", 1.0)])
    journal.note_start("t1")
    await end(journal, "t1", first.dispatch, "failed")

    [again] = await journal.accept([Arrival("t1", b"b", 2.0)])

    assert again.known is None
    assert again.dispatch != first.dispatch
    [task] = await journal.open_tasks()
    assert (task.envelope, task.starts) == (b"b", 0)


async def test_an_end_and_the_event_it_owes_are_one_step(journal: TaskJournal):
    [first] = await journal.accept([Arrival("t1", b"a", 1.0)])

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
    await first.accept([Arrival("t1", b"a", 1.0), Arrival("t2", b"b", 2.0)])
    first.note_start("t1")
    await first.close()

    assert owes_anything(path)
    second = TaskJournal(path)
    tasks = await second.open_tasks()
    await second.close()

    assert [(task.task_id, task.envelope, task.starts) for task in tasks] == [("t1", b"a", 1), ("t2", b"b", 0)]


async def test_a_start_that_was_taken_back_does_not_count(journal: TaskJournal):
    await journal.accept([Arrival("t1", b"a", 1.0)])
    for _ in range(2):
        journal.note_start("t1")
        journal.take_back_start("t1")
    journal.note_start("t1")

    [task] = await journal.open_tasks()

    assert task.starts == 1


async def test_a_journal_owes_nothing_once_all_is_heard(tmp_path: Path, journal: TaskJournal):
    [first] = await journal.accept([Arrival("t1", b"a", 1.0)])
    number = await end(journal, "t1", first.dispatch, "failed")
    journal.heard([number])
    await journal.owed(1)

    assert not owes_anything(tmp_path / "journal.sqlite3")
    assert not owes_anything(tmp_path / "absent.sqlite3")


async def test_many_callers_share_commits_and_each_gets_its_own_answer(journal: TaskJournal):
    answers = await asyncio.gather(*(journal.accept([Arrival(f"t{n}", b"", float(n))]) for n in range(200)))

    assert all(answer.known is None for [answer] in answers)
    assert len({answer.dispatch for [answer] in answers}) == 200


async def test_a_failing_write_reaches_its_caller_and_the_thread_lives_on(journal: TaskJournal):
    def fail(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(JournalError, match="disk is full"):
        await journal._do(fail)

    [answer] = await journal.accept([Arrival("t1", b"", 1.0)])
    assert answer.known is None


async def test_old_ends_and_old_owed_events_are_pruned(journal: TaskJournal):
    [first] = await journal.accept([Arrival("old", b"", 1.0)])
    await end(journal, "old", first.dispatch, "succeeded")
    [second] = await journal.accept([Arrival("open", b"", 1.0)])
    await journal._do(lambda db: db.execute("UPDATE tasks SET ended_at = 1 WHERE ended_at IS NOT NULL"))
    await journal._do(lambda db: db.execute("UPDATE owed SET since = 1"))

    await journal.prune()

    assert await journal.owed(10) == []
    assert [task.dispatch for task in await journal.open_tasks()] == [second.dispatch]
    [again] = await journal.accept([Arrival("old", b"", 2.0)])
    assert again.known is None


async def test_a_damaged_file_is_named_in_the_error(tmp_path: Path):
    path = tmp_path / "journal.sqlite3"
    path.write_bytes(b"this is no database, and it is long enough to be read as one" * 100)

    with pytest.raises(JournalError, match=r"journal\.sqlite3"):
        TaskJournal(path)


async def deliver(journal: TaskJournal, task_id: str, work: str = "w") -> StoredDelivery:
    """Accept a task and record that its result is to be delivered."""
    [answer] = await journal.accept([Arrival(task_id, b"a", 1.0, work)])
    delivery = StoredDelivery(task_id, answer.dispatch, work, b"plan", b"nothing yet", 5.0)
    assert await journal.end([], [delivery]) == []
    return delivery


async def test_a_result_on_its_way_survives_a_restart_with_its_progress(tmp_path: Path):
    path = tmp_path / "journal.sqlite3"
    first = TaskJournal(path)
    delivery = await deliver(first, "t1")
    moved = dataclasses.replace(delivery, plan=b"new plan", progress=b"uploaded")
    await first.note_delivery(moved)
    await first.close()

    assert owes_anything(path)
    second = TaskJournal(path)
    found, open_tasks = await second.open_deliveries(), await second.open_tasks()
    await second.close()

    assert found == [moved]
    assert open_tasks == []


async def test_a_task_that_is_being_delivered_is_not_run_again(journal: TaskJournal):
    delivery = await deliver(journal, "t1")

    [again] = await journal.accept([Arrival("t1", b"a", 2.0, "w")])

    assert (again.known, again.dispatch, again.undelivered) == ("delivering", delivery.dispatch, None)


async def test_a_delivered_task_owes_its_event_and_nothing_else(tmp_path: Path, journal: TaskJournal):
    delivery = await deliver(journal, "t1")

    number = await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"event"), "succeeded", keep=False)

    [owed] = await journal.owed(10)
    assert (owed.seq, owed.token) == (number, delivery.dispatch)
    assert await journal.open_deliveries() == []
    assert await journal.reopen("t1") is None
    journal.heard([number])
    await journal.owed(1)
    assert not owes_anything(tmp_path / "journal.sqlite3")


async def test_a_refused_delivery_can_be_begun_again_as_a_dispatch_of_its_own(journal: TaskJournal):
    delivery = await deliver(journal, "t1")
    assert await journal.reopen("t1") is None  # still under way
    await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"failed"), "failed", keep=True)
    assert await journal.open_deliveries() == []

    again = await journal.reopen("t1")

    assert again is not None
    assert again.dispatch != delivery.dispatch
    assert (again.plan, again.progress, again.work) == (b"plan", b"nothing yet", "w")
    assert await journal.open_deliveries() == [again]
    assert await journal.reopen("t1") is None


async def test_equal_work_that_comes_again_is_delivered_and_not_run(journal: TaskJournal):
    delivery = await deliver(journal, "t1")
    await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"failed"), "failed", keep=True)

    [again] = await journal.accept([Arrival("t1", b"b", 2.0, "w")])

    assert again.known is None
    assert again.undelivered is not None
    assert again.undelivered.dispatch == again.dispatch != delivery.dispatch
    assert await journal.open_tasks() == []


@pytest.mark.parametrize("work", ["other", ""])
async def test_other_work_under_the_same_id_is_run_and_the_old_result_is_dropped(journal: TaskJournal, work: str):
    delivery = await deliver(journal, "t1")
    await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"failed"), "failed", keep=True)

    [again] = await journal.accept([Arrival("t1", b"b", 2.0, work)])

    assert (again.known, again.undelivered) == (None, None)
    assert [task.task_id for task in await journal.open_tasks()] == ["t1"]
    assert await journal.reopen("t1") is None


async def test_pruning_spares_what_is_still_being_delivered(journal: TaskJournal):
    delivery = await deliver(journal, "open")
    refused = await deliver(journal, "refused")
    await journal.end_delivery(OwedEvent(-1, "refused", refused.dispatch, b"failed"), "failed", keep=True)
    await journal._do(lambda db: db.execute("UPDATE tasks SET ended_at = 1"))

    await journal.prune()

    assert await journal.open_deliveries() == [delivery]
    assert await journal.reopen("refused") is None


async def test_a_refused_dispatch_leaves_a_kept_result_where_it_is(journal: TaskJournal):
    delivery = await deliver(journal, "t1")
    await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"failed"), "failed", keep=True)

    [refused] = await journal.accept([Arrival("t1", b"b", 2.0, refused=True)])
    await end(journal, "t1", refused.dispatch, "failed")

    assert (refused.known, refused.keeps_result) == (None, True)
    again = await journal.reopen("t1")
    assert again is not None
    assert again.plan == b"plan"


async def test_a_delivery_that_nobody_can_carry_out_can_be_dropped(journal: TaskJournal):
    await deliver(journal, "t1")

    await journal.drop_delivery("t1")

    assert await journal.open_deliveries() == []
    [again] = await journal.accept([Arrival("t1", b"b", 2.0, "w")])
    assert (again.known, again.undelivered) == (None, None)


async def test_a_later_end_takes_the_place_of_one_that_nobody_heard(journal: TaskJournal):
    [first] = await journal.accept([Arrival("t1", b"a", 1.0)])
    await end(journal, "t1", first.dispatch, "failed")
    [second] = await journal.accept([Arrival("t1", b"a", 2.0)])

    number = await end(journal, "t1", second.dispatch, "succeeded")

    assert [owed.seq for owed in await journal.owed(10)] == [number]


async def test_a_delivery_begun_again_silences_the_failure_that_nobody_heard(journal: TaskJournal):
    delivery = await deliver(journal, "t1")
    await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"failed"), "failed", keep=True)

    assert await journal.reopen("t1") is not None

    assert await journal.owed(10) == []


async def test_a_new_dispatch_silences_the_failure_that_nobody_heard(journal: TaskJournal):
    [first] = await journal.accept([Arrival("t1", b"a", 1.0)])
    await end(journal, "t1", first.dispatch, "failed")

    await journal.accept([Arrival("t1", b"a", 2.0)])

    assert await journal.owed(10) == []


async def test_a_refused_dispatch_is_known_as_such_after_a_restart(journal: TaskJournal):
    delivery = await deliver(journal, "t1")
    await journal.end_delivery(OwedEvent(-1, "t1", delivery.dispatch, b"failed"), "failed", keep=True)
    await journal.accept([Arrival("t1", b"b", 2.0, refused=True), Arrival("t2", b"c", 3.0)])

    assert [(task.task_id, task.keeps_result) for task in await journal.open_tasks()] == [("t1", 1), ("t2", 0)]
