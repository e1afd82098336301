"""Which checkpoint a training run continues from: marks on whole ones, and what is done with the others.

A trainer writes a checkpoint file by file, so a folder by itself does not tell whether all of it is there. Here the
last file to appear is `complete.json`, written once everything else is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, JsonValue, ValidationError

from executors.contract import EnginePolicy
from executors.errors import BadSpecError, ExecutorError, ModelLoadError
from executors.local_paths import confine, find_local
from executors.model_spec import CHECKPOINT
from executors.safetensors_headers import read_headers, read_json_object
from executors.training.spec.trainer_specs import TrainingSpec
from executors.training.spec.training_data_spec import JSONL
from executors.training.training_job import ResumePoint

COMPLETE_FILE: Final = "complete.json"
CHECKPOINTS: Final = "checkpoints"
TRAINER_STATE: Final = "trainer_state.json"
_ADAPTER_FILE: Final = "adapter_config.json"
_NAME: Final = re.compile(r"checkpoint-(\d{1,15})", re.ASCII)
_MOST_MARK_BYTES: Final = 4 * 1024**2
MOST_STATE_BYTES: Final = 256 * 1024**2
_READ_WHOLE: Final = 512 * 1024**2
_MOST_FILES: Final = 20_000
_MOST_STEPS: Final = 10**15
_BLOCK: Final = 64 * 1024
_SAMPLES: Final = 256
_MOST_NAMED: Final = 3

_SECTIONS: Final = ("model", "checkpoint", "data", "training", "lora", "generation", "reward_model", "reward_functions")
_WITHOUT_EFFECT: Final = frozenset(
    {
        "resume", "oom_retry", "report_to", "logging_steps", "save_steps", "save_strategy", "save_total_limit",
        "save_model", "save_safetensors", "ddp_find_unused_parameters", "allow_multi_gpu", "visible_devices",
        "nproc_per_node", "primary_gpu",
    }
)  # fmt: skip
"""Keys of `training` that do not decide the weights. What decides the checkpoints' format (DeepSpeed, FSDP) does."""
_HOW_TO_FETCH: Final = frozenset(
    {"headers", "download_headers", "timeout_sec", "timeoutSec", "timeout", "download_timeoutSec"}
)
_WHERE_IT_LIES: Final = frozenset(
    {"path", "worker_path", "url", "download_url", "uri", "base_url", "task_id", "taskId", "filename", "type", "sha256"}
)


class CompleteMark(BaseModel):
    """`complete.json` of a checkpoint.

    Attributes:
        identity: of the run that wrote it, by `identity_of`.
        files: relative names of all files, with their sizes.
    """

    identity: str
    step: int
    files: dict[str, int]


@dataclass(frozen=True)
class ResumeDecision:
    """Where a run starts.

    Attributes:
        point: the checkpoint to continue from; None: from the beginning.
        note: what was found and dropped, for the task's log; may be empty.
    """

    point: ResumePoint | None
    note: str = ""


def identity_of(
    spec: TrainingSpec, inputs: Mapping[str, Path], policy: EnginePolicy | None = None, *, ranks: int = 1
) -> str:
    """Digest of all that decides the weights of a run; it holds no secret.

    Files count by their content, wherever they lie, so that an input fetched once more stays the same.

    Args:
        spec: the spec.
        inputs: files that the daemon has found or fetched.
        policy: if given, a model or a data set that lies on this worker counts by its content too.
        ranks: how many processes train together; with another number a step takes another number of rows.
    """
    sections = spec.model_dump(mode="json", include=set(_SECTIONS))
    training = sections.get("training")
    if isinstance(training, dict):
        sections["training"] = {key: value for key, value in training.items() if key not in _WITHOUT_EFFECT}
    sections = {name: _without(section, _HOW_TO_FETCH) for name, section in sections.items()}
    if CHECKPOINT in inputs:
        sections["checkpoint"] = _without(sections.get("checkpoint"), _WHERE_IT_LIES)
    data = sections.get("data")
    if JSONL in inputs and isinstance(data, dict):
        rest = {key: value for key, value in data.items() if key not in {"jsonl", "jsonl_path"}}
        sections["data"] = {**rest, "jsonl": _without(data.get("jsonl"), _WHERE_IT_LIES)}
    files = dict(inputs) | (_named_files(spec, policy) if policy else {})
    stamps = {name: _stamp(path) for name, path in files.items()}
    known = {"kind": spec.kind, "spec": sections, "files": stamps, "ranks": ranks}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def mark_complete(folder: Path, identity: str, step: int) -> None:
    """Mark a checkpoint as whole, after everything in it has reached the disk.

    Raises:
        OSError: it cannot be written; then the folder counts as cut off.
    """
    mark = folder / COMPLETE_FILE
    mark.unlink(missing_ok=True)
    files = dict(_files_in(folder))
    sync_tree(folder)
    temporary = folder / f".{COMPLETE_FILE}.new"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(CompleteMark(identity=identity, step=step, files=files).model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(mark)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    sync_folder(folder.parent)


def last_complete(checkpoints_dir: Path, identity: str, *, below: int | None = None) -> ResumePoint | None:
    """The furthest whole checkpoint of this run, or the furthest before some step; None if there is none."""
    for step, folder in sorted(_checkpoints_in(checkpoints_dir), reverse=True):
        if (below is None or step < below) and _is_whole(folder, identity, step):
            return ResumePoint(path=folder, step=step)
    return None


def prepare_resume(out_dir: Path, identity: str, spec: TrainingSpec, policy: EnginePolicy) -> ResumeDecision:
    """Decide where a run starts, and clear `out_dir/checkpoints` of folders that it must not continue from.

    Args:
        out_dir: the task's folder.
        identity: of this run.
        spec: tells whether to resume, and from where.
        policy: confines `training.resume_from_path`.

    Raises:
        BadSpecError: `training.resume_from_path` may not be read or is no whole checkpoint.
    """
    checkpoints = out_dir / CHECKPOINTS
    wanted = _asked_point(spec, policy)
    own = last_complete(checkpoints, identity) if spec.training.resume == "auto" else None
    kept = {point.path.resolve() for point in (own, wanted) if point}
    dropped = []
    for step, folder in sorted(_checkpoints_in(checkpoints)):
        whole = own is not None and _is_whole(folder, identity, step)
        if not whole and not any(path.is_relative_to(folder.resolve()) for path in kept):
            dropped.append(folder.name)
            _remove(folder)
    return ResumeDecision(own or wanted, _note(own, wanted, dropped, spec))


def sync_tree(folder: Path) -> None:
    """Bring all files and folders below a folder, and itself, to the disk."""
    for name, _ in _files_in(folder):
        sync_folder(folder / name)
    for inner, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(inner))


