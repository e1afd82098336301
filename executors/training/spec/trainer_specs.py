"""The specs of the kinds of training (WIRE 4.4 to 4.7): one class for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from executors.contract import EnginePolicy
from executors.input_spec import InputRequest
from executors.model_spec import CHECKPOINT, ModelTaskSpec, WeightsSection
from executors.task_spec import SpecSection, lower
from executors.training.spec.kind_options import (
    DpoOptions,
    GrpoOptions,
    LoraSftOptions,
    PpoOptions,
    RewardedOptions,
    RewardOptions,
    SftOptions,
)
from executors.training.spec.training_data_spec import PreferenceData, PromptData, TextData, TrainingData
from executors.training.spec.training_options import LoraOptions, TrainingOptions

TrainingKind = Literal["sft", "lora_sft", "dpo", "ppo", "grpo", "reward"]

_RESPONSE_LENGTH = 64
_TEMPERATURE = 0.7


class TrainedModel(WeightsSection):
    """`model`; what says how an engine generates text with it is a leftover of a base spec and has no effect."""

    config: JsonValue = None
    transformers: JsonValue = None
    vllm: JsonValue = None
    adapters: JsonValue = None


class GenerationOptions(SpecSection):
    """`generation`: how the model answers while it is trained.

    Attributes:
        max_new_tokens: of one answer; absent: 64.
        temperature: absent: `training.temperature`, else 0.7.
        stop: one token that ends an answer; absent: the tokenizer's own.
        do_sample: accepted; answers are always sampled.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=2**20)
    temperature: float | None = Field(default=None, gt=0)
    stop: Annotated[str, StringConstraints(min_length=1)] | None = None
    do_sample: JsonValue = None


class RewardModelOptions(SpecSection):
    """`reward_model`: a classifier that scores answers.

    Attributes:
        type: `sentiment` scores the positive label's logit less the negative label's.
        scale: factor on the score.
        max_length: tokens of prompt and answer together.
    """

    identifier: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    revision: str | None = None
    type: Annotated[Literal["classification", "sentiment"], BeforeValidator(lower)] = "classification"
    scale: float = 1.0
    max_length: int = Field(default=512, ge=1, le=512)
    positive_label: str | int | None = None
    negative_label: str | int | None = None
    trust_remote_code: bool = False


class RewardFunctionOptions(SpecSection):
    """One entry of `reward_functions`: a name of the worker's list, with a weight and that function's own options."""

    passes_unknown_keys: ClassVar[bool] = True

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    weight: float = 1.0

    @property
    def options(self) -> dict[str, JsonValue]:
        """The function's own options."""
        return dict(self.model_extra or {})


def _named_functions(value: object) -> object:
    """A name alone stands for a function with its defaults, and one function for a list of one."""
    listed = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(listed, list | tuple):
        return value
    return [{"name": each} if isinstance(each, str) else each for each in listed]


class TrainingSpec(ModelTaskSpec):
    """What the specs of all kinds of training share.

    Attributes:
        lora: absent: all weights are trained (lora_sft: the defaults).
    """

    kind: ClassVar[TrainingKind]

    model: TrainedModel = Field(default_factory=dict, validate_default=True)
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    lora: LoraOptions | None = None
    data: TrainingData = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.training.packing and self.kind not in {"sft", "lora_sft"}:
            raise PydanticCustomError(
                "packing",
                "training.packing is true, but {kind} cannot pack; expected false, or taskType sft or lora_sft",
                {"kind": self.kind},
            )
        if self.model.source.gguf_file:
            raise PydanticCustomError(
                "gguf",
                "model.source.gguf_file is {name}: GGUF weights cannot be trained; expected a model with safetensors",
                {"name": repr(self.model.source.gguf_file)},
            )
        return self

    @property
    def uses_lora(self) -> bool:
        """Whether an adapter is trained, not the model itself."""
        return self.lora is not None and self.kind != "sft"

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the task wants code from the model's or the data's repository to run."""
        return self.model.source.trust_remote_code or self.data.trust_remote_code

    def inputs(self) -> tuple[InputRequest, ...]:
        """The weights or the adapter that `checkpoint.load` names, as `CHECKPOINT`, and the JSONL file."""
        checkpoint = (self.checkpoint.load.request(CHECKPOINT),) if self.checkpoint.load else ()
        return (*checkpoint, *self.data.inputs())


class SftSpec(TrainingSpec):
    """`taskType: sft`."""

    kind = "sft"
    training: SftOptions = Field(default_factory=SftOptions)
    data: TextData = Field(default_factory=dict, validate_default=True)


class LoraSftSpec(TrainingSpec):
    """`taskType: lora_sft`."""

    kind = "lora_sft"
    training: LoraSftOptions = Field(default_factory=LoraSftOptions)
    lora: LoraOptions = Field(default_factory=LoraOptions)
    data: TextData = Field(default_factory=dict, validate_default=True)


class DpoSpec(TrainingSpec):
    """`taskType: dpo`."""

    kind = "dpo"
    training: DpoOptions = Field(default_factory=DpoOptions)
    data: PreferenceData = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        bare = [number for number, each in enumerate(self.data.preferences) if each.prompt is None]
        if self.data.rows == "inline" and bare:
            raise PydanticCustomError(
                "no_prompt", "data.preferences[{number}] has no 'prompt'; dpo needs one", {"number": bare[0]}
            )
        return self


class RewardSpec(TrainingSpec):
    """`taskType: reward`: trains a reward model."""

    kind = "reward"
    training: RewardOptions = Field(default_factory=RewardOptions)
    data: PreferenceData = Field(default_factory=dict, validate_default=True)


class RewardedSpec(TrainingSpec):
    """What ppo and grpo share: answers are sampled and scored."""

    training: RewardedOptions = Field(default_factory=RewardedOptions)
    generation: GenerationOptions = Field(default_factory=GenerationOptions)
    reward_model: RewardModelOptions | None = None
    reward_functions: Annotated[tuple[RewardFunctionOptions, ...], BeforeValidator(_named_functions)] = ()
    data: PromptData = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="after")
    def _has_a_reward(self) -> Self:
        if not (self.reward_model or self.reward_functions):
            raise PydanticCustomError(
                "no_reward",
                "neither reward_model nor reward_functions is given; expected a classifier (reward_model.identifier), "
                "or names of reward functions",
            )
        return self

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the task wants code from the model's, the reward model's or the data's repository to run."""
        return super().trusts_remote_code or bool(self.reward_model and self.reward_model.trust_remote_code)

    @property
    def response_length(self) -> int:
        """Tokens of one answer at most."""
        return self.generation.max_new_tokens or _RESPONSE_LENGTH

    @property
    def temperature(self) -> float:
        """Of sampling."""
        return self.generation.temperature or self.training.temperature or _TEMPERATURE


