"""What travels: task envelopes and control messages in, events out (WIRE 2 and 3). Decoded once, here."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from orchestrator_client.errors import EnvelopeError
from orchestrator_client.validation_text import validation_text

JsonObject = dict[str, JsonValue]

TASK_ID_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._@=+-]{0,199}$"
"""A task id becomes a folder name and part of Redis keys, so it may hold no slash, no colon, and not start with
a dot."""

TaskId = Annotated[str, StringConstraints(pattern=TASK_ID_PATTERN)]


def safe_task_id(task_id: str) -> bool:
    """Whether an id may become a folder name and part of a key."""
    return re.fullmatch(TASK_ID_PATTERN, task_id) is not None


def now_iso() -> str:
    """The present as ISO-8601 in UTC, with offset and microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class _In(BaseModel):
    """Something we receive: extra keys are tolerated everywhere."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class EnvelopeHead(_In):
    """The two fields that tell whether a message concerns us; parsed first, so that others' messages cost little."""

    task_id: JsonValue = None
    assigned_worker: JsonValue = None


class TaskBody(_In):
    """`task`: the user's file as JSON. Only the spec matters (WIRE 3)."""

    spec: JsonObject
    metadata: JsonValue = None
    merge_children: JsonValue = None


class ChildEnvelope(_In):
    """One task that the orchestrator merged into another (WIRE 3)."""

    task_id: TaskId
    spec: JsonObject | None = None


class TaskEnvelope(_In):
    """A dispatched task (WIRE 3)."""

    task_id: TaskId
    task: TaskBody
    task_type: str | None = None
    assigned_worker: str | None = None
    dispatched_at: str | None = None
    merged_children: tuple[ChildEnvelope, ...] = Field(
        default=(), validation_alias=AliasChoices("merged_children", "merge_children")
    )

    @property
    def kind(self) -> str:
        """The task type, lower-cased: from the spec, else from the envelope's copy."""
        in_spec = self.task.spec.get("taskType")
        return str(in_spec if in_spec is not None else self.task_type or "").strip().lower()

    @property
    def experiment_id(self) -> int | str | None:
        """The experiment of a tuning manager's task, as it stands in the task's metadata (WIRE 2.5)."""
        found = self.task.metadata.get("experiment_id") if isinstance(self.task.metadata, dict) else None
        return found if isinstance(found, int | str) else None


def decode_head(raw: bytes) -> EnvelopeHead:
    """Read who a message is for.

    Raises:
        EnvelopeError: the bytes are no JSON object.
    """
    try:
        return EnvelopeHead.model_validate_json(raw)
    except ValidationError as error:
        kind = error.errors(include_url=False)[0]
        if kind["type"] == "json_invalid":
            raise EnvelopeError(f"message is not JSON: {kind['msg']}; it starts with {raw[:60]!r}") from error
        raise EnvelopeError(f"message is JSON but no object; it starts with {raw[:60]!r}") from error


def decode_envelope(raw: bytes, head: EnvelopeHead) -> TaskEnvelope:
    """Read a whole task.

    Raises:
        EnvelopeError: a field is missing, has the wrong type, or a number is NaN or infinite; carries the readable id.
    """
    task_id = head.task_id if isinstance(head.task_id, str) else None
    worker = head.assigned_worker if isinstance(head.assigned_worker, str) else None
    try:
        envelope = TaskEnvelope.model_validate_json(raw)
    except ValidationError as error:
        raise EnvelopeError(validation_text(error, "envelope"), task_id=task_id, assigned_worker=worker) from error
    specs = [("task.spec", envelope.task.spec)]
    specs += [(f"merged_children[{n}].spec", child.spec or {}) for n, child in enumerate(envelope.merged_children)]
    for place, spec in specs:
        if (path := _non_finite(spec, place)) is not None:
            raise EnvelopeError(
                f"{path} is NaN or infinite: expected a finite number", task_id=task_id, assigned_worker=worker
            )
    return envelope


