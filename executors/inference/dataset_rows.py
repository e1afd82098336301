"""`data.type: dataset`: opens a hub data set or local files, and cuts out the rows that a task asks for.

Local files are found here and handed to `datasets` one by one. A folder is never given to it as a whole: the metadata
in a folder's README can point the library at files elsewhere.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from executors.contract import EnginePolicy
from executors.errors import BadDataError, BadSpecError, MissingLibraryError
from executors.inference.prompt_spec import DataSection, ShardSection
from executors.local_paths import confine, find_local
from executors.secret_masking import shown, without_url_secrets

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"})
"""What `save_to_disk` writes beside the data."""

_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip


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


class _Dataset(Protocol):
    """The few things of `datasets.Dataset` that are used here."""

    @property
    def column_names(self) -> list[str]: ...
    def select_columns(self, column_names: list[str]) -> _Dataset: ...
    def shuffle(self, seed: int) -> _Dataset: ...
    def shard(self, num_shards: int, index: int, contiguous: bool) -> _Dataset: ...  # noqa: FBT001 - the library's signature
    def __len__(self) -> int: ...
    def to_list(self) -> list[dict[str, object]]: ...


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
    local = find_local(url, "spec.data.url", policy)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".dataset-") as cache:
        dataset = _load_hub(data) if local is None else _load_files(local, data, policy, cache)
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


def _load_hub(data: DataSection) -> _Dataset:
    return _load(
        data,
        hint="Check the name, the configuration and the split; without network only data sets in the local cache work "
        "(HF_HUB_OFFLINE). A file of your own must lie below WORKER_ALLOWED_ROOTS.",
        path=data.url,
        name=data.name,
        revision=data.revision,
    )


def _load_files(local: Path, data: DataSection, policy: EnginePolicy, cache: str) -> _Dataset:
    files = _files_of(local, data.split, policy)
    suffix = next(iter(files.values()))[0].suffix.lower()
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return _load(
        data,
        hint="Check that the file is whole and of the kind its suffix says, and check the split.",
        path=_BUILDERS[suffix],
        data_files={split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()},
        cache_dir=cache,
        **options,
    )


def _load(data: DataSection, *, hint: str, **options: object) -> _Dataset:
    try:
        import datasets
    except ImportError as error:
        raise MissingLibraryError(
            f"spec.data.type 'dataset' needs the library 'datasets': {error}",
            hint="Install the extra on the worker: uv sync --inexact --extra inference.",
        ) from error
    datasets.disable_progress_bars()
    try:
        loaded: _Dataset = datasets.load_dataset(split=data.split, **options)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the library raises many kinds, and each of them is about the data
        cause = error.__cause__ or error
        raise BadDataError(
            f"spec.data.url {shown(data.url or '')} (split {data.split!r}) cannot be read: "
            f"{type(cause).__name__}: {without_url_secrets(str(cause))}",
            hint=hint,
        ) from error
    return loaded


def _files_of(local: Path, split: str, policy: EnginePolicy) -> dict[str, list[Path]]:
    """Return the files of each split that an expression such as `train[:10]+test` names."""
    if local.is_file():
        if local.suffix.lower() not in _BUILDERS:
            raise BadSpecError(
                f"spec.data.url is {str(local)!r}; expected a file that ends in {', '.join(sorted(_BUILDERS))}"
            )
        return {_split_names(split)[0]: [local]}
    splits = {
        path: _split_of(path.relative_to(local))
        for path in sorted(local.rglob("*"))
        if path.suffix.lower() in _BUILDERS
        and path.name not in _DESCRIPTIONS
        and not any(part.startswith((".", "_")) for part in path.relative_to(local).parts)
    }
    chosen = {name: _of_split(splits, name) for name in _split_names(split)}
    missing = [name for name, paths in chosen.items() if not paths]
    if missing:
        raise BadSpecError(
            f"spec.data.url is the folder {str(local)!r}, which has no data files for split {missing[0]!r}; "
            f"it has the splits: {', '.join(sorted({name or 'train' for name in splits.values()})) or 'none'}",
            hint=f"Data files end in {', '.join(sorted(_BUILDERS))}.",
        )
    kinds = sorted({path.suffix.lower() for paths in chosen.values() for path in paths})
    if len(kinds) > 1:
        raise BadSpecError(
            f"spec.data.url is the folder {str(local)!r}, which mixes {', '.join(kinds)}; expected one kind",
            hint="Name one file, or part the kinds into folders.",
        )
    # A link inside the folder may lead out of it.
    return {name: [confine(path, "spec.data.url", policy) for path in paths] for name, paths in chosen.items()}


def _split_names(split: str) -> list[str]:
    return [part.partition("[")[0].strip() or "train" for part in split.split("+")]


def _of_split(splits: Mapping[Path, str], split: str) -> list[Path]:
    if split == "all" or (split == "train" and not any(splits.values())):
        return list(splits)  # where nothing is named after a split, all of it is the training part
    wanted = _SPLIT_WORDS.get(split, split)
    return [path for path, name in splits.items() if name == wanted]


def _split_of(relative: Path) -> str:
    words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), "")
