"""The folder that vLLM loads: as it lies there, put together from parts, or with LoRA adapters merged into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from executors.errors import BadSpecError, ModelLoadError
from executors.lora.lora_adapters import Adapter, check_base
from executors.lora.lora_merging import write_merged_model
from executors.safetensors_headers import read_headers, read_json_object
from executors.weights_source import WeightsSource

_MERGED: Final = "_merged_vllm_model"
"""WIRE 5.1."""
_ASSEMBLED: Final = "_assembled_vllm_model"
_WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth"})


@dataclass(frozen=True)
class ModelFolders:
    """Hub names or absolute folders.

    Attributes:
        model: configuration and weights.
        tokenizer: tokenizer and, for what lacks in `model`, the base model.
        local: `model`, if it is a folder; a hub model whose files are all in the cache is one. Else it is fetched.
    """

    model: str
    tokenizer: str
    local: Path | None


def require_usable(source: WeightsSource, field: str) -> None:
    """Refuse at once what vLLM would refuse after half a minute.

    Raises:
        BadSpecError: GGUF.
        ModelLoadError: a folder without weights.
    """
    if source.gguf_file:
        raise BadSpecError(
            f"{field} is the GGUF file {source.gguf_file!r}, which vLLM does not load",
            hint="Set spec.enforce_cpu, which runs it with Transformers, or give ordinary weights.",
        )
    folder = Path(source.location)
    if (
        source.stamp
        and not source.weights_file
        and not any(Path(name).suffix.lower() in _WEIGHT_SUFFIXES for name, size, _ in source.stamp if size)
    ):
        raise ModelLoadError(
            f"{field} is the folder {str(folder)!r}, which holds no weights; expected *.safetensors or *.bin files",
            hint="Check that the model was copied or downloaded as a whole.",
        )


@contextmanager
def ready_folders(
    source: WeightsSource, merged: Sequence[Adapter], load_options: Mapping[str, object], scratch: Path
) -> Iterator[ModelFolders]:
    """Give folders that vLLM can load; those that had to be made are gone afterwards: loaded weights need no files.

    Args:
        source: where the weights come from.
        merged: adapters to merge into them.
        load_options: what tells Transformers which revision, and whether the model's own code may run.
        scratch: the task's folder.

    Raises:
        BadSpecError: an adapter of another model.
        ModelLoadError: parts that do not belong together, damaged files.
    """
    base = source.base or source
    made: list[Path] = []
    try:
        asked = load_options.get("revision")
        revision = asked if isinstance(asked, str) else None
        local = _local(source, revision, whole=True)
        local_base = _local(base, revision, whole=base is source)
        # The folder says exactly which revision; by its name alone vLLM would take the newest.
        folders = ModelFolders(str(local or source.location), str(local_base or base.location), local)
        if source.weights_file:
            assembled = scratch / _ASSEMBLED
            made.append(assembled)
            _assemble(source, local_base, assembled)
            folders = ModelFolders(str(assembled), folders.tokenizer, assembled)
        if merged:
            tensors = read_headers(folders.local) if folders.local is not None else {}
            for adapter in merged:
                check_base(adapter, tensors, base.location)
            target = scratch / _MERGED
            made.append(target)
            shutil.rmtree(target, ignore_errors=True)
            write_merged_model(folders.model, load_options, folders.tokenizer, merged, target)
            folders = ModelFolders(str(target), folders.tokenizer, target)
        yield folders
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def _local(source: WeightsSource, revision: str | None, *, whole: bool) -> Path | None:
    if source.stamp:
        return Path(source.location)
    folder = cached_folder(source.location, revision)
    return folder if folder is not None and (_is_whole(folder) or not whole) else None


def cached_folder(name: str, revision: str | None) -> Path | None:
    """A hub model's folder in the local cache, perhaps with some of its files only; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: a download may have been cut off, and a tokenizer alone makes a folder too."""
    indices = list(folder.glob("*.index.json"))
    if not indices:
        return any(file.suffix.lower() in _WEIGHT_SUFFIXES for file in folder.iterdir())
    named = [read_json_object(index).get("weight_map") for index in indices]
    return all(
        isinstance(names, dict) and all(isinstance(name, str) and (folder / name).exists() for name in names.values())
        for names in named
    )


def _assemble(source: WeightsSource, base: Path | None, folder: Path) -> None:
    """A folder with the base's configuration and a lone weights file, as links."""
    if source.base is None or source.weights_file is None:
        raise RuntimeError("a lone weights file comes with a base")
    if base is None:
        raise ModelLoadError(
            f"spec.model.source.identifier {source.base.location!r} is not in the local cache; its configuration "
            "has to complete the weights of spec.checkpoint.load",
            hint="Give a folder, or run a task with this model first.",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in base.iterdir():
        if file.is_file() and file.suffix.lower() not in _WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            (folder / file.name).symlink_to(file)
    (folder / "model.safetensors").symlink_to(Path(source.location) / source.weights_file)
