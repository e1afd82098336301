"""One load for several tasks: whose its failure is, and who may leave it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from recording_report import RecordingReport
from waiting_until import wait_until

from executors.contract import EnginePolicy, Executor, ExecutorTask, TaskOutput
from executors.errors import BadDataError, BadSpecError, ExecutorError, ModelLoadError, TaskCancelledError
from executors.shared_load import SharedLoad
from executors.task_spec import TaskSpec

Task = ExecutorTask[TaskSpec]


class Loading(Executor[TaskSpec]):
    """Waits for `go` at each load, then does what `ends` says for the task."""

    spec_type = TaskSpec
    concurrent: ClassVar[bool] = True

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.ends: dict[str, Callable[[Task], None]] = {}
        self.loads: list[str] = []

    def load(self, task: Task) -> None:
        self.loads.append(task.task_id)
        self.go.acquire()
        self.ends.get(task.task_id, lambda _: None)(task)

    def run(self, task: Task) -> TaskOutput:
        raise NotImplementedError(task.task_id)


class OneByOne(Loading):
    concurrent = False


@dataclass
class Waiting:
    """A task in its thread."""

    load: SharedLoad
    name: str
    report: RecordingReport = field(default_factory=RecordingReport)
    ended: BaseException | bool | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.report in self.load.reports(), f"{self.name} waits")

    def _run(self) -> None:
        try:
            self.ended = self.load.ensure(task_of(self.name, self.report))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.ended = error

    def end(self) -> BaseException | bool | None:
        self.thread.join(10)
        return self.ended


def task_of(name: str, report: RecordingReport) -> Task:
    return ExecutorTask(name, TaskSpec.model_validate({"taskType": "x"}), (), Path("unused"), EnginePolicy(), report)


def raising(error: BaseException) -> Callable[[Task], None]:
    def end(task: Task) -> None:
        del task
        raise error

    return end


@pytest.fixture
def executor() -> Loading:
    return Loading()


def first_and_second(executor: Loading) -> tuple[SharedLoad, Waiting, Waiting]:
    load = SharedLoad(executor)
    first = Waiting(load, "first")
    wait_until(lambda: executor.loads == ["first"], "the first one loads")
    return load, first, Waiting(load, "second")


@pytest.mark.parametrize("error", [BadSpecError("x"), BadDataError("x")])
def test_a_fault_of_one_task_is_its_own_and_the_next_one_loads(executor: Loading, error: ExecutorError):
    load, first, second = first_and_second(executor)
    executor.ends["first"] = raising(error)
    executor.go.release()
    assert first.end() is error
    assert load.hopeful
    executor.go.release()
    assert second.end() is True
    assert executor.loads == ["first", "second"]
    assert load.ensure(task_of("late", RecordingReport())) is False


@pytest.mark.parametrize("error", [ModelLoadError("x"), MemoryError(), ValueError("x"), SystemExit(3)])
def test_what_is_wrong_with_the_model_or_unforeseen_is_for_all(executor: Loading, error: BaseException):
    load, first, second = first_and_second(executor)
    executor.ends["first"] = raising(error)
    executor.go.release()
    assert [first.end(), second.end()] == [error, error]
    assert not load.hopeful
    assert executor.loads == ["first"]


def test_a_fault_of_the_only_task_leaves_nothing_to_hope_for_until_another_comes(executor: Loading):
    load = SharedLoad(executor)
    error = BadSpecError("x")
    executor.ends["first"] = raising(error)
    executor.go.release()
    with pytest.raises(BadSpecError):
        load.ensure(task_of("first", RecordingReport()))
    assert not load.hopeful
    executor.go.release()
    assert load.ensure(task_of("second", RecordingReport())) is True


@pytest.mark.parametrize("fault", [False, True])
def test_who_loads_may_leave_while_another_waits(executor: Loading, fault: bool):  # noqa: FBT001 - a test's parameter
    _, first, second = first_and_second(executor)
    if fault:
        executor.ends["first"] = raising(BadSpecError("x"))
    first.report.cancel()
    assert isinstance(first.end(), TaskCancelledError)
    executor.go.release(2)
    assert second.end() is True
    assert executor.loads == (["first", "second"] if fault else ["first"])


def test_the_load_is_cancelled_only_when_all_that_wait_are_and_the_last_one_sees_it_end(executor: Loading):
    seen: list[bool] = []
    executor.ends["first"] = lambda task: (seen.append(task.report.cancelled), task.report.raise_if_cancelled())[0]
    load, first, second = first_and_second(executor)
    first.report.cancel()
    assert isinstance(first.end(), TaskCancelledError)
    second.report.cancel()
    assert second.ended is None
    executor.go.release()
    assert isinstance(second.end(), TaskCancelledError)
    assert (seen, executor.loads) == ([True], ["first"])
    assert not load.hopeful


def test_news_of_the_load_is_for_all_that_wait_but_a_log_line_for_one(executor: Loading):
    def tell(task: Task) -> None:
        assert not task.report.cancelled
        task.report.raise_if_cancelled()
        task.report.progress(1, 2, message="loading")
        task.report.log("info", "half")

    executor.ends["first"] = tell
    _, first, second = first_and_second(executor)
    executor.go.release()
    assert (first.end(), second.end()) == (True, True)
    assert first.report.told == second.report.told == [(1, 2)]
    assert first.report.logged + second.report.logged == ["info: half"]


def test_where_tasks_run_one_by_one_the_load_is_in_the_task_s_own_thread():
    executor = OneByOne()
    load = SharedLoad(executor)
    threads: list[threading.Thread] = []
    executor.ends["first"] = lambda _: threads.append(threading.current_thread())
    executor.go.release()
    assert load.ensure(task_of("first", RecordingReport())) is True
    assert threads == [threading.current_thread()]
