"""The engine process: `python -m executors.child CHANNEL LIFELINE`, two descriptors.

Loads one executor, runs its tasks, says what happens.

The main thread computes; a reader thread takes orders, so that a cancel is heard while a task runs. Where the executor
is `concurrent`, each task has a thread of its own instead, and the main thread only starts them. When the daemon is
gone the order stream ends, and the process ends with everything in its process group.
"""

from __future__ import annotations

import faulthandler
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from executors.catalog import CatalogEntry, executor_class
from executors.child_messages import (
    LONGEST_MESSAGE,
    CancelTask,
    Loaded,
    LogLine,
    Progress,
    RunTask,
    StartEngine,
    TaskDone,
    TaskFailed,
    to_engine,
)
from executors.contract import EnginePolicy, Executor, ExecutorTask, LogLevel, MergedChild, TaskOutput
from executors.errors import BadDataError, ExecutorError, TaskCancelledError
from executors.failure_report import encodable, verdict_on
from executors.shared_load import SharedLoad


class Channel:
    """The socket to the daemon. Sending is thread-safe."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - processes that an executor starts must not hold it
        self._socket = socket.socket(fileno=descriptor)
        self._lock = threading.Lock()
        self.lines = self._socket.makefile("rb")

    def send(self, message: Loaded | Progress | LogLine | TaskDone | TaskFailed) -> None:
        """Send one message; blocks while the daemon is slow to read."""
        self.send_line(message.encode())

    def send_line(self, line: bytes) -> None:
        """Send one encoded message."""
        with self._lock:
            self._socket.sendall(line)


class Report:
    """A running task's `RunReport`."""

    def __init__(self, channel: Channel, task_id: str) -> None:
        self._channel = channel
        self._task_id = task_id
        self._cancel = threading.Event()

    def progress(
        self,
        done: float,
        total: float | None = None,
        *,
        unit: str = "items",
        message: str = "",
        metrics: dict[str, float] | None = None,
    ) -> None:
        """See `RunReport.progress`."""
        # Training reports a loss of NaN when it diverges; the channel is JSON, which has no such number.
        known = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        self._channel.send(
            Progress(
                task_id=self._task_id,
                done=done if math.isfinite(done) else 0.0,
                total=total if total is not None and math.isfinite(total) else None,
                unit=unit,
                message=encodable(message),
                metrics=known,
            )
        )

    def log(self, level: LogLevel, message: str) -> None:
        """See `RunReport.log`."""
        self._channel.send(LogLine(task_id=self._task_id, level=level, message=encodable(message)))

    @property
    def cancelled(self) -> bool:
        """See `RunReport.cancelled`."""
        return self._cancel.is_set()

    def raise_if_cancelled(self) -> None:
        """See `RunReport.raise_if_cancelled`."""
        if self.cancelled:
            raise TaskCancelledError("the task was asked to stop")

    def cancel(self) -> None:
        """Note the daemon's wish."""
        self._cancel.set()


