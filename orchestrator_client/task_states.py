"""What anyone can read in Redis about tasks and workers: the hashes `task:<id>` and `worker:<id>`.

Others write these hashes too (WIRE 1.2), so nothing in them is trusted: what cannot be read counts as absent, and
control characters, which could command a terminal, are replaced.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError

TaskStatus = Literal["QUEUED", "RUNNING", "DELIVERING", "SUCCEEDED", "FAILED"]
FINAL: Final = frozenset({"SUCCEEDED", "FAILED"})

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text without characters that move cursors or change directions; newlines and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _text(value: object) -> object:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return printable(value) if isinstance(value, str) else "" if value is None else printable(json.dumps(value))


def _number(value: object) -> object:
    try:
        number = float(_text(value))  # type: ignore[arg-type]  # whatever it is, float says whether it is a number
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _upper(value: object) -> object:
    return str(_text(value)).strip().upper()


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float | None, BeforeValidator(_number)]
Word = Annotated[str, BeforeValidator(_upper)]


class TaskProgress(BaseModel):
    """How far a task is, from the payload of TASK_PROGRESS or from the hash."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    done: Number = None
    total: Number = None
    unit: Text = ""
    message: Text = ""


class TaskState(BaseModel):
    """The hash `task:<id>`; absent fields are empty.

    Attributes:
        status: QUEUED, RUNNING, DELIVERING, SUCCEEDED or FAILED; another word is kept as it is.
        reason: why it failed, one word.
        hint: the next step after a failure.
        result_path: `responses.json` on the worker's disk.
        engine: `cold` or `warm`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    task_id: str
    status: Word = ""
    task_type: Text = ""
    worker_id: Text = ""
    accepted_at: Text = ""
    started_at: Text = ""
    finished_at: Text = ""
    progress_done: Number = None
    progress_total: Number = None
    progress_unit: Text = ""
    progress_message: Text = ""
    error: Text = ""
    reason: Text = ""
    hint: Text = ""
    result_path: Text = ""
    engine: Text = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the task."""
        return self.status in FINAL

    @property
    def progress(self) -> TaskProgress:
        """How far the task is."""
        return TaskProgress(
            done=self.progress_done,
            total=self.progress_total,
            unit=self.progress_unit,
            message=self.progress_message,
        )


class TaskNews(BaseModel):
    """One message on `tasks.events` (WIRE 2.2), as far as a person who waits cares."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Word
    task_id: str
    worker_id: Text = ""
    error: Text = ""
    payload: dict[str, JsonValue] = {}

    @property
    def progress(self) -> TaskProgress:
        """The payload of TASK_PROGRESS."""
        return TaskProgress.model_validate(self.payload)

    def detail(self, key: str) -> str:
        """One text of the payload; empty if it is absent or no text."""
        value = self.payload.get(key)
        return printable(value) if isinstance(value, str) else ""


class WorkerState(BaseModel):
    """The hash `worker:<id>` with its heartbeat key.

    Attributes:
        alive: whether the heartbeat has a life time left; orchestrators choose only such workers (WIRE 1.1).
        heartbeat_ttl_sec: what is left of it; None when there is none.
        status: STARTING, IDLE or RUNNING; empty when the hash is gone, UNREADABLE when the key is no hash.
        gpus: product names.
    """

    model_config = ConfigDict(frozen=True)

    worker_id: str
    alive: bool = False
    heartbeat_ttl_sec: int | None = None
    status: Word = ""
    started_at: Text = ""
    last_seen: Text = ""
    pid: Text = ""
    task_id: Text = ""
    cost_per_hour: Number = None
    tags: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()

    def uptime_sec(self, now: datetime | None = None) -> float | None:
        """Seconds since the start; None when the hash does not tell."""
        try:
            started = datetime.fromisoformat(self.started_at)
        except ValueError:
            return None
        if started.tzinfo is None:
            started = started.replace(tzinfo=UTC)
        return max(0.0, ((now or datetime.now(UTC)) - started).total_seconds())


RawText = bytes | str
"""What redis-py answers: bytes, unless the URL asks for decoded responses."""
RawHash = Mapping[RawText, RawText]


def decoded(raw: RawText) -> str:
    """Text of an answer; what is no UTF-8 is replaced."""
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw


def _decoded_hash(raw: RawHash) -> dict[str, str]:
    return {decoded(key): decoded(value) for key, value in raw.items()}


def read_task(task_id: str, raw: RawHash) -> TaskState | None:
    """Read a task's hash; None when it is empty, which is how Redis says that there is none."""
    if not raw:
        return None
    return TaskState.model_validate(_decoded_hash(raw) | {"task_id": task_id})


def read_news(raw: object) -> TaskNews | None:
    """Read an event; None for anything that is none."""
    if not isinstance(raw, bytes | str):
        return None
    try:
        return TaskNews.model_validate_json(raw)
    except ValidationError:
        return None


def read_worker(worker_id: str, raw: RawHash | None, ttl_sec: int) -> WorkerState:
    """Read a worker's hash.

    Args:
        worker_id: the member of `workers:ids`.
        raw: the hash; empty when it is gone, None when the key holds something else.
        ttl_sec: Redis' answer to TTL: negative for no key, and for a key without end.
    """
    fields = {"status": "UNREADABLE"} if raw is None else _decoded_hash(raw)
    return WorkerState(
        worker_id=printable(worker_id),
        alive=ttl_sec >= 0,
        heartbeat_ttl_sec=ttl_sec if ttl_sec >= 0 else None,
        status=fields.get("status", ""),
        started_at=fields.get("started_at", ""),
        last_seen=fields.get("last_seen", ""),
        pid=fields.get("pid", ""),
        task_id=fields.get("extra_task_id", "") if fields.get("status", "").upper() == "RUNNING" else "",
        cost_per_hour=_cost(fields.get("cost_per_hour", "")),
        tags=tuple(printable(tag) for tag in _list(_json(fields.get("tags_json", ""))) if isinstance(tag, str)),
        gpus=tuple(_gpu_names(_json(fields.get("hardware_json", "")))),
    )


def _cost(text: str) -> float | None:
    number = _number(text)
    return number if isinstance(number, float) else None


def _json(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _gpu_names(hardware: JsonValue) -> list[str]:
    gpu = hardware.get("gpu") if isinstance(hardware, dict) else None
    entries = _list(gpu.get("gpus")) if isinstance(gpu, dict) else []
    return [printable(str(entry.get("name", "GPU"))) for entry in entries if isinstance(entry, dict)]