def _note(own: ResumePoint | None, wanted: ResumePoint | None, dropped: list[str], spec: TrainingSpec) -> str:
    sentences = []
    if own:
        sentences.append(f"continues from {own.path.name}, the last whole checkpoint of this task")
    elif wanted:
        sentences.append(f"continues from step {wanted.step} of {wanted.path} (training.resume_from_path)")
    if dropped:
        shown = ", ".join(dropped[:_MOST_NAMED]) + (
            f" and {len(dropped) - _MOST_NAMED} more" * (len(dropped) > _MOST_NAMED)
        )
        why = "training.resume is never" if spec.training.resume == "never" else "cut off, or of another run"
        sentences.append(f"removed {shown} ({why})")
    return "; ".join(sentences)


def _asked_point(spec: TrainingSpec, policy: EnginePolicy) -> ResumePoint | None:
    """The checkpoint that `training.resume_from_path` names; None for an adapter that lora_sft only starts from."""
    field = "spec.training.resume_from_path"
    if not spec.training.resume_from_path:
        return None
    folder = confine(spec.training.resume_from_path, field, policy)
    if not folder.is_dir():
        raise BadSpecError(f"{field} is the file {str(folder)!r}; expected a checkpoint folder")
    if not (folder / TRAINER_STATE).exists():
        if spec.kind == "lora_sft" and (folder / _ADAPTER_FILE).exists():
            return None
        raise BadSpecError(
            f"{field} is {str(folder)!r}, which has no {TRAINER_STATE}; expected a trainer's checkpoint folder",
            hint="Give a folder such as checkpoints/checkpoint-100; to start from mere weights use checkpoint.load.",
        )
    try:
        step = read_json_object(folder / TRAINER_STATE, MOST_STATE_BYTES).get("global_step")
        has_weights = (
            bool(read_headers(folder)) or any(folder.glob("pytorch_model*")) or any(folder.glob("global_step*"))
        )
    except ModelLoadError as error:
        raise BadSpecError(f"{field} is a checkpoint that was cut off: {error.message}", hint=_CUT_OFF_HINT) from error
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MOST_STEPS:
        raise BadSpecError(f"{field}: {TRAINER_STATE} has global_step {step!r:.100}; expected a number of steps")
    missing = _what_lacks(folder) if has_weights else "weights"
    if missing:
        raise BadSpecError(f"{field} is {str(folder)!r}, a checkpoint that lacks {missing}", hint=_CUT_OFF_HINT)
    pickled = next((path for pattern in _READ_BY_PICKLE for path in folder.glob(pattern)), None)
    if pickled and not policy.allow_remote_code:
        raise BadSpecError(
            f"{field} is a checkpoint of DeepSpeed or FSDP: {pickled.relative_to(folder)} may run code when it is "
            "read, and this worker runs no code that comes with files (WORKER_ALLOW_REMOTE_CODE)",
            hint="Sending the task itself again continues it from its own checkpoints; to start from mere weights use "
            "checkpoint.load.",
        )
    return ResumePoint(path=folder, step=step)


_CUT_OFF_HINT: Final = "Give an earlier checkpoint folder; to start from mere weights use checkpoint.load."


