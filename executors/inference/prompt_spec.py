"""`data` and `shard` of a text generation task (WIRE 4.1, 4.2): where the prompts come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from executors.task_spec import SpecSection, as_list, lower

DataType = Literal["list", "dataset", "graph_template"]

_DATA_TYPE_OF_KEY = {"items": "list", "url": "dataset", "template": "graph_template"}


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

    intro: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    role: str = ""
    closing: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()


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

    type: Annotated[DataType, BeforeValidator(lower)]
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