def _non_finite(value: JsonValue, path: str) -> str | None:
    """Find the first number that JSON does not allow; Python's own encoder writes such numbers."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    if isinstance(value, dict):
        parts = ((_non_finite(part, f"{path}.{key}")) for key, part in value.items())
    elif isinstance(value, list):
        parts = ((_non_finite(part, f"{path}[{index}]")) for index, part in enumerate(value))
    else:
        return None
    return next((found for found in parts if found is not None), None)


class CancelMessage(_In):
    """On `tasks.control`: stop this task, queued or running."""

    type: Literal["CANCEL"]
    task_id: str


class DeliverMessage(_In):
    """On `tasks.control`: deliver the finished result of this task again; its last delivery failed."""

    type: Literal["DELIVER"]
    task_id: str


ControlMessage: TypeAdapter[CancelMessage | DeliverMessage] = TypeAdapter(
    Annotated[CancelMessage | DeliverMessage, Field(discriminator="type")]
)


class SentEvent(_In):
    """The part of an event that is read back from the journal."""

    type: str = ""
    worker_id: str = ""
    error: str | None = None
    payload: JsonObject = Field(default_factory=dict)


class _Out(BaseModel):
    """Something we send: whole, finite numbers only, one line of JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def encode(self) -> bytes:
        """UTF-8 JSON."""
        return self.model_dump_json().encode()


TaskEventType = Literal["TASK_STARTED", "TASK_PROGRESS", "TASK_SUCCEEDED", "TASK_FAILED"]


class TaskEvent(_Out):
    """On `tasks.events` (WIRE 2.2). `payload` is never null, `error` is a string or null."""

    type: TaskEventType
    task_id: str
    worker_id: str
    ts: str = Field(default_factory=now_iso)
    status: str | None = None
    error: str | None = None
    payload: JsonObject = Field(default_factory=dict)


WorkerEventType = Literal["REGISTER", "STATUS", "HEARTBEAT", "UNREGISTER"]


class WorkerEvent(_Out):
    """On `workers.events` (WIRE 2.3). `metrics` and `payload` are never null."""

    type: WorkerEventType
    worker_id: str
    ts: str = Field(default_factory=now_iso)
    status: str | None = None
    tags: tuple[str, ...] | None = None
    metrics: JsonObject = Field(default_factory=dict)
    payload: JsonObject = Field(default_factory=dict)


class ResultMessage(_Out):
    """On `channel:results:<task_id>` (WIRE 2.5), once a task has ended.

    Tuning managers number their tasks and experiments and take integers only; other task ids go as they are, for others
    who listen.
    """

    task_id: int | str
    experiment_id: int | str
    worker_id: str
    status: Literal["success", "failed"]
    metrics: JsonObject = Field(default_factory=dict)
    parameters: JsonObject = Field(default_factory=dict)
    objective_score: float | None = None
    error_message: str | None = None
    elapsed_time: float = 0.0
    timestamp: str = Field(default_factory=now_iso)

    @classmethod
    def of_final_event(cls, task_id: str, event: SentEvent) -> ResultMessage:
        """The same end in the tuning manager's words."""
        payload = event.payload
        runtime, metrics, score = payload.get("runtime_sec"), payload.get("metrics"), payload.get("objective_score")
        finished = payload.get("finished_at")
        return cls(
            task_id=_number(task_id),
            experiment_id=_number(payload.get("experiment_id")) or 0,
            worker_id=event.worker_id,
            status="success" if event.type == "TASK_SUCCEEDED" else "failed",
            metrics=metrics if isinstance(metrics, dict) else {},
            objective_score=score if isinstance(score, int | float) else None,
            error_message=event.error,
            elapsed_time=runtime if isinstance(runtime, int | float) else 0.0,
            timestamp=finished if isinstance(finished, str) and finished else now_iso(),
        )


def _number(value: JsonValue) -> int | str:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else text


_MOST_DIGITS = 18
LifecycleEventType = Literal["registered", "heartbeat", "job_started", "job_completed", "offline"]


class LifecycleEvent(_Out):
    """On `channel:worker:<id>` (WIRE 2.5). `data` is never null."""

    worker_id: str
    event_type: LifecycleEventType
    data: JsonObject = Field(default_factory=dict)
    timestamp: str = Field(default_factory=now_iso)


WORKER_ID_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
"""A worker id is part of Redis keys and of a folder name."""
