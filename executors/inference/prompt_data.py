"""`data` (WIRE 4.2) to a list of prompts, for every engine that generates text."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path

from pydantic import JsonValue

from executors.contract import EnginePolicy, JsonObject
from executors.errors import BadDataError
from executors.inference.dataset_rows import Table, open_dataset
from executors.inference.graph_template import is_built_in, render_template
from executors.inference.inference_spec import InferenceSpec
from executors.inference.prompt_spec import ChatMessage, DataSection

RESERVED_METADATA = frozenset({"prompt", "rendered_prompt"})
"""Keys of an item's metadata that the result itself fills (WIRE 5.2)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as the task gave it.

    Attributes:
        text: the plain text; empty for a conversation.
        messages: the conversation; empty for a plain text.
        metadata: what travels with it into the result.
        problem: why it cannot be generated; empty when it can.
    """

    text: str = ""
    messages: tuple[ChatMessage, ...] = ()
    metadata: JsonObject = field(default_factory=dict)
    problem: str = ""

    @property
    def original(self) -> JsonValue:
        """The prompt as it stands in the spec: a string, or the list of messages."""
        return [message_json(message) for message in self.messages] if self.messages else self.text


@dataclass(frozen=True)
class PromptSet:
    """All prompts of one task.

    Attributes:
        prompts: in the order of the data; never empty.
        with_system_prompt: false when the spec's system prompt stays out (graph templates, WIRE 4.2).
        warnings: sentences for the sender.
    """

    prompts: tuple[Prompt, ...]
    with_system_prompt: bool = True
    warnings: tuple[str, ...] = ()


def message_json(message: ChatMessage) -> JsonObject:
    """Return a message as a chat template wants it, with the keys that the spec gave and no others."""
    return message.model_dump(mode="json", exclude_unset=True)


def read_prompts(spec: InferenceSpec, policy: EnginePolicy, scratch: Path) -> PromptSet:
    """Read the prompts of a task, or of a merged child.

    Args:
        spec: the validated spec.
        policy: where files may be read from, and whether remote code may run.
        scratch: an existing folder for temporary files, which are gone afterwards.

    Raises:
        BadSpecError: a path outside the allowed roots, a missing column, an impossible template.
        BadDataError: no rows, unreadable data, missing upstream values.
        MissingLibraryError: `datasets` is not installed.
    """
    data = spec.data
    warnings = []
    if data.jsonl:
        warnings.append(f"spec.data.jsonl has no effect beside spec.data.type {data.type!r}")
    if data.type != "dataset" and spec.shard.total > 1:
        warnings.append(f"spec.shard has no effect with spec.data.type {data.type!r}; it splits data sets only")
    if data.type == "graph_template":
        return _from_template(spec, warnings)
    if data.type == "dataset":
        table = open_dataset(data, spec.shard, policy, scratch)
        prompts = tuple(_from_row(row, position, table) for position, row in enumerate(table.rows))
    else:
        prompts = _from_items(data)
    lost = sorted({key for prompt in prompts for key in RESERVED_METADATA & prompt.metadata.keys()})
    if lost:
        warnings.append(
            f"metadata {', '.join(map(repr, lost))} gives way to the prompt itself in the result; choose another name"
        )
    return PromptSet(prompts=prompts, warnings=tuple(warnings))


def _from_template(spec: InferenceSpec, warnings: list[str]) -> PromptSet:
    template = spec.data.template
    if template is None:  # the spec's validation makes sure of it
        raise BadDataError("spec.data.template is missing; expected it for type 'graph_template'")
    if template.text is not None and is_built_in(template.name):
        warnings.append(
            f"spec.data.template.text has no effect, because {template.name!r} is a built-in template; "
            "give the template another name to use the text"
        )
    text = render_template(template, spec.upstream_results)
    return PromptSet((Prompt(text=text),), template.append_system_prompt, tuple(warnings))


def _from_items(data: DataSection) -> tuple[Prompt, ...]:
    metadata: Sequence[JsonObject] = data.metadata or [{} for _ in data.items]
    return tuple(
        Prompt(text=item, metadata=extra) if isinstance(item, str) else Prompt(messages=item, metadata=extra)
        for item, extra in zip(data.items, metadata, strict=True)
    )


def _from_row(row: Mapping[str, object], position: int, table: Table) -> Prompt:
    cell = row[table.prompt_column]
    metadata = {alias: json_value(row[source]) for source, alias in table.metadata_aliases.items()}
    if cell is None:
        return Prompt(metadata=metadata, problem=f"row {position}: the cell of column {table.prompt_column!r} is null")
    return Prompt(text=cell if isinstance(cell, str) else str(cell), metadata=metadata)


def json_value(cell: object) -> JsonValue:
    """Turn a data set's cell into JSON: dates as ISO text, bytes as base64, NaN and infinity as null."""
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if cell is None or isinstance(cell, int | str):
        return cell
    if isinstance(cell, bytes):
        return base64.b64encode(cell).decode("ascii")
    if isinstance(cell, Mapping):
        return {str(key): json_value(value) for key, value in cell.items()}
    if isinstance(cell, list | tuple):
        return [json_value(value) for value in cell]
    return cell.isoformat() if isinstance(cell, date | time) else str(cell)
