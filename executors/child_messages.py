"""What daemon and engine process say to each other: one JSON object a line over an inherited socket.

| to the engine | meaning |
|---|---|
| StartEngine | once, first: which executor, what is allowed |
| RunTask | run this; load first if nothing is loaded yet |
| CancelTask | stop that one if it runs |
| (end of stream) | end at once, with everything you started |

| from the engine | meaning |
|---|---|
| Loaded | the load is over; the run begins |
| Progress, LogLine | while loading or running |
| TaskDone, TaskFailed | exactly one for each RunTask |
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from executors.contract import EnginePolicy, Failure, JsonObject, LogLevel, TaskOutput

LONGEST_MESSAGE: Final = 256 * 1024**2
"""Bytes of one line from an engine; a longer result does not belong into a JSON file."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    def encode(self) -> bytes:
        """One line of UTF-8 JSON with its newline; numbers that JSON does not know become null."""
        return self.model_dump_json().encode() + b"\n"


class StartEngine(_Message):
    """The first line: `executor` is a "module:Class" string, so a failing import happens in the engine."""

    type: Literal["start"] = "start"
    executor: str
    policy: EnginePolicy


class ChildTask(_Message):
    """One merged child whose spec is valid."""

    task_id: str
    spec: JsonObject
    out_dir: Path
    inputs: dict[str, Path] = Field(default_factory=dict)


class RunTask(_Message):
    """Run one task."""

    type: Literal["run"] = "run"
    task_id: str
    spec: JsonObject
    out_dir: Path
    children: tuple[ChildTask, ...] = ()
    inputs: dict[str, Path] = Field(default_factory=dict)
    why_this_executor: str = ""


class CancelTask(_Message):
    """Ask the running task to stop; it answers with TaskDone or TaskFailed as usual."""

    type: Literal["cancel"] = "cancel"
    task_id: str


class Loaded(_Message):
    """The executor's `load`, or the wait for another task's, took `load_sec` seconds."""

    type: Literal["loaded"] = "loaded"
    task_id: str
    load_sec: float


class Progress(_Message):
    """See `RunReport.progress`."""

    type: Literal["progress"] = "progress"
    task_id: str
    done: float
    total: float | None = None
    unit: str = "items"
    message: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)


class LogLine(_Message):
    """See `RunReport.log`."""

    type: Literal["log"] = "log"
    task_id: str
    level: LogLevel
    message: str


class TaskDone(_Message):
    """The run returned; `run_sec` seconds without the load."""

    type: Literal["done"] = "done"
    task_id: str
    output: TaskOutput
    run_sec: float


class TaskFailed(_Message):
    """The load or the run raised.

    Attributes:
        failure: what to tell the sender.
        foreseen: whether the executor raised it on purpose, so that the text says all and the log adds nothing.
        engine_usable: false when the process should not be trusted with another task.
    """

    type: Literal["failed"] = "failed"
    task_id: str
    failure: Failure
    foreseen: bool = False
    engine_usable: bool


ToEngine = Annotated[StartEngine | RunTask | CancelTask, Field(discriminator="type")]
FromEngine = Annotated[Loaded | Progress | LogLine | TaskDone | TaskFailed, Field(discriminator="type")]

to_engine: TypeAdapter[StartEngine | RunTask | CancelTask] = TypeAdapter(ToEngine)
from_engine: TypeAdapter[Loaded | Progress | LogLine | TaskDone | TaskFailed] = TypeAdapter(FromEngine)