_READ_BY_PICKLE: Final = ("global_step*", ".metadata", "*/.metadata")
"""DeepSpeed's folders, and the index of PyTorch's distributed checkpoints: their readers unpickle whatever is there."""


def _what_lacks(folder: Path) -> str:
    """What a checkpoint lacks that its own mark names; without a mark, the optimizer's state."""
    mark = _read_mark(folder)
    if mark:
        return next((name for name, size in mark.files.items() if _size(folder, name) != size), "")
    states = ("optimizer*", "global_step*", "pytorch_model_fsdp*")
    return "" if any(any(folder.glob(pattern)) for pattern in states) else "the optimizer's state (optimizer.pt)"


def _is_whole(folder: Path, identity: str, step: int) -> bool:
    mark = None if folder.is_symlink() else _read_mark(folder)
    return (
        mark is not None
        and mark.identity == identity
        and mark.step == step
        and TRAINER_STATE in mark.files
        and all(_size(folder, name) == size for name, size in mark.files.items())
    )


def _read_mark(folder: Path) -> CompleteMark | None:
    try:
        if _size(folder, COMPLETE_FILE) not in range(_MOST_MARK_BYTES):
            return None
        return CompleteMark.model_validate_json((folder / COMPLETE_FILE).read_bytes(), strict=True)
    except (OSError, ValidationError):  # not readable means not whole
        return None


def _size(folder: Path, name: str) -> int:
    """Size of a regular file that lies in a folder; -1 for anything else, links and what lies outside included."""
    path = folder / name
    try:
        facts = path.lstat()
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # not there; a null character in the name
        return -1
    return facts.st_size if inside and stat.S_ISREG(facts.st_mode) else -1


def _checkpoints_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of everything that a trainer would take for a checkpoint, links too."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in list(folder.iterdir()):
            matched = _NAME.fullmatch(entry.name)
            if matched:
                yield int(matched[1]), entry


def _remove(entry: Path) -> None:
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink(missing_ok=True)
        return
    (entry / COMPLETE_FILE).unlink(
        missing_ok=True
    )  # first: a removal that is cut off must not leave a whole-looking one
    shutil.rmtree(entry)


def _files_in(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative names and sizes of the regular files below a folder, in order."""
    for inner, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(inner, name)
            facts = path.lstat()
            if stat.S_ISREG(facts.st_mode):
                yield path.relative_to(folder).as_posix(), facts.st_size


def sync_folder(path: Path) -> None:
    """Bring a file, or a folder's list of entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without(value: JsonValue, keys: frozenset[str]) -> JsonValue:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return value


def _named_files(spec: TrainingSpec, policy: EnginePolicy) -> dict[str, Path]:
    """Models and data sets on this worker that the spec names. What may not be read is refused later, by its reader."""
    reward_model = getattr(spec, "reward_model", None)
    named = {
        "model": spec.model.source.identifier,
        "dataset": spec.data.dataset_name,
        "reward_model": reward_model.identifier if reward_model else None,
    }
    found = {}
    for name, value in named.items():
        with contextlib.suppress(ExecutorError):
            path = find_local(value, name, policy) if value else None
            if path:
                found[name] = path
    return found


def _stamp(path: Path) -> list[tuple[str, int, str]]:
    """Names, sizes and digests of a file, or of the files of a folder."""
    files = [("", path)] if path.is_file() else [(name, path / name) for name in _linked_files(path)]
    sizes = [_size_of(file) for _, file in files]
    share = _READ_WHOLE if sum(sizes) <= _READ_WHOLE else _READ_WHOLE // len(files)
    return [
        (name or file.suffix, size, _digest(file, size, share)) for (name, file), size in zip(files, sizes, strict=True)
    ]


def _linked_files(folder: Path) -> list[str]:
    """Relative names of the files below a folder, and of links to files: a hub's cache consists of them."""
    paths = (Path(inner, name) for inner, _, names in os.walk(folder) for name in names)
    found = list(itertools.islice((path for path in paths if path.is_file()), _MOST_FILES + 1))
    if len(found) > _MOST_FILES:
        raise BadSpecError(
            f"{str(folder)!r} has more than {_MOST_FILES} files; expected the folder of one model or one data set"
        )
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it has vanished; whoever needs it will say so
        return 0


def _digest(file: Path, size: int, share: int) -> str:
    """Digest of a file's content; where it is larger than its share, blocks all over it count.

    No more than `size` is read: some files, such as those of /proc, never come to an end.
    """
    blocks = -(-size // _BLOCK) if size <= share else max(2, min(_SAMPLES, share // _BLOCK))
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            for block in range(blocks):
                place = block * _BLOCK if size <= share else (size - _BLOCK) * block // (blocks - 1)
                opened.seek(max(place, 0))
                digest.update(opened.read(_BLOCK))
    except OSError:  # whoever needs it will say so
        return ""
    return digest.hexdigest()
