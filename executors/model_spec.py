"""What all specs share whose tasks work with a model: `model.source` and `checkpoint.load` (WIRE 4.1, 4.9)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from executors.input_spec import CheckpointLoad
from executors.task_spec import SpecSection, TaskSpec, lower

DtypeName = Literal["auto", "float16", "bfloat16", "float32"]

CHECKPOINT: Final = "checkpoint.load"
"""Name of the checkpoint among a task's inputs."""


_DTYPE_ALIASES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def _full_dtype_name(value: object) -> object:
    lowered = lower(value)
    return _DTYPE_ALIASES.get(lowered, lowered) if isinstance(lowered, str) else lowered


Dtype = Annotated[DtypeName, BeforeValidator(_full_dtype_name)]
"""Type of the weights in memory; `fp16`, `bf16` and `fp32` are short for the full names."""


def _no_address(identifier: str) -> str:
    if "://" in identifier:
        raise PydanticCustomError(
            "model_address",
            "expected a hub name such as 'org/model' or a path, not a URL; weights are fetched by checkpoint.load",
        )
    return identifier


class ModelSource(SpecSection):
    """`model.source`: which weights. `gguf_file` picks one file of a folder or repository with quantised files.

    With `checkpoint.load` the weights come from there, and this names what lacks in it: tokenizer and configuration.
    """

    identifier: Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_no_address)] = ""
    type: JsonValue = None
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None


class WeightsSection(SpecSection):
    """`model`, as far as all kinds of task read it."""

    source: ModelSource = Field(default_factory=dict, validate_default=True)


class CheckpointSection(SpecSection):
    """`checkpoint`."""

    load: CheckpointLoad | None = None


class ModelTaskSpec(TaskSpec):
    """The spec of a task that works with a model's weights.

    Raises:
        pydantic.ValidationError: neither a model nor a checkpoint is named.
    """

    default_model: ClassVar[str] = ""
    """How else a model may be named, as the end of a sentence."""

    model: WeightsSection = Field(default_factory=dict, validate_default=True)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)

    @model_validator(mode="after")
    def _names_weights(self) -> Self:
        if self.model.source.identifier or self.checkpoint.load:
            return self
        problem = PydanticCustomError(
            "missing_model",
            "is missing; expected a hub name such as 'org/model' or a path. "
            f"Set it or checkpoint.load in the task{self.default_model}",
        )
        line = InitErrorDetails(type=problem, loc=("model", "source", "identifier"), input="")
        raise ValidationError.from_exception_data(type(self).__name__, [line])  # the only way to name a field from here

    @property
    def model_name(self) -> str:
        """The model for people: its name, or that of the checkpoint where it has none."""
        load = self.checkpoint.load
        return self.model.source.identifier or (load.shown_name if load else "")

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the task wants code from the model's repository to run."""
        return self.model.source.trust_remote_code

    @property
    def gpu_limit(self) -> int | None:
        """How many GPUs the task may use at most; None means all."""
        hardware = self.resources.hardware if self.resources else None
        return hardware.gpu.count if hardware and hardware.gpu else None
