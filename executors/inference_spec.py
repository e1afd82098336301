"""The spec of `taskType: inference` (WIRE 4.1 to 4.3), for every engine that generates text.

A null counts as absent: merged stage specs use nulls to take a base value back. What this version does not build yet is
refused here, before anything heavy loads, and never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from executors.input_spec import CheckpointLoad, InputRequest
from executors.task_spec import SpecSection, TaskSpec

DataType = Literal["list", "dataset", "graph_template"]
DtypeName = Literal["auto", "float16", "bfloat16", "float32"]

CHECKPOINT: Final = "checkpoint.load"
"""Name of the checkpoint among a task's inputs."""

_DTYPE_ALIASES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_DATA_TYPE_OF_KEY = {"items": "list", "url": "dataset", "template": "graph_template"}


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _full_dtype_name(value: object) -> object:
    lowered = _lower(value)
    return _DTYPE_ALIASES.get(lowered, lowered) if isinstance(lowered, str) else lowered


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _without_empty(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value for value in values if value)


def _not_built(what: str) -> AfterValidator:
    def refuse(value: JsonValue) -> JsonValue:
        if value:
            raise PydanticCustomError(
                "not_supported_yet",
                "{what} is not supported by this version; remove it, or send the task to a worker that supports it",
                {"what": what},
            )
        return value

    return AfterValidator(refuse)


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


class ModelConfig(SpecSection):
    """`model.config`: accepted, has no effect (WIRE 4.1)."""

    fp16: JsonValue = None
    device_map_auto: JsonValue = None


class TransformersOptions(SpecSection):
    """`model.transformers`: how Transformers loads the weights.

    `low_cpu_mem_usage` is accepted; Transformers 5 always loads that way.
    """

    device_map: (
        Annotated[Literal["auto", "balanced", "balanced_low_0", "cuda", "cpu"], BeforeValidator(_lower)] | None
    ) = None
    dtype: Annotated[DtypeName, BeforeValidator(_full_dtype_name)] = "auto"
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


class VllmOptions(SpecSection):
    """`model.vllm`: leftovers for an engine that is not vLLM, so nothing is checked."""

    tensor_parallel_size: JsonValue = None
    gpu_memory_utilization: JsonValue = None
    max_model_len: JsonValue = None
    dtype: JsonValue = None
    download_dir: JsonValue = None
    trust_remote_code: JsonValue = None
    enforce_eager: JsonValue = None
    release_after_run: JsonValue = None


class ModelSection(SpecSection):
    """`model`."""

    source: ModelSource = Field(default_factory=dict, validate_default=True)
    config: ModelConfig = Field(default_factory=ModelConfig)
    transformers: TransformersOptions = Field(default_factory=TransformersOptions)
    vllm: VllmOptions = Field(default_factory=VllmOptions)
    adapters: Annotated[JsonValue, _not_built("a LoRA adapter for inference")] = None


class ChatMessage(SpecSection):
    """One message of a conversation; further keys (`name`, `tool_calls` …) reach the model's chat template."""

    role: str = Field(min_length=1)
    content: str


def _kind_of_item(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "messages" if isinstance(value, list | tuple) else None


def _some_messages(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    if not messages:
        raise PydanticCustomError("no_messages", "has no messages; expected at least one (role and content)")
    return messages


PromptItem = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[ChatMessage, ...], AfterValidator(_some_messages), Tag("messages")],
    Discriminator(
        _kind_of_item,
        custom_error_type="prompt_item",
        custom_error_message="expected a string, or a list of messages with role and content",
    ),
]
"""One entry of `data.items`: a text, or a conversation."""


class GraphColumn(SpecSection):
    """One column of a graph template: `expr` is `stage.path`, or `node` and `path` give the two apart."""

    label: str | None = None
    expr: str | None = None
    node: str | None = None
    path: str = ""
    default: JsonValue = None

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if not (self.expr or self.node):
            raise PydanticCustomError(
                "column_source", "has no source; expected 'expr' (stage.path), or 'node' with 'path'"
            )
        return self


class TemplateOptions(SpecSection):
    """`template.options` of the built-in template."""

    intro: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    role: str = ""
    closing: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()


class GraphTemplate(SpecSection):
    """`data.template` (WIRE 4.2)."""

    name: str = "two_column_briefing"
    columns: tuple[GraphColumn, ...] = ()
    options: TemplateOptions = Field(default_factory=TemplateOptions)
    text: str | None = None
    append_system_prompt: bool = False


