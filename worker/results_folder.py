"""A task's folder on disk (WIRE 5.1, 5.3, 5.4): where it lies, and how its files get there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, JsonValue
from pydantic_core import to_json

from orchestrator_client.messages import now_iso

RESULT_FILE: Final = "responses.json"
MANIFEST_FILE: Final = "manifest.json"
LOGS: Final = "logs"
ARTIFACTS: Final = "artifacts"
_ALWAYS: Final = (RESULT_FILE, LOGS, ARTIFACTS)
_CHUNK: Final = 1024**2


class ManifestEntry(BaseModel):
    """One line of the manifest (WIRE 5.3); what is absent is left out of the JSON."""

    name: str
    path: str
    type: Literal["result", "logs", "artifact", "directory"]
    required: bool
    status: Literal["present", "missing"]
    updated_at: str | None = None
    size: int | None = None
    sha256: str | None = None
    file_count: int | None = None


class Manifest(BaseModel):
    """`manifest.json` (WIRE 5.3)."""

    task_id: str
    generated_at: str
    entries: list[ManifestEntry]


def choose_folder(task_id: str, wanted: str | None, results_dir: Path, roots: tuple[Path, ...]) -> tuple[Path, str]:
    """Choose a task's folder (WIRE 5.4).

    Args:
        task_id: a safe id.
        wanted: `output.destination.path` of a local destination, or None.
        results_dir: the default parent, and what relative paths count from.
        roots: folders under which absolute paths are allowed; `results_dir` always is.

    Returns:
        The folder, and a warning if it is not the one that was asked for, else an empty string.
    """
    default = results_dir / task_id
    if wanted is None or not wanted.strip():
        return default, ""
    folder = (results_dir / wanted.strip()).resolve()  # an absolute path replaces results_dir here
    inside = next((root for root in (results_dir, *roots) if folder.is_relative_to(root)), None)
    hidden = inside is not None and any(part.startswith(".") for part in folder.relative_to(inside).parts)
    if inside is None or hidden:
        reason = "a hidden folder" if hidden else "outside RESULTS_DIR and WORKER_ALLOWED_ROOTS"
        return default, f"output.destination.path {wanted!r} is {reason}; the results are in {default}"
    return (folder if folder.name == task_id else folder / task_id), ""


def prepare(folder: Path) -> None:
    """Make a task's folder with `logs/` and `artifacts/`.

    Raises:
        OSError: it cannot be made.
    """
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    (folder / ARTIFACTS).mkdir(exist_ok=True)


def write_result(folder: Path, task_id: str, result: dict[str, JsonValue], required: tuple[str, ...]) -> None:
    """Write `responses.json`, then the manifest. Blocks on the disk: call it in a thread.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    prepare(folder)
    # NaN and infinity become null: no JSON of ours may hold them (WIRE, hard rules).
    content = to_json(result, indent=2, inf_nan_mode="null")
    write_whole(folder / RESULT_FILE, content)
    known = {RESULT_FILE: hashlib.sha256(content).hexdigest()}
    manifest = _manifest(folder, task_id, required, known)
    write_whole(folder / MANIFEST_FILE, manifest.model_dump_json(indent=2, exclude_none=True).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, also after a power cut.

    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _manifest(folder: Path, task_id: str, required: tuple[str, ...], known: dict[str, str]) -> Manifest:
    must = sorted({*_ALWAYS, *(_declared(name) for name in required)} - {"", MANIFEST_FILE})
    present = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    extra = [name for name in present if name not in must and name != MANIFEST_FILE]
    entries = [_entry(folder, name, required=True, known=known) for name in must]
    entries += [_entry(folder, name, required=False, known=known) for name in extra]
    return Manifest(task_id=task_id, generated_at=now_iso(), entries=entries)


def _declared(name: str) -> str:
    return name.strip().removesuffix("/").removeprefix("./")


def _entry(folder: Path, name: str, *, required: bool, known: dict[str, str]) -> ManifestEntry:
    path = folder / name
    entry = ManifestEntry(name=name, path=name, type=_type(name), required=required, status="missing")
    if not path.resolve().is_relative_to(folder.resolve()) or not path.exists():
        return entry  # a declared name like ../x names nothing of this task
    facts = path.stat()
    entry = entry.model_copy(update={"status": "present", "updated_at": _iso(facts.st_mtime)})
    if path.is_dir():
        sizes = [file.lstat().st_size for file in _files(path)]
        return entry.model_copy(update={"size": sum(sizes), "file_count": len(sizes)})
    return entry.model_copy(update={"size": facts.st_size, "sha256": known.get(name) or _digest(path)})


def _type(name: str) -> Literal["result", "logs", "artifact", "directory"]:
    if name == RESULT_FILE:
        return "result"
    if name == LOGS:
        return "logs"
    return "artifact" if name.startswith(f"{ARTIFACTS}/") or Path(name).suffix else "directory"


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat()
