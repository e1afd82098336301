"""The spec of `taskType: inference` (WIRE 4.1 to 4.3), for every engine that generates text.

A null counts as absent: merged stage specs use nulls to take a base value back.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from executors.contract import EnginePolicy
from executors.inference.jsonl_export import JsonlExport
from executors.inference.prompt_spec import DataSection, ShardSection
from executors.inference.sampling_spec import InferenceOptions
from executors.inference.vllm_spec import VllmOptions
from executors.input_spec import AdapterEntry, InputRequest
from executors.model_spec import CHECKPOINT, Dtype, ModelTaskSpec, WeightsSection
from executors.task_spec import SpecSection, lower


def adapter_input(place: int) -> str:
    """Name of an adapter among a task's inputs, by its place in `model.adapters`."""
    return f"model.adapters[{place}]"


class ModelConfig(SpecSection):
    """`model.config`: accepted, has no effect (WIRE 4.1)."""

    fp16: JsonValue = None
    device_map_auto: JsonValue = None


class TransformersOptions(SpecSection):
    """`model.transformers`: how Transformers loads the weights.

    `low_cpu_mem_usage` is accepted; Transformers 5 always loads that way.
    """

    device_map: (
        Annotated[Literal["auto", "balanced", "balanced_low_0", "cuda", "cpu"], BeforeValidator(lower)] | None
    ) = None
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    low_cpu_mem_usage: bool = True
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    use_flash_attention_2: bool = False

    @model_validator(mode="after")
    def _one_quantisation(self) -> Self:
        if self.load_in_8bit and self.load_in_4bit:
            raise PydanticCustomError(
                "two_quantisations", "load_in_8bit and load_in_4bit are both true; expected at most one of them"
            )
        return self


class ModelSection(WeightsSection):
    """`model`."""

    config: ModelConfig = Field(default_factory=ModelConfig)
    transformers: TransformersOptions = Field(default_factory=TransformersOptions)
    vllm: VllmOptions = Field(default_factory=VllmOptions)
    adapters: tuple[AdapterEntry, ...] = ()


class ParallelSection(SpecSection):
    """`parallel`: accepted, has no effect (WIRE 4.1)."""

    enabled: JsonValue = None
    max_shards: JsonValue = None


class PostprocessSection(SpecSection):
    """`postprocess`."""

    jsonl_export: JsonlExport | None = None


class InferenceSpec(ModelTaskSpec):
    """The spec of a text generation task.

    Raises:
        pydantic.ValidationError: a value is wrong, or the model or the data is missing.
    """

    default_model = ", or VLLM_MODEL or HF_MODEL at the worker"

    model: ModelSection = Field(default_factory=dict, validate_default=True)
    data: DataSection
    inference: InferenceOptions = Field(default_factory=InferenceOptions)
    shard: ShardSection = Field(default_factory=ShardSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    postprocess: PostprocessSection = Field(default_factory=PostprocessSection)

    def inputs(self) -> tuple[InputRequest, ...]:
        """The weights that `checkpoint.load` names, as `CHECKPOINT`, and the LoRA adapters by their places."""
        checkpoint = (self.checkpoint.load.request(CHECKPOINT),) if self.checkpoint.load else ()
        adapters = (
            entry.request(adapter_input(place))
            for place, entry in enumerate(self.model.adapters)
            if entry.type == "lora"
        )
        return (*checkpoint, *adapters)

    @property
    def wants_runtime_adapters(self) -> bool:
        """Whether LoRA adapters are to be applied while the model runs."""
        return any(entry.type == "lora" and entry.apply == "runtime" for entry in self.model.adapters)

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the task wants code from the model's repository to run."""
        model = self.model
        return model.source.trust_remote_code or model.transformers.trust_remote_code or model.vllm.trust_remote_code


def spec_warnings(spec: InferenceSpec, policy: EnginePolicy) -> list[str]:
    """Sentences for the sender about what a valid spec asks for in vain, on whichever engine."""
    warnings = []
    if (spec.trusts_remote_code or spec.data.trust_remote_code) and not policy.allow_remote_code:
        warnings.append(
            "trust_remote_code has no effect: this worker runs no code of models (WORKER_ALLOW_REMOTE_CODE)"
        )
    if spec.inference.greedy and spec.inference.do_sample:
        warnings.append("spec.inference.do_sample has no effect: temperature 0 always takes the likeliest token")
    return warnings
