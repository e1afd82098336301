"""The part of a task's spec that all kinds share (WIRE 4.1), and what to say about keys that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints, model_validator

if TYPE_CHECKING:  # its sections derive from those here
    from executors.input_spec import InputRequest


def _without_nulls(value: object) -> object:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else value


class SpecSection(BaseModel):
    """Base of every part of a spec. Unknown keys are kept, and become warnings by `unknown_keys`.

    A null counts as absent: merged stage specs use nulls to take a base value back.
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, allow_inf_nan=False)

    passes_unknown_keys: ClassVar[bool] = False
    """Whether unknown keys of this section have an effect, so that nobody is to be warned of them here."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return _without_nulls(value)


Headers = Annotated[dict[str, str], BeforeValidator(_without_nulls)]
"""Headers of a request; one that is null is not sent."""


class GpuDemand(SpecSection):
    """`resources.hardware.gpu`: only the count matters to a worker, it caps the GPUs in use (WIRE 8)."""

    count: int | None = Field(default=None, ge=0)
    type: JsonValue = None
    memory: JsonValue = None


class HardwareDemand(SpecSection):
    """`resources.hardware`: the orchestrator schedules by it."""

    cpu: JsonValue = None
    memory: JsonValue = None
    gpu: GpuDemand | None = None


class Resources(SpecSection):
    """`resources`."""

    hardware: HardwareDemand | None = None
    replicas: JsonValue = None
    slo_seconds: JsonValue = Field(default=None, alias="sloSeconds")
    estimated_load: JsonValue = Field(default=None, alias="estimatedLoad")


def lower(value: object) -> object:
    """Text in lower case without blanks around it; anything else as it is."""
    return value.strip().lower() if isinstance(value, str) else value


def as_list(value: object) -> object:
    """A single text as a list of one."""
    return [value] if isinstance(value, str) else value


PlainText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text that may become a file name: no control characters."""


class Destination(SpecSection):
    """`output.destination` (WIRE 4.1, 5.4, 6)."""

    type: Annotated[Literal["local", "http"], BeforeValidator(lower)] = "local"
    path: PlainText | None = None
    url: str | None = None
    method: str = "POST"
    headers: Headers = Field(default_factory=dict, repr=False)
    timeout_sec: float | None = Field(default=None, alias="timeoutSec", gt=0)


class Output(SpecSection):
    """`output`."""

    destination: Destination = Field(default_factory=Destination)
    artifacts: tuple[PlainText, ...] = ()


class TaskSpec(SpecSection):
    """What every kind of task may hold. An executor's spec derives from this class.

    Sections of other kinds are tolerated without a word: stage specs are merged over a base spec, so leftovers are
    normal (WIRE 3.2).
    """

    any_key_goes: ClassVar[bool] = False
    """Whether this kind of task has no unknown keys."""

    task_type: str = Field(default="", alias="taskType")
    enforce_cpu: bool = False
    resources: Resources | None = None
    output: Output = Field(default_factory=Output)
    timeout_sec: float | None = Field(default=None, alias="timeoutSec", gt=0)
    no_progress_timeout_sec: float | None = Field(default=None, alias="noProgressTimeoutSec", gt=0)
    upstream_results: dict[str, JsonValue] = Field(default_factory=dict, alias="_upstreamResults")

    def inputs(self) -> tuple[InputRequest, ...]:
        """What has to be found or fetched before a task with this spec can run. The default is nothing."""
        return ()


_WIRE_SECTIONS = frozenset(
    {
        "parallel", "shard", "dependsOn", "model", "data", "checkpoint", "postprocess", "inference", "training", "lora",
        "generation", "reward_model", "qdrant", "embedding", "search", "query", "agent", "configName", "task",
    }
)  # fmt: skip
"""Top-level keys that some kind of task knows (WIRE 4)."""


def unknown_keys(spec: TaskSpec) -> list[str]:
    """Return one sentence for each key that this kind of task does not know, with the nearest key that it does."""
    if spec.any_key_goes:
        return []
    return [
        f"unknown key {path!r} is ignored" + (f"; did you mean {nearest!r}?" if nearest else "")
        for path, nearest in _walk(spec, "spec")
        if not (path.count(".") == 1 and path.removeprefix("spec.") in _WIRE_SECTIONS)
    ]


def _walk(section: SpecSection, path: str) -> Iterator[tuple[str, str]]:
    fields = type(section).model_fields
    known = [info.alias or name for name, info in fields.items()]
    for key in () if section.passes_unknown_keys else section.model_extra or {}:
        nearest = difflib.get_close_matches(key, known, n=1)
        yield f"{path}.{key}", f"{path}.{nearest[0]}" if nearest else ""
    for name, info in fields.items():
        value = getattr(section, name)
        children = value if isinstance(value, list | tuple) else [value]
        for position, child in enumerate(children):
            if isinstance(child, SpecSection):
                suffix = f"[{position}]" if value is not child else ""
                yield from _walk(child, f"{path}.{info.alias or name}{suffix}")
