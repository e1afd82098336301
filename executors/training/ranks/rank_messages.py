"""What the launcher of a training run and its ranks say to each other: one JSON object a line over a Unix socket.

A rank says `Hello`, gets the `TrainingJob` as one line, reports while it works, and ends with exactly one `RankDone` or
`RankFailed`. When the socket ends, whoever is left at the other side ends too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from executors.contract import Failure, LogLevel
from executors.training.training_job import TrainingOutcome


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    def encode(self) -> bytes:
        """One line of UTF-8 JSON with its newline."""
        return self.model_dump_json().encode() + b"\n"


class Hello(_Message):
    """The first message of a rank."""

    type: Literal["hello"] = "hello"
    rank: int = Field(ge=0)
    pid: int


class RankProgress(_Message):
    """See `RankReport.progress`."""

    type: Literal["progress"] = "progress"
    step: float
    total: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    message: str = ""


class RankLog(_Message):
    """A line for the task's log."""

    type: Literal["log"] = "log"
    level: LogLevel
    message: str


class RankWarning(_Message):
    """A sentence for the result's `warnings`."""

    type: Literal["warning"] = "warning"
    message: str


class RankDone(_Message):
    """The rank has done its part, and all others have. Only rank 0 has an outcome."""

    type: Literal["done"] = "done"
    outcome: TrainingOutcome | None = None


class RankFailed(_Message):
    """The rank cannot go on.

    Attributes:
        failure: what to tell the sender.
        foreseen: whether it was raised on purpose, so that the text says all and the log adds nothing.
        out_of_memory: whether a smaller batch may help.
        memory: the GPU's memory at that moment in bytes: `allocated`, `reserved`, `total`; empty on the CPU.
    """

    type: Literal["failed"] = "failed"
    failure: Failure
    foreseen: bool = False
    out_of_memory: bool = False
    memory: dict[str, float] = Field(default_factory=dict)


RankMessage = Hello | RankProgress | RankLog | RankWarning | RankDone | RankFailed

from_rank: TypeAdapter[RankMessage] = TypeAdapter(Annotated[RankMessage, Field(discriminator="type")])
