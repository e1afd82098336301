"""`data` of the kinds of training (WIRE 4.4): where the rows come from and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, JsonValue, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from executors.inference.prompt_spec import ChatMessage, PromptItem
from executors.input_spec import InputRequest, JsonlSource
from executors.task_spec import SpecSection, as_list

JSONL: Final = "data.jsonl"
"""Name of the JSONL file among a task's inputs."""

Rows = Literal["jsonl", "dataset", "inline"]
"""Where the rows come from: a JSONL file, a data set, or what stands in the spec."""

Column = Annotated[str, StringConstraints(min_length=1)]

_OF_GENERATION = frozenset(
    {
        "type", "url", "items", "metadata", "items_metadata", "name", "column", "buffer_size", "metadata_columns",
        "metadata_include_all", "template",
    }
)  # fmt: skip
"""Keys of a text generation task's `data`: leftovers of a base spec, dropped without a word."""


def _path_as_object(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class TextJsonl(JsonlSource):
    """`data.jsonl` of texts; the keys of a line may also be named in `data` itself."""

    text_field: Column | None = None
    prompt_field: Column | None = None
    response_field: Column | None = None
    messages_field: Column | None = None
    separator: str | None = None


class PreferenceJsonl(JsonlSource):
    """`data.jsonl` of preferences."""

    prompt_field: Column | None = None
    chosen_field: Column | None = None
    rejected_field: Column | None = None


class PromptJsonl(JsonlSource):
    """`data.jsonl` of prompts."""

    query_field: Column | None = None
    response_field: Column | None = None


class TextColumns(NamedTuple):
    """Keys of a JSONL line of texts, as far as they are named anywhere; None: not named."""

    text: str | None
    prompt: str | None
    response: str | None
    messages: str | None
    separator: str


class PreferenceColumns(NamedTuple):
    """Keys of a JSONL line, or columns, of preferences."""

    prompt: str
    chosen: str
    rejected: str


class PromptColumns(NamedTuple):
    """Keys of a JSONL line of prompts; `response` is kept for reward functions where it is named."""

    query: str
    response: str | None


class TrainingData(SpecSection):
    """What all kinds share. Of several sources one counts: the JSONL file, else `dataset_name`, else inline rows.

    Attributes:
        dataset_name: a hub name, or a path to a json, jsonl, csv, parquet or arrow file or to a folder of such files.
        config_name: configuration of a hub data set.
        max_samples: only so many rows, after shuffling.
        shuffle: shuffle the rows before `max_samples` cuts them (the trainer shuffles in any case).
        jsonl_path: short for `jsonl: {path: …}`; not read where `jsonl` is given.

    Raises:
        pydantic.ValidationError: there is no source of rows.
    """

    inline: ClassVar[tuple[str, ...]] = ("prompts",)
    """Keys that hold rows in the spec itself, the first that is given counts."""

    dataset_name: Annotated[str, StringConstraints(strip_whitespace=True)] | None = None
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    trust_remote_code: bool = False
    max_samples: int | None = Field(default=None, ge=1)
    shuffle: bool = False
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    jsonl: Annotated[JsonlSource | None, BeforeValidator(_path_as_object)] = None
    jsonl_path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_leftovers(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if key not in _OF_GENERATION or key in cls.model_fields}

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        if not self.sources:
            raise PydanticCustomError(
                "no_rows",
                "names no rows to train on; expected one of jsonl, jsonl_path, dataset_name, {inline}",
                {"inline": ", ".join(self.inline)},
            )
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys that name rows, in the order in which they count: the first is read, the others are not."""
        return tuple(key for key in ("jsonl", "jsonl_path", "dataset_name", *self.inline) if getattr(self, key))

    @property
    def rows(self) -> Rows:
        """Where the rows come from."""
        first = self.sources[0]
        return "jsonl" if first.startswith("jsonl") else "dataset" if first == "dataset_name" else "inline"

    @property
    def shown_name(self) -> str:
        """The rows' source for people: the data set's name, or the key."""
        return self.dataset_name or "" if self.rows == "dataset" else f"data.{self.sources[0]}"

    def inputs(self) -> tuple[InputRequest, ...]:
        """The JSONL file, where there is one, as `JSONL`."""
        source = self.jsonl or (JsonlSource(path=self.jsonl_path) if self.jsonl_path else None)
        return (source.request(JSONL),) if source else ()

    def _named(self, key: str) -> Any:  # noqa: ANN401 - the value of whichever field it is
        """A key of the JSONL file: from `jsonl`, else from `data`, there only where the task gives it."""
        inner = getattr(self.jsonl, key, None)
        return inner if inner is not None else getattr(self, key) if key in self.model_fields_set else None


class TextData(TrainingData):
    """`data` of sft and lora_sft: texts, prompts with responses, or conversations.

    Attributes:
        prompt_column: with `response_column`: both are joined by `separator`; one of them alone is the text.
        text_field: column of plain texts; in a JSONL file it comes before prompt and response where it is given.
        messages_column: column of conversations; used where it is given, or where the data set has it.
        prompts: plain texts.
        messages: conversations; a list of messages alone is one conversation.
    """

    inline: ClassVar[tuple[str, ...]] = ("messages", "prompts")

    prompt_column: Column | None = None
    response_column: Column | None = None
    separator: str = "\n\n"
    text_field: Column = "text"
    messages_column: Column = "messages"
    prompt_field: Column | None = None
    response_field: Column | None = None
    messages_field: Column | None = None
    prompts: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    messages: tuple[tuple[ChatMessage, ...], ...] = ()
    jsonl: Annotated[TextJsonl | None, BeforeValidator(_path_as_object)] = None

    @model_validator(mode="before")
    @classmethod
    def _one_conversation(cls, value: object) -> object:
        if isinstance(value, Mapping) and isinstance(messages := value.get("messages"), list | tuple) and messages:
            one = all(isinstance(message, Mapping) for message in messages)
            return {**value, "messages": [messages] if one else messages}
        return value

    @property
    def jsonl_columns(self) -> TextColumns:
        """Keys of a line of the JSONL file, as far as the task names them."""
        separator = self._named("separator")
        text, prompt, response, messages = (
            self._named(f"{each}_field") for each in ("text", "prompt", "response", "messages")
        )
        if not (text or prompt or response or messages):  # then those of a data set's columns are the next best
            prompt, response, messages = self.prompt_column, self.response_column, self._named("messages_column")
        return TextColumns(text, prompt, response, messages, self.separator if separator is None else separator)


class Preference(SpecSection):
    """One entry of `data.preferences`: texts, or lists of messages. Reward models need no prompt."""

    prompt: PromptItem | None = None
    chosen: PromptItem
    rejected: PromptItem


class PreferenceData(TrainingData):
    """`data` of dpo and reward: a prompt, the better and the worse answer."""

    inline: ClassVar[tuple[str, ...]] = ("preferences",)

    prompt_column: Column = "prompt"
    chosen_column: Column = "chosen"
    rejected_column: Column = "rejected"
    prompt_field: Column | None = None
    chosen_field: Column | None = None
    rejected_field: Column | None = None
    preferences: tuple[Preference, ...] = ()
    jsonl: Annotated[PreferenceJsonl | None, BeforeValidator(_path_as_object)] = None

    @property
    def jsonl_columns(self) -> PreferenceColumns:
        """Keys of a line of the JSONL file."""
        return PreferenceColumns(
            prompt=self._named("prompt_field") or self.prompt_column,
            chosen=self._named("chosen_field") or self.chosen_column,
            rejected=self._named("rejected_field") or self.rejected_column,
        )


class PromptData(TrainingData):
    """`data` of ppo and grpo: prompts; further columns are kept for reward functions.

    Attributes:
        prompt_column: absent: `prompt`, or the only column where there is one.
        response_column: accepted; all columns are kept anyway.
        separator: accepted, has no effect.
    """

    prompt_column: Column | None = None
    response_column: Column | None = None
    separator: JsonValue = None
    query_field: Column | None = None
    response_field: Column | None = None
    prompts: Annotated[tuple[PromptItem, ...], BeforeValidator(as_list)] = ()
    jsonl: Annotated[PromptJsonl | None, BeforeValidator(_path_as_object)] = None

    @property
    def jsonl_columns(self) -> PromptColumns:
        """Keys of a line of the JSONL file."""
        return PromptColumns(query=self._named("query_field") or "query", response=self._named("response_field"))