class DataSection(SpecSection):
    """`data`: where the prompts come from. Without `type` it follows from `items`, `url` or `template`.

    `buffer_size` is accepted; shuffling here is exact and needs none. Keys of another type are leftovers of a merged
    spec and are ignored.
    """

    type: Annotated[DataType, BeforeValidator(_lower)]
    items: tuple[PromptItem, ...] = ()
    metadata: tuple[dict[str, JsonValue], ...] | None = Field(
        default=None, validation_alias=AliasChoices("metadata", "items_metadata")
    )
    url: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    trust_remote_code: bool = False
    column: str | None = None
    shuffle: bool = False
    seed: int = 42
    buffer_size: JsonValue = None
    metadata_columns: tuple[str, ...] | dict[str, str] = ()
    metadata_include_all: bool = False
    template: GraphTemplate | None = None
    jsonl: JsonValue = None

    @model_validator(mode="before")
    @classmethod
    def _infer_type(cls, value: object) -> object:
        if not isinstance(value, Mapping) or value.get("type") is not None:
            return value
        found = [kind for key, kind in _DATA_TYPE_OF_KEY.items() if value.get(key) is not None]
        if len(found) == 1:
            return {**value, "type": found[0]}
        if value.get("jsonl"):
            raise PydanticCustomError(
                "not_supported_yet",
                "'jsonl' is not supported for inference by this version; use type 'dataset' with the file as 'url'",
            )
        raise PydanticCustomError(
            "data_type",
            "has no 'type'; expected 'list' with 'items', 'dataset' with 'url', or 'graph_template' with 'template'",
        )

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        key = next(key for key, kind in _DATA_TYPE_OF_KEY.items() if kind == self.type)
        if not getattr(self, key):
            raise PydanticCustomError(
                "data_empty",
                "'{key}' is missing or empty; expected it for type '{type}'",
                {"key": key, "type": self.type},
            )
        if self.type == "list" and self.metadata is not None and len(self.metadata) != len(self.items):
            raise PydanticCustomError(
                "metadata_length",
                "'metadata' has {got} entries, expected {expected}: one for each of 'items'",
                {"got": len(self.metadata), "expected": len(self.items)},
            )
        return self


class InferenceOptions(SpecSection):
    """`inference`: how to generate.

    Attributes:
        temperature: 0 means greedy, and so does `do_sample: false`.
        top_k: 0 and -1 mean no limit.
        max_tokens: new tokens for each prompt; `max_new_tokens` wins over it.
        chat: apply the model's chat template to plain strings too.
        batch_size: prompts generated together at most; the engine chooses when absent.
        seed: makes sampling repeatable; absent means a new draw each time.
    """

    system_prompt: str = Field(default="", validation_alias=AliasChoices("system_prompt", "systemPrompt"))
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=50, ge=-1)
    max_tokens: int = Field(default=512, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0)
    do_sample: bool | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_list), AfterValidator(_without_empty)] = ()
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    chat: bool = False
    batch_size: int | None = Field(default=None, ge=1)
    n: JsonValue = None
    logprobs: JsonValue = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.do_sample is False

    @property
    def token_limit(self) -> int:
        """New tokens for each prompt at most."""
        return self.max_new_tokens or self.max_tokens


class ShardSection(SpecSection):
    """`shard`: the part of a data set that this task takes, after shuffling."""

    total: int = Field(default=1, ge=1)
    index: int = Field(default=0, ge=0)
    contiguous: bool = True

    @model_validator(mode="after")
    def _index_within_total(self) -> Self:
        if self.index >= self.total:
            raise PydanticCustomError(
                "shard_index",
                "'index' is {index}, expected 0 to {last}, because 'total' is {total}",
                {"index": self.index, "last": self.total - 1, "total": self.total},
            )
        return self


class ParallelSection(SpecSection):
    """`parallel`: accepted, has no effect (WIRE 4.1)."""

    enabled: JsonValue = None
    max_shards: JsonValue = None


class CheckpointSection(SpecSection):
    """`checkpoint`."""

    load: CheckpointLoad | None = None


class PostprocessSection(SpecSection):
    """`postprocess`."""

    jsonl_export: Annotated[JsonValue, _not_built("postprocess.jsonl_export")] = None


class InferenceSpec(TaskSpec):
    """The spec of a text generation task.

    Raises:
        pydantic.ValidationError: a value is wrong, the model or the data is missing, or something is not built yet.
    """

    model: ModelSection = Field(default_factory=dict, validate_default=True)
    data: DataSection
    inference: InferenceOptions = Field(default_factory=InferenceOptions)
    shard: ShardSection = Field(default_factory=ShardSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    postprocess: PostprocessSection = Field(default_factory=PostprocessSection)

    @model_validator(mode="after")
    def _names_weights(self) -> Self:
        if self.model.source.identifier or self.checkpoint.load:
            return self
        problem = PydanticCustomError(
            "missing_model",
            "is missing; expected a hub name such as 'org/model' or a path. "
            "Set it or checkpoint.load in the task, or VLLM_MODEL or HF_MODEL at the worker",
        )
        line = InitErrorDetails(type=problem, loc=("model", "source", "identifier"), input="")
        raise ValidationError.from_exception_data("InferenceSpec", [line])  # the only way to name a field from here

    def inputs(self) -> tuple[InputRequest, ...]:
        """The weights that `checkpoint.load` names, as `CHECKPOINT`."""
        return (self.checkpoint.load.request(CHECKPOINT),) if self.checkpoint.load else ()

    @property
    def model_name(self) -> str:
        """The model for people: its name, or that of the checkpoint where it has none."""
        load = self.checkpoint.load
        return self.model.source.identifier or (load.shown_name if load else "")

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the task wants code from the model's repository to run."""
        return self.model.source.trust_remote_code or self.model.transformers.trust_remote_code

    @property
    def gpu_limit(self) -> int | None:
        """How many GPUs the task may use at most; None means all."""
        hardware = self.resources.hardware if self.resources else None
        return hardware.gpu.count if hardware and hardware.gpu else None
