"""One executor that misbehaves in whatever way `spec.act` says, in a real engine process."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from executors.contract import Executor, ExecutorTask, JsonObject, TaskOutput
from executors.errors import BadDataError
from executors.task_spec import TaskSpec

LONG_SEC = 600
Act = Literal[
    "fine", "raise", "executor_error", "no_memory", "sys_exit", "os_exit", "kill", "segfault", "interrupt", "thread",
    "hang", "hang_gil", "obey", "quiet", "chatty", "flood", "garbage", "half_close", "close", "impostor",
    "grandchild", "grandchild_exit", "grandchild_hang",
    "stopped", "not_output", "not_json", "surrogate", "nan", "huge", "environment",
    "progress", "files", "sleep", "signal_handler", "long_line", "talking_thread", "stubborn",
]  # fmt: skip


class Section(TaskSpec):
    """A nested part, for wrong types."""

    rate: float = 0.5


class SubjectSpec(TaskSpec):
    """`act` chooses the misbehaviour."""

    act: Act
    seconds: float = 0.0
    count: int = 3
    section: Section = Section()


Task = ExecutorTask[SubjectSpec]


class Subject(Executor[SubjectSpec]):
    """See the module's text."""

    spec_type = SubjectSpec

    def run(self, task: Task) -> TaskOutput:
        task.report.progress(0, 1, message="inside")
        act: Callable[[Task], TaskOutput | None] = globals()[f"_{task.spec.act}"]
        return act(task) or TaskOutput(result={"ok": True, "act": task.spec.act, "pid": os.getpid()})


def _fine(task: Task) -> None:
    del task


def _raise(task: Task) -> None:
    raise ValueError(f"the subject {task.task_id} raises")


def _executor_error(task: Task) -> None:
    raise BadDataError(f"spec.data of {task.task_id} has no rows", hint="add some rows")


def _no_memory(task: Task) -> None:
    raise MemoryError(task.task_id)


def _sys_exit(task: Task) -> None:
    del task
    print("last words before the exit", flush=True)  # noqa: T201 - what an executor prints
    sys.exit(3)


def _os_exit(task: Task) -> None:
    del task
    os._exit(4)


def _kill(task: Task) -> None:
    del task
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault(task: Task) -> None:
    del task
    ctypes.string_at(0)


def _interrupt(task: Task) -> None:
    raise KeyboardInterrupt(task.task_id)


def _thread(task: Task) -> None:
    """Leave a thread behind that raises after the end and one that never ends."""
    del task
    threading.Thread(target=time.sleep, args=(LONG_SEC,)).start()


def _talking_thread(task: Task) -> None:
    """Leave a thread behind that goes on logging, a megabyte a line, and counts its lines in a file."""

    def talk() -> None:
        for number in range(1, 201):
            task.report.log("debug", "x" * 2**20)
            (task.out_dir.parent / "said").write_text(str(number))

    threading.Thread(target=talk, daemon=True).start()


def _stubborn(task: Task) -> None:
    """Have no ear for SIGTERM, also after the end."""
    del task
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _hang(task: Task) -> None:
    del task
    while True:
        time.sleep(LONG_SEC)


def _hang_gil(task: Task) -> None:
    """Hold the interpreter: no other thread of this process runs."""
    del task
    ctypes.PyDLL(None).sleep(LONG_SEC)


