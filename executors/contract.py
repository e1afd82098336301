"""The contract between the daemon, the engine process and an executor.

An executor is one light module: a typed spec and a class with `load` and `run`. It computes and nothing else: it does
not touch Redis, does not upload, and never imports a heavy library at module level, because the daemon imports the
module to validate specs and to ask for the engine key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from executors.errors import Reason
from executors.task_spec import TaskSpec

JsonObject = dict[str, JsonValue]
"""A JSON object as it stands in `responses.json`."""

LogLevel = Literal["debug", "info", "warning", "error"]

SpecT = TypeVar("SpecT", bound=TaskSpec)


class Failure(BaseModel):
    """Why a task (or one merged child) failed, for people and for programs.

    Attributes:
        reason: one word of `executors.errors.Reason`.
        message: names the thing, the value and what was expected.
        hint: the next step; may be empty.
        retryable: whether the same task may succeed when it is tried again, here or elsewhere.
        log_tail: the last lines the engine printed, oldest first.
    """

    model_config = ConfigDict(frozen=True)

    reason: Reason
    message: str
    hint: str = ""
    retryable: bool = False
    log_tail: tuple[str, ...] = ()


class EnginePolicy(BaseModel):
    """What the operator allows; the daemon sends it to each engine process once, at its start.

    Attributes:
        allowed_roots: absolute folders from which a task may read models and data files.
        allow_remote_code: whether `trust_remote_code` in a spec is honoured.
        gpus: names (NVML UUIDs) of the GPUs that engines may use, in the order in which CUDA numbers them.
    """

    model_config = ConfigDict(frozen=True)

    allowed_roots: tuple[Path, ...] = ()
    allow_remote_code: bool = False
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineHost:
    """What the daemon knows of this host when it chooses an executor; nothing heavy has been imported for it.

    Attributes:
        gpus: GPUs that engines may use.
    """

    gpus: int = 0


class RunReport(Protocol):
    """How a running task talks to the daemon. Calls are cheap, thread-safe and never raise, but for the last."""

    def progress(
        self,
        done: float,
        total: float | None = None,
        *,
        unit: str = "items",
        message: str = "",
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Tell how far the task is; shown as TASK_PROGRESS and in the hash `task:<id>`."""
        ...

    def log(self, level: LogLevel, message: str) -> None:
        """Write one line to the task's log."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether the daemon has asked this task to stop."""
        ...

    def raise_if_cancelled(self) -> None:
        """Raise `TaskCancelledError` once the daemon has asked this task to stop; call it between steps."""
        ...


@dataclass(frozen=True)
class MergedChild(Generic[SpecT]):
    """A task that the orchestrator merged into this one (WIRE 3): same model, own data and system prompt."""

    task_id: str
    spec: SpecT
    out_dir: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class ExecutorTask(Generic[SpecT]):
    """Everything one run gets.

    Attributes:
        task_id: the task's id, already safe as a path component.
        spec: the validated spec.
        children: merged children whose specs are valid; their results go into `TaskOutput.children`.
        out_dir: absolute, existing folder of this task; big files go into it, `artifacts/` inside exists.
        policy: what the operator allows.
        report: progress, log, cancel.
        sent_spec: the spec as it was sent, before it was validated.
        inputs: where the files lie that `TaskSpec.inputs` asked for, by their names; each child has its own.
        why_this_executor: one sentence, where the kind of task has several executors; else empty.
    """

    task_id: str
    spec: SpecT
    children: tuple[MergedChild[SpecT], ...]
    out_dir: Path
    policy: EnginePolicy
    report: RunReport
    sent_spec: JsonObject = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    why_this_executor: str = ""


class Artifact(BaseModel):
    """A folder or file of the task's own folder that belongs to its result. The daemon archives and uploads it.

    Attributes:
        path: relative to `out_dir`, for example `final_model` or `checkpoints/final_model`.
        key: what its keys in the result begin with (WIRE 5.2). A folder `final_model` gives `final_model_path`,
            `final_model_archive_url` and so on; a file `jsonl_export` extends the object of that name in the result.
        kind: a folder becomes `<its name>.tar.gz` beside it; a file is uploaded as it is.
        archive_always: whether a folder is archived for results that stay on the worker's disk too (WIRE 5.1: LoRA).
    """

    model_config = ConfigDict(frozen=True)

    path: str
    key: str
    kind: Literal["folder", "file"] = "folder"
    archive_always: bool = False


class ChildOutput(BaseModel):
    """One merged child's own result, or why it has none. Exactly one of `result` and `failure` is set."""

    result: JsonObject | None = None
    failure: Failure | None = None
    artifacts: tuple[Artifact, ...] = ()


class TaskOutput(BaseModel):
    """What a run returns.

    Attributes:
        result: the keys of WIRE 5.2 for this type, without `task_id`, `timings` and `warnings`: the daemon adds these.
        children: child task id to its output.
        artifacts: what beside `result` has to reach the orchestrator.
        warnings: sentences for the person who sent the task.
    """

    result: JsonObject
    children: dict[str, ChildOutput] = Field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    warnings: list[str] = Field(default_factory=list)


class Executor(ABC, Generic[SpecT]):
    """One kind of task. An engine process makes one instance, loads it once and runs many tasks with it.

    They run one at a time, or, where `concurrent` is set, several at once, each in a thread of its own. The constructor
    takes no arguments and does nothing heavy.
    """

    spec_type: ClassVar[type[TaskSpec]]
    """The pydantic model of this kind's spec. The daemon validates with it before anything heavy loads."""

    exclusive: ClassVar[bool] = True
    """Whether its engine uses the accelerator or much memory, so that at most one such engine lives at a time."""

    concurrent: ClassVar[bool] = False
    """Whether `run` may be called for several tasks of one engine key at once, from different threads."""

    @classmethod
    def unsuitable(cls, spec: SpecT, host: EngineHost) -> str:
        """Say why this executor cannot, or should not, run this spec on this host; empty if it can.

        It is asked only where a kind of task has several executors (`executors.catalog`): the first that can is taken.
        The text completes the sentence "not <name>: …".
        """
        del spec, host
        return ""

    @classmethod
    def engine_key(cls, spec: SpecT) -> str:
        """Name what `load` would load for this spec.

        Tasks with equal keys share one warm engine; a different key gets a new process. The default suits executors
        that load nothing.
        """
        del spec
        return cls.__name__

    def load(self, task: ExecutorTask[SpecT]) -> None:
        """Load what `engine_key` names, before the first `run`.

        It runs once in an engine's life; where `concurrent` is set in a thread of its own, and again for the next
        task if it raised what is this task's alone (`BadSpecError`, `BadDataError`, a cancel).

        Raises:
            ExecutorError: with a text for the sender; the engine process then ends.
        """

    @abstractmethod
    def run(self, task: ExecutorTask[SpecT]) -> TaskOutput:
        """Run one task.

        Raises:
            ExecutorError: with a text for the sender; the engine stays warm.
        """
