"""`data.type: dataset`: cuts out the rows of a data set that a task asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from executors.contract import EnginePolicy
from executors.data_files import DataSource, open_source
from executors.errors import BadDataError, BadSpecError
from executors.inference.prompt_spec import DataSection, ShardSection
from executors.secret_masking import shown


@dataclass(frozen=True)
class Table:
    """The rows of a task, in memory.

    Attributes:
        prompt_column: the column that holds the prompts.
        metadata_aliases: each column that becomes metadata, and the key it gets there.
        rows: at least one; only the columns above.
    """

    prompt_column: str
    metadata_aliases: Mapping[str, str]
    rows: tuple[Mapping[str, object], ...]


def open_dataset(data: DataSection, shard: ShardSection, policy: EnginePolicy, scratch: Path) -> Table:
    """Read the rows of `data.url`: split, then shuffled, then the shard.

    Args:
        data: the section `data` of type `dataset`.
        shard: which part to take.
        policy: where files may be read from.
        scratch: an existing folder for the temporary copy of local files.

    Raises:
        BadSpecError: a path outside the allowed roots, a folder without data files.
        BadDataError: the data set cannot be found or read.
        MissingLibraryError: `datasets` is not installed.
    """
    url = data.url or ""
    source = DataSource("spec.data.url", url, data.name, data.split, data.revision)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".dataset-") as cache:
        dataset = open_source(source, policy, cache)
        column = _prompt_column(dataset.column_names, data)
        aliases = _metadata_aliases(dataset.column_names, data)
        dataset = dataset.select_columns(list(dict.fromkeys([column, *aliases])))
        if data.shuffle:
            dataset = dataset.shuffle(seed=data.seed)
        rows: tuple[dict[str, object], ...] = ()
        if shard.index < len(dataset):  # with more shards than rows, the last ones are empty: `shard` cannot do that
            part = dataset.shard(num_shards=shard.total, index=shard.index, contiguous=shard.contiguous)
            rows = tuple(part.to_list())
    if not rows:
        raise BadDataError(
            f"spec.data.url {shown(url)} gives no rows (split {data.split!r}, shard {shard.index} of {shard.total}); "
            "expected at least one",
            hint="Check the split, the shard and the file.",
        )
    return Table(prompt_column=column, metadata_aliases=aliases, rows=rows)


def _prompt_column(columns: Sequence[str], data: DataSection) -> str:
    if data.column is not None:
        return _existing(data.column, "spec.data.column", columns, data)
    if len(columns) == 1:
        return columns[0]
    if "text" in columns:
        return "text"
    raise BadSpecError(
        f"spec.data.column is missing; expected one of the columns of {shown(data.url or '')}: {', '.join(columns)}",
        hint="Name the column that holds the prompts.",
    )


def _metadata_aliases(columns: Sequence[str], data: DataSection) -> dict[str, str]:
    aliases = {name: name for name in columns} if data.metadata_include_all else {}
    chosen = data.metadata_columns
    named = chosen if isinstance(chosen, dict) else {name: name for name in chosen}
    for source, alias in named.items():
        aliases[_existing(source, "spec.data.metadata_columns", columns, data)] = alias
    return aliases


def _existing(name: str, key: str, columns: Sequence[str], data: DataSection) -> str:
    if name not in columns:
        raise BadSpecError(f"{key} names {name!r}, but {shown(data.url or '')} has the columns {', '.join(columns)}")
    return name