def _signal_handler(task: Task) -> None:
    """Ignore every polite request."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _hang(task)


def _obey(task: Task) -> None:
    while True:
        task.report.raise_if_cancelled()
        time.sleep(0.01)


def _quiet(task: Task) -> None:
    time.sleep(task.spec.seconds)


_sleep = _quiet


def _chatty(task: Task) -> None:
    """Live on by printing, without progress."""
    end = time.monotonic() + task.spec.seconds
    while time.monotonic() < end:
        print("still here", flush=True)  # noqa: T201 - what an executor prints
        time.sleep(0.05)


def _flood(task: Task) -> None:
    """Print megabytes from Python, from C and from another process, at once with progress."""
    line = "flood " * 20
    shell = f"i=0; while [ $i -lt 20000 ]; do echo {line}; i=$((i+1)); done"
    with subprocess.Popen(["/bin/sh", "-c", shell]):
        libc = ctypes.CDLL(None)
        for number in range(20_000):
            print(line, number)  # noqa: T201 - what an executor prints
            libc.dprintf(1, b"%s from C\n", line.encode())
            if number % 1000 == 0:
                task.report.progress(number, 20_000)
                task.report.log("info", f"line {number}")
    print("the last line of the flood", flush=True)  # noqa: T201 - what an executor prints


def _long_line(task: Task) -> None:
    """Print megabytes without any newline, and bytes that are no UTF-8."""
    del task
    os.write(2, b"\xff\xfe" * 8 * 1024**2)


def _channel() -> int:
    return int(sys.argv[1])


def _garbage(task: Task) -> None:
    os.write(_channel(), b"this is no message\n")
    _hang(task)


def _impostor(task: Task) -> None:
    """Speak in the name of another task, with fields that nobody knows."""
    os.write(_channel(), b'{"type":"progress","task_id":"another","done":1,"owner":"me"}\n')
    os.write(_channel(), b'{"type":"done","task_id":"another","output":{"result":{"ok":false}},"run_sec":0}\n')
    time.sleep(task.spec.seconds)


def _half_close(task: Task) -> None:
    with socket.socket(fileno=os.dup(_channel())) as channel:
        channel.shutdown(socket.SHUT_WR)
    _hang(task)


def _close(task: Task) -> None:
    del task
    os.close(_channel())


def _grandchild(task: Task) -> None:
    """Leave a process in a session of its own, which the process group does not hold."""
    left = subprocess.Popen(["/bin/sleep", str(LONG_SEC)], start_new_session=True)
    (task.out_dir / "artifacts" / "grandchild").write_text(str(left.pid))


def _grandchild_exit(task: Task) -> None:
    _grandchild(task)
    os._exit(5)


def _grandchild_hang(task: Task) -> None:
    _grandchild(task)
    _hang(task)


def _stopped(task: Task) -> None:
    del task
    os.kill(os.getpid(), signal.SIGSTOP)


def _not_output(task: Task) -> TaskOutput:
    return {"ok": True, "act": task.spec.act}  # type: ignore[return-value]  # that is the point


def _not_json(task: Task) -> TaskOutput:
    return TaskOutput(result={"ok": True, "value": task})  # type: ignore[dict-item]  # that is the point


def _surrogate(task: Task) -> TaskOutput:
    return TaskOutput(result={"ok": True, "act": task.spec.act, "value": "half a pair: \ud83d"})


def _nan(task: Task) -> TaskOutput:
    task.report.progress(1, float("nan"), metrics={"loss": float("nan"), "rate": float("inf")})
    return TaskOutput(result={"ok": True, "nan": float("nan"), "list": [float("inf"), 1.5]})


def _huge(task: Task) -> TaskOutput:
    del task
    return TaskOutput(result={"ok": True, "value": "x" * 5 * 1024**2})


def _environment(task: Task) -> TaskOutput:
    del task
    for name, value in os.environ.items():
        print(f"{name}={value}")  # noqa: T201 - what an executor prints
    return TaskOutput(result={"ok": True, "environment": dict(os.environ)})


def _progress(task: Task) -> TaskOutput:
    for number in range(1, task.spec.count + 1):
        task.report.progress(number, task.spec.count, unit="steps", message=f"step {number}", metrics={"loss": 0.5})
        time.sleep(task.spec.seconds)
    task.report.log("warning", "the loss is high")
    return TaskOutput(result={"ok": True}, warnings=["one warning"])


def _files(task: Task) -> TaskOutput:
    (task.out_dir / "artifacts" / "note.txt").write_text("a note")
    (task.out_dir / "summary.csv").write_text("a,b\n1,2\n")
    cwd: JsonObject = {"ok": True, "cwd": str(Path.cwd())}
    return TaskOutput(result=cwd)
