"""`training.*` and `lora.*` (WIRE 4.5 to 4.7, 8): what all kinds of training share.

Defaults that differ by kind stand in `executors.training.spec.trainer_specs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from executors.task_spec import SpecSection, as_list, lower

Count = Annotated[int, Field(ge=1, le=10**12)]
"""Of steps. The limit leaves room for "never"; what computes with larger numbers runs over."""

BatchSize = Annotated[int, Field(ge=1, le=2**20)]

Tracker = Literal["tensorboard", "trackio"]


def _visible_devices(value: object) -> object:
    """A list of device numbers or names; WIRE 8 allows a comma list too."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    return [str(device) for device in value] if isinstance(value, list) else value


def _trackers(value: object) -> object:
    """A list of trackers; `none` is an empty one."""
    listed = as_list(value)
    return [lower(each) for each in listed if lower(each) != "none"] if isinstance(listed, list | tuple) else listed


class TrainingOptions(SpecSection):
    """`training`.

    Attributes:
        batch_size: examples on one device in one step; `per_device_train_batch_size` is another word that wins.
        max_steps: optimizer steps in all; replaces `num_train_epochs`.
        save_steps: steps between checkpoints; `save_freq` is another word for it.
        save_total_limit: how many checkpoints are kept; at least 2, so that one is whole while another is written.
        max_seq_length: tokens; longer examples are cut.
        resume: `auto` continues an earlier run of the same task from its last whole checkpoint.
        resume_from_path: a checkpoint folder on this worker to continue from.
        deepspeed: a configuration, or the path of a file that holds one.
        fsdp: true, FSDP options as words, or an object of them; passed on.
        oom_retry: after running out of memory, try once more with half the batch and doubled accumulation.
        report_to: where metrics go beside `artifacts/metrics.jsonl`.
        trl: further fields of TRL's own configuration class.
        packing: several short examples in one sequence; for sft and lora_sft.
        save_safetensors: accepted; weights are always written so. What follows it is accepted too (`spec_warnings`).
    """

    same: ClassVar[dict[str, tuple[str, ...]]] = {
        "batch_size": ("per_device_train_batch_size", "batch_size"),
        "save_steps": ("save_steps", "save_freq"),
    }
    """All names of a key; the first that is given wins."""

    num_train_epochs: float = Field(default=1.0, gt=0, le=1e6)
    max_steps: Count | None = None
    batch_size: BatchSize = 2
    gradient_accumulation_steps: BatchSize = 1
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0, le=10**12)
    logging_steps: Count = 10
    save_steps: Count = 100
    save_strategy: Annotated[Literal["steps", "epoch", "no"], BeforeValidator(lower)] = "steps"
    save_total_limit: int = Field(default=2, ge=2, le=10**6)
    save_model: bool = True
    fp16: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = True
    max_seq_length: int = Field(default=1024, ge=2, le=2**24)
    packing: bool = False
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    resume: Annotated[Literal["auto", "never"], BeforeValidator(lower)] = "auto"
    resume_from_path: str | None = None
    oom_retry: bool = False
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_trackers)] = ()
    trl: dict[str, JsonValue] = Field(default_factory=dict)

    ddp_find_unused_parameters: bool | None = None
    allow_multi_gpu: bool | None = None
    visible_devices: Annotated[tuple[str, ...], BeforeValidator(_visible_devices)] = ()
    nproc_per_node: int | None = Field(default=None, ge=1, le=64)
    primary_gpu: int = Field(default=0, ge=0)
    deepspeed: dict[str, JsonValue] | str | None = None
    auto_deepspeed: bool = True
    auto_deepspeed_stage: int | None = Field(default=None, ge=1, le=3)
    zero_stage: int | None = Field(default=None, ge=1, le=3)
    fsdp: dict[str, JsonValue] | str | bool | None = None

    save_safetensors: JsonValue = None
    beta: JsonValue = None
    target_kl: JsonValue = None
    early_stopping: JsonValue = None
    optimize_cuda_cache: JsonValue = None
    log_with: JsonValue = None
    tracker_project_name: JsonValue = None

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_each(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        kept = dict(value)
        for key, names in cls.same.items():
            found = [kept.pop(name) for name in names if kept.get(name) is not None]
            if found:
                kept[key] = found[0]
        return kept

    @model_validator(mode="after")
    def _no_two_that_exclude_each_other(self) -> Self:
        if self.fp16 and self.bf16:
            raise PydanticCustomError("two_precisions", "fp16 and bf16 are both true; expected at most one of them")
        if self.deepspeed and self.fsdp:
            raise PydanticCustomError("two_shardings", "deepspeed and fsdp are both given; expected one of them")
        if self.allow_multi_gpu is False and (self.nproc_per_node or 1) > 1:
            raise PydanticCustomError(
                "one_gpu",
                "allow_multi_gpu is false, but nproc_per_node is {ranks}; expected nproc_per_node 1, "
                "or allow_multi_gpu true",
                {"ranks": self.nproc_per_node},
            )
        return self

    @property
    def deepspeed_stage(self) -> int:
        """ZeRO stage of a DeepSpeed configuration that the worker makes itself."""
        return self.auto_deepspeed_stage or self.zero_stage or 2


class LoraOptions(SpecSection):
    """`lora` (WIRE 4.6).

    Attributes:
        target_modules: names of layers; `all-linear` alone means each linear layer.
        task_type: accepted; the kind of training decides it.
        load_in_4bit: QLoRA: the base model's weights in 4 bits; needs a GPU and bitsandbytes.
    """

    r: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    bias: Annotated[Literal["none", "all", "lora_only"], BeforeValidator(lower)] = "none"
    target_modules: Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    load_in_4bit: bool = False
