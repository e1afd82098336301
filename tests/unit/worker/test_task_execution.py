"""A task that waits for an engine can be stopped. The pool is a stand-in; tests/with_daemon has the real one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from executors.catalog import CatalogEntry
from executors.child_messages import RunTask
from executors.contract import Failure
from worker.engine_pool import EnginePool
from worker.engine_process import EngineProcess
from worker.task_execution import StopCause, TaskExecution
from worker.task_preparation import Folder, PreparedTask

Acquiring = asyncio.Task[tuple[EngineProcess, bool]]


class SlowPool:
    """Never has an engine."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.given_back: list[Acquiring] = []

    async def acquire(self, key: str, target: str, *, exclusive: bool, concurrent: bool) -> tuple[EngineProcess, bool]:
        del key, target, exclusive, concurrent
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets was set")

    def give_back_later(self, acquiring: Acquiring) -> None:
        self.given_back.append(acquiring)


def execution(pool: SlowPool, tmp_path: Path, *, timeout_sec: float = 0.0) -> TaskExecution:
    order = RunTask(task_id="t1", spec={"taskType": "echo"}, out_dir=tmp_path)
    entry = CatalogEntry("echo", "executors.echo_task:EchoTask")
    prepared = PreparedTask(
        order=order,
        entry=entry,
        engine_key="k",
        exclusive=True,
        concurrent=True,
        folder=Folder(tmp_path, ()),
        child_folders={},
        failed_children={},
        warnings=[],
        timeout_sec=timeout_sec,
        no_progress_sec=0.0,
    )

    async def fetch() -> RunTask:
        return order

    return TaskExecution(prepared, cast("EnginePool", pool), 60.0, lambda _: None, fetch)


@pytest.mark.parametrize("cause", ["cancelled", "worker_shutdown"])
async def test_who_waits_for_an_engine_is_stopped_at_once(tmp_path: Path, cause: StopCause):
    pool = SlowPool()
    task = execution(pool, tmp_path)
    running = asyncio.create_task(task.run())
    await pool.asked.wait()

    task.stop(cause)
    outcome = await running

    assert isinstance(outcome, Failure)
    assert outcome.reason == cause
    (acquiring,) = pool.given_back
    assert not acquiring.done()
    acquiring.cancel()


async def test_the_wall_clock_limit_counts_while_an_engine_is_waited_for(tmp_path: Path):
    pool = SlowPool()

    outcome = await execution(pool, tmp_path, timeout_sec=0.01).run()

    assert isinstance(outcome, Failure)
    assert outcome.reason == "timeout"
    (acquiring,) = pool.given_back
    acquiring.cancel()
