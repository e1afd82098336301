"""A task's folder on disk (WIRE 5.1, 5.3, 5.4): where it lies, and how its files get there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import structlog
from pydantic import BaseModel, JsonValue
from pydantic_core import to_json

from executors.inference.partial_results import PARTIAL_FILE
from orchestrator_client.messages import now_iso

RESULT_FILE: Final = "responses.json"
MANIFEST_FILE: Final = "manifest.json"
RESULT_KEY: Final = "result"
LOGS: Final = "logs"
ARTIFACTS: Final = "artifacts"
_ALWAYS: Final = (RESULT_FILE, LOGS, ARTIFACTS)
_CHUNK: Final = 1024**2

log = structlog.get_logger()


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
    try:
        folder = (results_dir / wanted.strip()).resolve()  # an absolute path replaces results_dir here
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long
        return default, f"output.destination.path {wanted[:200]!r} cannot be resolved; the results are in {default}"
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
    try:
        folder.mkdir()
    except FileExistsError:
        pass
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
    for name in (LOGS, ARTIFACTS):
        with contextlib.suppress(FileExistsError):
            (folder / name).mkdir()


@dataclass(frozen=True)
class ResultToWrite:
    """One task's (or merged child's) result.

    Attributes:
        folder: where it goes.
        task_id: whose it is.
        result: becomes `responses.json`.
        required: names that its sender wants to see in the manifest.
        wrapped: whether a copy of it stands under the key `result` too, where an orchestrator that shares the disk
            looks for it (WIRE 3.1).
        digests: SHA-256 of top-level files that are known, so that large ones are read once.
    """

    folder: Path
    task_id: str
    result: dict[str, JsonValue]
    required: tuple[str, ...]
    wrapped: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)


def write_results(results: Sequence[ResultToWrite]) -> list[Exception | None]:
    """Write `responses.json`, then the manifest, of each result; in order, and each file whole or not at all.

    All files are written before the first is synced: one commit of the file system then serves many of them. Blocks on
    the disk: call it in a thread.

    Returns:
        For each result what kept it from being written, or None. Whatever it is, the others are written.
    """
    errors: list[Exception | None] = [None] * len(results)
    staged: list[tuple[int, _StagedFile]] = []
    for number, result in enumerate(results):
        try:
            staged += [(number, file) for file in _stage_result(result)]
        except Exception as error:  # noqa: BLE001 - goes to the caller
            errors[number] = error
    for step in (_StagedFile.sync, _StagedFile.publish):
        for number, file in staged:
            if errors[number] is None:
                try:
                    step(file)
                except Exception as error:  # noqa: BLE001 - goes to the caller
                    errors[number] = error
    for number, file in staged:
        if errors[number] is not None:
            file.discard()
    return errors


def drop_partial(folder: Path) -> None:
    """Delete what a run had finished before its end: the whole result is there now."""
    try:
        (folder / PARTIAL_FILE).unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot delete a partial result", action="results", path=str(folder), error=str(error))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, also after a power cut.

    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    file = _StagedFile(path, content)
    try:
        file.sync()
        file.publish()
    except OSError:
        file.discard()
        raise


class _StagedFile:
    """A file under a temporary name beside its place, until `publish`."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        self._temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            self.discard()
            raise

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def publish(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        self._temporary.rename(self._path)

    def discard(self) -> None:
        """Leave nothing behind, whatever happened before."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _stage_result(result: ResultToWrite) -> list[_StagedFile]:
    prepare(result.folder)
    # NaN and infinity become null: no JSON of ours may hold them (WIRE, hard rules).
    whole = {**result.result, RESULT_KEY: result.result} if result.wrapped else result.result
    content = to_json(whole, indent=2, inf_nan_mode="null")
    responses = _StagedFile(result.folder / RESULT_FILE, content)
    try:
        manifest = _manifest(result, content)
        body = manifest.model_dump_json(indent=2, exclude_none=True).encode()
        return [responses, _StagedFile(result.folder / MANIFEST_FILE, body)]
    except BaseException:
        responses.discard()
        raise


def _manifest(result: ResultToWrite, content: bytes) -> Manifest:
    must = sorted({*_ALWAYS, *(_declared(name) for name in result.required)} - {"", MANIFEST_FILE})
    with os.scandir(result.folder) as found:
        present = {entry.name: entry for entry in found if not entry.name.startswith(".")}
    extra = sorted(present.keys() - {*must, RESULT_FILE, MANIFEST_FILE, PARTIAL_FILE})
    now = now_iso()
    entries = []
    for name in (*must, *extra):
        required = name in must
        if name == RESULT_FILE:
            digest = hashlib.sha256(content).hexdigest()
            entry = ManifestEntry(
                name=name, path=name, type="result", required=True, status="present",
                updated_at=now, size=len(content), sha256=digest,
            )  # fmt: skip
        elif (there := present.get(name)) is not None:
            entry = _entry(Path(there.path), name, required=required, digest=result.digests.get(name))
        elif "/" in name and _confined(result.folder, name):
            entry = _entry(result.folder / name, name, required=required)
        else:
            entry = ManifestEntry(name=name, path=name, type=_type(name), required=required, status="missing")
        entries.append(entry)
    return Manifest(task_id=result.task_id, generated_at=now, entries=entries)


def _declared(name: str) -> str:
    return name.strip().removesuffix("/").removeprefix("./")


def _confined(folder: Path, name: str) -> bool:
    """Whether a declared name with slashes is an existing thing below the folder."""
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, a NUL in the name, a loop of links
        return False
    return path.is_relative_to(folder.resolve())


def _entry(path: Path, name: str, *, required: bool, digest: str | None = None) -> ManifestEntry:
    """Describe something that exists; a link is described, not followed."""
    facts = path.lstat()
    sizes = None
    if stat.S_ISDIR(facts.st_mode):
        sizes = [file.lstat().st_size for file in _files(path)]
    elif stat.S_ISREG(facts.st_mode):
        digest = digest or digest_of(path)
    return ManifestEntry(
        name=name, path=name, type=_type(name), required=required, status="present",
        updated_at=datetime.fromtimestamp(facts.st_mtime, UTC).isoformat(),
        size=facts.st_size if sizes is None else sum(sizes),
        sha256=digest,
        file_count=None if sizes is None else len(sizes),
    )  # fmt: skip


def _type(name: str) -> Literal["result", "logs", "artifact", "directory"]:
    if name == LOGS:
        return "logs"
    return "artifact" if name.startswith(f"{ARTIFACTS}/") or Path(name).suffix else "directory"


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def digest_of(path: Path) -> str:
    """SHA-256 of a file as hex digits. Blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