class Engine:
    """One executor and its tasks."""

    def __init__(self, channel: Channel, executor: Executor[Any], policy: EnginePolicy) -> None:
        self._channel = channel
        self._executor = executor
        self._policy = policy
        self._load = SharedLoad(executor)
        self._reports: dict[str, Report] = {}

    def expect(self, order: RunTask) -> None:
        """From now on a cancel reaches this task."""
        self._reports[order.task_id] = Report(self._channel, order.task_id)

    def cancel(self, task_id: str) -> None:
        """Pass the daemon's wish on, if that task is here."""
        if (report := self._reports.get(task_id)) is not None:
            report.cancel()

    def run(self, order: RunTask) -> None:
        """Load if that has not happened yet, run, and answer exactly once."""
        answer = self._answer(order, self._reports[order.task_id])
        sys.stdout.flush()
        del self._reports[order.task_id]  # before the answer: after it the same id may come again
        self._channel.send_line(answer)

    def _answer(self, order: RunTask, report: Report) -> bytes:
        try:
            task = self._task(order, report)
            began = time.monotonic()
            if self._load.ensure(task):
                self._channel.send(Loaded(task_id=order.task_id, load_sec=time.monotonic() - began))
                report.raise_if_cancelled()
            began = time.monotonic()
            output = self._checked(self._executor.run(task))
            done = TaskDone(task_id=order.task_id, output=output, run_sec=time.monotonic() - began)
            return _fitting(done.encode())
        except Exception as error:  # noqa: BLE001 - whatever an executor raises is the task's failure, not the process's end
            foreseen = isinstance(error, ExecutorError)
            if not foreseen:
                traceback.print_exc()
            verdict = verdict_on(error)
            usable = verdict.engine_usable and self._load.hopeful
            return TaskFailed(
                task_id=order.task_id, failure=verdict.failure, foreseen=foreseen, engine_usable=usable
            ).encode()

    def _checked(self, output: object) -> TaskOutput:
        if not isinstance(output, TaskOutput):
            name = type(self._executor).__name__
            raise TypeError(f"{name}.run returned {type(output).__name__}, expected a TaskOutput")
        return output

    def _task(self, order: RunTask, report: Report) -> ExecutorTask[Any]:
        spec_type = self._executor.spec_type
        children = tuple(
            MergedChild(child.task_id, spec_type.model_validate(child.spec), child.out_dir, child.inputs)
            for child in order.children
        )
        return ExecutorTask(
            order.task_id,
            spec_type.model_validate(order.spec),
            children,
            order.out_dir,
            self._policy,
            report,
            order.spec,
            order.inputs,
            order.why_this_executor,
        )


def _fitting(line: bytes) -> bytes:
    """The line, if the daemon would read it."""
    if len(line) > LONGEST_MESSAGE:
        raise BadDataError(
            f"the result has {len(line)} bytes, at most {LONGEST_MESSAGE}: one task's result is one JSON file",
            hint="Give each task fewer or shorter items, or send the data in parts (shard).",
        )
    return line


def _end_group() -> None:
    """End this process and all that it started and that stayed in its group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _end_with_daemon(lifeline: int) -> None:
    """Fork a process that waits for the daemon's death and then ends the group.

    The reader thread sees that death too, but it cannot run while an extension module holds the interpreter. Call it
    before any thread exists.

    Args:
        lifeline: read end of a pipe whose other end only the daemon holds.
    """
    if os.fork() != 0:
        os.close(lifeline)
        return
    os.closerange(0, lifeline)
    os.closerange(lifeline + 1, 64)
    os.read(lifeline, 1)
    _end_group()


def _listen(channel: Channel, engine: Engine, todo: queue.SimpleQueue[RunTask | BaseException]) -> None:
    """Take orders until the daemon is gone."""
    try:
        for line in channel.lines:
            order = to_engine.validate_json(line)
            if isinstance(order, RunTask):
                engine.expect(order)
                todo.put(order)
            elif isinstance(order, CancelTask):
                engine.cancel(order.task_id)
    finally:
        _end_group()


def _run_beside(engine: Engine, order: RunTask, todo: queue.SimpleQueue[RunTask | BaseException]) -> None:
    """Run a task in a thread of its own."""
    try:
        engine.run(order)
    except BaseException as error:  # noqa: BLE001 - the main thread raises it, and the process ends with it
        todo.put(error)


def main() -> None:
    """Serve orders until the daemon closes the channel."""
    faulthandler.enable()
    _end_with_daemon(int(sys.argv[2]))
    channel = Channel(int(sys.argv[1]))
    start = to_engine.validate_json(channel.lines.readline())
    if not isinstance(start, StartEngine):
        raise SystemExit(f"first order is {start.type!r}, expected 'start'")
    executor = executor_class(CatalogEntry(kind="", target=start.executor))()
    engine = Engine(channel, executor, start.policy)
    todo: queue.SimpleQueue[RunTask | BaseException] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, engine, todo), name="orders", daemon=True).start()
    while True:
        order = todo.get()
        if isinstance(order, BaseException):
            raise order
        if executor.concurrent:
            name = f"task {order.task_id}"
            threading.Thread(target=_run_beside, args=(engine, order, todo), name=name, daemon=True).start()
        else:
            engine.run(order)


def _exit_of(error: BaseException) -> int:
    """The exit status that the interpreter would have given, with its text on stderr."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    traceback.print_exc()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 1


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:  # noqa: BLE001 - the process ends with it
        status = _exit_of(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the ordinary way waits for threads that an executor has left behind
