"""The rows of a training task before anything is made of them: a JSONL file, a data set, or the spec itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from executors.contract import EnginePolicy
from executors.data_files import DataSource, Rows, open_source
from executors.errors import BadDataError
from executors.inference.prompt_data import message_json
from executors.inference.prompt_spec import ChatMessage
from executors.secret_masking import shown
from executors.training.rows.jsonl_rows import JsonlRows
from executors.training.rows.row_cells import Row
from executors.training.spec.training_data_spec import JSONL, PreferenceData, PromptData, TextData, TrainingData

TEXT: Final = "text"
MESSAGES: Final = "messages"
PROMPT: Final = "prompt"
COMPLETION: Final = "completion"
CHOSEN: Final = "chosen"
REJECTED: Final = "rejected"
"""Columns as the trainers want them; rows in the spec have these names from the beginning."""

_BATCH = 64
_PLAIN_FEATURES = frozenset(
    {"Value", "ClassLabel", "Json", "Array2D", "Array3D", "Array4D", "Array5D", "Translation"}
    | {"TranslationVariableLanguages"}
)


class RawRows(Protocol):
    """Rows that can be read in any order."""

    @property
    def name(self) -> str:
        """What they are called in error texts."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """All columns; those of a JSONL file may lack in single lines."""
        ...

    def __len__(self) -> int: ...

    def read(self, order: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the rows at these positions, with at least the wanted columns.

        Returns:
            Each row after the words that say where it stands.
        """
        ...


@dataclass(frozen=True)
class InlineRows:
    """Rows that stand in the spec."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, order: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the rows at these positions, each with its number, counted from 0."""
        del wanted
        for position in order:
            yield f"entry {position}", self.rows[position]


@dataclass(frozen=True)
class DatasetRows:
    """Rows of a data set.

    Attributes:
        rows: as the library opened it.
        unread: columns that hold pictures, sound or the like; they are never decoded, which might open other files.
    """

    name: str
    rows: Rows
    unread: frozenset[str] = field(default=frozenset())

    @property
    def columns(self) -> Sequence[str]:
        """The columns that can be read."""
        return [name for name in self.rows.column_names if name not in self.unread]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, order: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the rows at these positions, each with its number, counted from 0."""
        positions = iter(order)
        for batch in self._batches(list(wanted), order):
            for cells in zip(*(batch[name] for name in wanted), strict=True):
                yield f"row {next(positions)}", dict(zip(wanted, cells, strict=True))

    def _batches(self, wanted: list[str], order: Sequence[int]) -> Iterator[Mapping[str, Sequence[object]]]:
        try:
            yield from self.rows.select_columns(wanted).select(order).iter(batch_size=_BATCH)
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # the library raises many kinds, and each of them is about the data
            raise BadDataError(f"{self.name} cannot be read: {type(error).__name__}: {shown(str(error))}") from error


def open_rows(data: TrainingData, inputs: Mapping[str, Path], policy: EnginePolicy, cache: str) -> RawRows:
    """Open whichever source of rows counts.

    Args:
        data: the section `data`.
        inputs: the files that the spec asked for.
        policy: where files may be read from.
        cache: an existing folder for the temporary copy of local files; keep it while the rows are in use.

    Raises:
        BadSpecError: a path outside the allowed roots, a folder without data files.
        BadDataError: the rows cannot be found or read.
        MissingLibraryError: `datasets` is not installed.
    """
    source = f"spec.data.{data.sources[0]}"
    if data.rows == "jsonl":
        return JsonlRows(inputs[JSONL], source, limit=None if data.shuffle else data.max_samples)
    if data.rows == "inline":
        return _inline(data, source)
    name = data.dataset_name or ""
    rows = open_source(DataSource(source, name, data.config_name, data.split, data.revision), policy, cache)
    unread = frozenset(column for column, feature in rows.features.items() if not _is_plain(feature))
    return DatasetRows(f"{source} {shown(name)} (split {data.split!r})", rows, unread)


def _is_plain(feature: object) -> bool:
    if isinstance(feature, Mapping):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, list | tuple):
        return all(map(_is_plain, feature))
    if type(feature).__name__ in {"List", "LargeList", "Sequence"}:
        return _is_plain(getattr(feature, "feature", None))
    return type(feature).__name__ in _PLAIN_FEATURES


def _inline(data: TrainingData, source: str) -> InlineRows:
    rows: list[Row]
    if isinstance(data, TextData) and data.messages:
        rows = [{MESSAGES: _plain(messages)} for messages in data.messages]
    elif isinstance(data, TextData):
        rows = [{TEXT: text} for text in data.prompts]
    elif isinstance(data, PromptData):
        rows = [{PROMPT: _plain(prompt)} for prompt in data.prompts]
    elif isinstance(data, PreferenceData):
        rows = [
            {key: _plain(value) for key in (PROMPT, CHOSEN, REJECTED) if (value := getattr(each, key)) is not None}
            for each in data.preferences
        ]
    else:
        raise TypeError(f"unknown kind of data: {type(data).__name__}")
    return InlineRows(source, list(dict.fromkeys(key for row in rows for key in row)), rows)


def _plain(item: str | Sequence[ChatMessage]) -> object:
    return item if isinstance(item, str) else [message_json(message) for message in item]
