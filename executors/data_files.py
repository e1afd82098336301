"""Opens a data set: one of the hub, or local files.

Local files are found here and handed to `datasets` one by one. A folder is never given to it as a whole: the metadata
in a folder's README can point the library at files elsewhere.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from executors.contract import EnginePolicy
from executors.errors import BadDataError, BadSpecError, MissingLibraryError
from executors.json_nesting import DEEPEST, find_deep_line
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
class DataSource:
    """Which data set.

    Attributes:
        field: the spec's key that names it, for error texts.
        name: a hub name, or a path to a file or folder.
        config: the configuration of a hub data set; None: its only one.
        split: with the library's slice syntax.
        revision: of a hub data set; None: the newest.
    """

    field: str
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


class Rows(Protocol):
    """The few things of `datasets.Dataset` that are used."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def features(self) -> Mapping[str, object]: ...
    def select_columns(self, column_names: list[str]) -> Rows: ...
    def select(self, indices: Sequence[int]) -> Rows: ...
    def iter(self, batch_size: int) -> Iterator[dict[str, list[object]]]: ...
    def shuffle(self, seed: int) -> Rows: ...
    def shard(self, num_shards: int, index: int, contiguous: bool) -> Rows: ...  # noqa: FBT001 - the library's signature
    def __len__(self) -> int: ...
    def to_list(self) -> list[dict[str, object]]: ...


def open_source(source: DataSource, policy: EnginePolicy, cache: str) -> Rows:
    """Open a data set.

    Args:
        source: which one.
        policy: where files may be read from.
        cache: an existing folder for the temporary copy of local files; keep it while the rows are in use.

    Raises:
        BadSpecError: a path outside the allowed roots, a folder without data files.
        BadDataError: it cannot be found or read.
        MissingLibraryError: `datasets` is not installed.
    """
    local = find_local(source.name, source.field, policy)
    return _load_hub(source) if local is None else _load_files(local, source, policy, cache)


def _load_hub(source: DataSource) -> Rows:
    if source.name in _kinds_of_files():
        raise BadSpecError(
            f"{source.field} is {source.name!r}, which is a kind of files and no data set; expected a hub name, or the "
            "path of a file or folder",
            hint="The library would read whatever files lie where this worker runs.",
        )
    return _load(
        source,
        hint="Check the name, the configuration and the split; without network only data sets in the local cache work "
        "(HF_HUB_OFFLINE). A file of your own must lie below WORKER_ALLOWED_ROOTS.",
        path=source.name,
        name=source.config,
        revision=source.revision,
    )


def _load_files(local: Path, source: DataSource, policy: EnginePolicy, cache: str) -> Rows:
    files = _files_of(local, source, policy)
    suffix = next(iter(files.values()))[0].suffix.lower()
    if _BUILDERS[suffix] == "json":
        _refuse_deep([path for paths in files.values() for path in paths], source)
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return _load(
        source,
        hint="Check that the file is whole and of the kind its suffix says, and check the split.",
        path=_BUILDERS[suffix],
        data_files={split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()},
        cache_dir=cache,
        **options,
    )


def _kinds_of_files() -> frozenset[str]:
    """Names that `datasets` takes for a kind of files."""
    try:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    except ImportError:  # the library is missing, which is told when it is used
        return frozenset(_BUILDERS.values())
    return frozenset(_PACKAGED_DATASETS_MODULES)


def _refuse_deep(files: Sequence[Path], source: DataSource) -> None:
    for path in files:
        line = find_deep_line(path)
        if line is not None:
            raise BadDataError(
                f"{source.field} {shown(source.name)}: line {line} of {path.name!r} nests lists and objects more than "
                f"{DEEPEST} deep; expected fewer"
            )


def _load(source: DataSource, *, hint: str, **options: object) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise MissingLibraryError(
            f"{source.field} needs the library 'datasets': {error}",
            hint="Install the extra on the worker: uv sync --inexact --extra inference.",
        ) from error
    datasets.disable_progress_bars()
    try:
        loaded: Rows = datasets.load_dataset(split=source.split, **options)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the library raises many kinds, and each of them is about the data
        cause = error.__cause__ or error
        raise BadDataError(
            f"{source.field} {shown(source.name)} (split {source.split!r}) cannot be read: "
            f"{type(cause).__name__}: {without_url_secrets(str(cause))}",
            hint=hint,
        ) from error
    return loaded


def _files_of(local: Path, source: DataSource, policy: EnginePolicy) -> dict[str, list[Path]]:
    """Return the files of each split that an expression such as `train[:10]+test` names."""
    if local.is_file():
        if local.suffix.lower() not in _BUILDERS:
            raise BadSpecError(
                f"{source.field} is {str(local)!r}; expected a file that ends in {', '.join(sorted(_BUILDERS))}"
            )
        return {_split_names(source.split)[0]: [local]}
    splits = {
        path: _split_of(path.relative_to(local))
        for path in sorted(local.rglob("*"))
        if path.suffix.lower() in _BUILDERS
        and path.is_file()  # opening a named pipe would wait for a writer
        and path.name not in _DESCRIPTIONS
        and not any(part.startswith((".", "_")) for part in path.relative_to(local).parts)
    }
    chosen = {name: _of_split(splits, name) for name in _split_names(source.split)}
    missing = [name for name, paths in chosen.items() if not paths]
    if missing:
        raise BadSpecError(
            f"{source.field} is the folder {str(local)!r}, which has no data files for split {missing[0]!r}; "
            f"it has the splits: {', '.join(sorted({name or 'train' for name in splits.values()})) or 'none'}",
            hint=f"Data files end in {', '.join(sorted(_BUILDERS))}.",
        )
    kinds = sorted({path.suffix.lower() for paths in chosen.values() for path in paths})
    if len(kinds) > 1:
        raise BadSpecError(
            f"{source.field} is the folder {str(local)!r}, which mixes {', '.join(kinds)}; expected one kind",
            hint="Name one file, or part the kinds into folders.",
        )
    # A link inside the folder may lead out of it.
    return {name: [confine(path, source.field, policy) for path in paths] for name, paths in chosen.items()}


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
