"""What waits in a task's mailbox is read in order; an end comes last, and nobody waits for a closed one."""

from __future__ import annotations

import asyncio

import pytest

from executors.child_messages import Progress
from worker import task_mailbox
from worker.task_mailbox import ChannelEnd, TaskMailbox


def progress(done: float) -> Progress:
    return Progress(task_id="t1", done=done)


async def test_messages_come_in_order_and_the_end_after_them():
    mailbox = TaskMailbox()
    await mailbox.put(progress(1))
    mailbox.end(ChannelEnd(garbage="xyz"))
    mailbox.end(ChannelEnd())

    heard = [await mailbox.next(1) for _ in range(4)]

    assert heard == [progress(1), None, ChannelEnd(garbage="xyz"), ChannelEnd(garbage="xyz")]


async def test_the_end_also_comes_after_a_full_mailbox(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task_mailbox, "_UNREAD_MESSAGES", 1)
    mailbox = TaskMailbox()
    await mailbox.put(progress(1))
    mailbox.end(ChannelEnd())

    assert [await mailbox.next(1) for _ in range(2)] == [progress(1), ChannelEnd()]


async def test_a_reader_that_waits_is_woken_by_a_nudge_and_by_the_time():
    mailbox = TaskMailbox()
    waiting = asyncio.create_task(mailbox.next(60))
    await asyncio.sleep(0)
    mailbox.nudge()

    assert await waiting is None
    assert await mailbox.next(0) is None


async def test_a_full_mailbox_makes_its_writer_wait_until_it_is_read_or_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task_mailbox, "_UNREAD_MESSAGES", 1)
    mailbox = TaskMailbox()
    await mailbox.put(progress(1))
    writing = asyncio.create_task(mailbox.put(progress(2)))
    await asyncio.sleep(0)
    assert not writing.done()
    assert await mailbox.next(1) == progress(1)
    await writing

    writing = asyncio.create_task(mailbox.put(progress(3)))
    await asyncio.sleep(0)
    mailbox.close()
    await writing

    assert writing.done()
