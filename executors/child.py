"""The engine process: `python -m executors.child CHANNEL LIFELINE`, two descriptors.

Loads one executor, runs its tasks, says what happens.

Two threads: the main thread computes; a reader thread takes orders, so that a cancel is heard while a task runs. When
the daemon is gone the order stream ends, and the process ends with everything in its process group.
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
from executors.errors import ExecutorError, TaskCancelledError
from executors.failure_report import encodable, verdict_on


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
    """The running task's `RunReport`."""

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

    def cancel(self, task_id: str) -> None:
        """Note the daemon's wish, if it is about this task."""
        if task_id == self._task_id:
            self._cancel.set()


class Engine:
    """One executor and its current task."""

    def __init__(self, channel: Channel, executor: Executor[Any], policy: EnginePolicy) -> None:
        self._channel = channel
        self._executor = executor
        self._policy = policy
        self._loaded = False

    def run(self, order: RunTask, report: Report) -> None:
        """Load if that has not happened yet, run, and answer exactly once."""
        try:
            task = self._task(order, report)
            if not self._loaded:
                began = time.monotonic()
                self._executor.load(task)
                self._loaded = True
                self._channel.send(Loaded(task_id=order.task_id, load_sec=time.monotonic() - began))
                report.raise_if_cancelled()
            began = time.monotonic()
            output = self._checked(self._executor.run(task))
            answer = TaskDone(task_id=order.task_id, output=output, run_sec=time.monotonic() - began).encode()
        except Exception as error:  # noqa: BLE001 - whatever an executor raises is the task's failure, not the process's end
            foreseen = isinstance(error, ExecutorError)
            if not foreseen:
                traceback.print_exc()
            verdict = verdict_on(error)
            usable = verdict.engine_usable and self._loaded
            answer = TaskFailed(
                task_id=order.task_id, failure=verdict.failure, foreseen=foreseen, engine_usable=usable
            ).encode()
        sys.stdout.flush()
        self._channel.send_line(answer)

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


def main() -> None:
    """Serve orders until the daemon closes the channel."""
    faulthandler.enable()
    _end_with_daemon(int(sys.argv[2]))
    channel = Channel(int(sys.argv[1]))
    start = to_engine.validate_json(channel.lines.readline())
    if not isinstance(start, StartEngine):
        raise SystemExit(f"first order is {start.type!r}, expected 'start'")
    orders: queue.SimpleQueue[RunTask] = queue.SimpleQueue()
    current: list[Report] = []

    def listen() -> None:
        try:
            for line in channel.lines:
                order = to_engine.validate_json(line)
                if isinstance(order, RunTask):
                    current[:] = [Report(channel, order.task_id)]
                    orders.put(order)
                elif isinstance(order, CancelTask) and current:
                    current[0].cancel(order.task_id)
        finally:
            _end_group()

    executor = executor_class(CatalogEntry(kind="", target=start.executor))()
    engine = Engine(channel, executor, start.policy)
    threading.Thread(target=listen, name="orders", daemon=True).start()
    while True:
        order = orders.get()
        engine.run(order, current[0])


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