class PpoSpec(RewardedSpec):
    """`taskType: ppo`."""

    kind = "ppo"
    training: PpoOptions = Field(default_factory=PpoOptions)


class GrpoSpec(RewardedSpec):
    """`taskType: grpo`."""

    kind = "grpo"
    training: GrpoOptions = Field(default_factory=GrpoOptions)


SPEC_TYPES: Final[dict[TrainingKind, type[TrainingSpec]]] = {
    "sft": SftSpec,
    "lora_sft": LoraSftSpec,
    "dpo": DpoSpec,
    "ppo": PpoSpec,
    "grpo": GrpoSpec,
    "reward": RewardSpec,
}


_INSTEAD: Final = {
    "target_kl": "spec.training.kl_coef holds the policy near the reference",
    "early_stopping": "a run ends after its epochs or steps",
    "optimize_cuda_cache": "spec.training.trl.torch_empty_cache_steps empties the cache",
    "log_with": "spec.training.report_to names the trackers",
    "tracker_project_name": "spec.training.trl.run_name names a run",
    "mini_batch_size": "spec.training.num_mini_batches splits the batch",
}
"""Keys of `training` that are accepted in vain, with what does have an effect."""


def spec_warnings(spec: TrainingSpec, policy: EnginePolicy) -> list[str]:
    """Sentences for the sender about what a valid spec asks for in vain."""
    warnings = []
    if spec.trusts_remote_code and not policy.allow_remote_code:
        warnings.append(
            "trust_remote_code has no effect: this worker runs no code of models (WORKER_ALLOW_REMOTE_CODE)"
        )
    warnings += [
        f"spec.training.{key} has no effect: {instead}"
        for key, instead in _INSTEAD.items()
        if getattr(spec.training, key, None) not in (None, False)
    ]
    if spec.training.save_safetensors is False and "save_safetensors" in spec.training.model_fields_set:
        warnings.append("spec.training.save_safetensors has no effect: weights are always saved as safetensors")
    if "beta" in spec.training.model_fields_set and not isinstance(spec.training, DpoOptions | GrpoOptions):
        other = "; spec.training.kl_coef does what it does elsewhere" if spec.kind == "ppo" else ""
        warnings.append(f"spec.training.beta has no effect in {spec.kind}{other}")
    if len(spec.data.sources) > 1:
        first, *others = (f"spec.data.{key}" for key in spec.data.sources)
        warnings.append(f"{' and '.join(others)} {_have(others)} no effect: the rows come from {first}")
    if spec.model.adapters:
        warnings.append(
            "spec.model.adapters has no effect in training; an adapter to train on is named by spec.checkpoint.load"
        )
    return warnings + _lora_warnings(spec) + (_reward_warnings(spec) if isinstance(spec, RewardedSpec) else [])


def _have(things: Sequence[str]) -> str:
    return "have" if len(things) > 1 else "has"


def _lora_warnings(spec: TrainingSpec) -> list[str]:
    if spec.lora is None:
        return []
    if not spec.uses_lora:
        return [f"spec.lora has no effect in {spec.kind}: all weights are trained; taskType lora_sft trains an adapter"]
    expected = "SEQ_CLS" if spec.kind == "reward" else "CAUSAL_LM"
    if "task_type" in spec.lora.model_fields_set and spec.lora.task_type.upper() != expected:
        return [f"spec.lora.task_type {spec.lora.task_type!r} has no effect: {spec.kind} trains {expected}"]
    return []


def _reward_warnings(spec: RewardedSpec) -> list[str]:
    warnings = []
    generation, model = spec.generation, spec.reward_model
    if generation.do_sample is False:
        warnings.append("spec.generation.do_sample has no effect: answers are always sampled")
    if None not in (generation.temperature, spec.training.temperature) and (
        generation.temperature != spec.training.temperature
    ):
        warnings.append(
            f"spec.training.temperature has no effect: spec.generation.temperature is {generation.temperature}"
        )
    if model and model.negative_label is not None and model.type != "sentiment":
        warnings.append("spec.reward_model.negative_label has no effect: its type is not 'sentiment'")
    return warnings
