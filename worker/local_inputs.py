"""Inputs that lie on this worker: by path, or in the folder of a task that ran here (WIRE 4.3, 4.4, 4.9).

Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from executors.input_spec import InputKind, InputRequest
from orchestrator_client.archives.archive_reader import looks_like_archive
from orchestrator_client.messages import safe_task_id
from worker.input_threads import CheckWanted

WEIGHTS_SUFFIXES: Final = frozenset({".gguf", ".safetensors", ".bin", ".pt", ".pth"})
"""Files that may be a checkpoint alone."""
_IN_TASK_FOLDER: Final[dict[InputKind, tuple[str, ...]]] = {
    "checkpoint": (
        "final_model", "final_model.bin", "final_model.safetensors", "final_model.pt", "final_lora",
        "checkpoints/final_model", "checkpoints/final_lora", ".",
    ),
    "adapter": ("final_lora", "final_model", "checkpoints/final_lora", "checkpoints/final_model", "."),
    "file": (),
}  # fmt: skip
_EXPECTED: Final[dict[InputKind, str]] = {
    "checkpoint": "config.json, adapter_config.json or weights",
    "adapter": "adapter_config.json",
    "file": "a file",
}
_HIDDEN: Final = (".worker", ".cache")
_MOST_NAMED: Final = 8
_LONGEST_SHOWN: Final = 200
_LONGEST_PATH: Final = 4096
"""Characters; Linux takes no more bytes, and longer ones take minutes to be resolved in vain."""
_MOST_FOLDERS: Final = 10_000
_BLOCK: Final = 1024**2


class NotUsableError(Exception):
    """One candidate of an input cannot be used.

    Args:
        text: why, to be put behind the candidate's name.
        elsewhere: whether another worker, or a later try, may do better.
    """

    def __init__(self, text: str, *, elsewhere: bool = False) -> None:
        super().__init__(text)
        self.elsewhere = elsewhere


@dataclass(frozen=True)
class LocalInput:
    """Something found: usable as it is, or an archive that has to be unpacked first.

    Attributes:
        path: where it is.
        archive_stamp: of an archive: what `stamp_of` said before its digest was looked at; else empty.
    """

    path: Path
    archive_stamp: str = ""


class LocalInputs:
    """Looks on this worker's disk.

    Args:
        results_dir: RESULTS_DIR, where the folders of tasks are; also what relative paths count from.
        roots: absolute folders from which tasks may read.
    """

    def __init__(self, results_dir: Path, roots: tuple[Path, ...]) -> None:
        self._results_dir = results_dir.resolve()
        self._roots = tuple(root.resolve() for root in roots)
        self._hidden = tuple(self._results_dir / name for name in _HIDDEN)

    def at_path(self, request: InputRequest, path: str, out_dir: Path, check: CheckWanted) -> LocalInput:
        """Take one of the request's paths.

        Args:
            request: what is wanted.
            path: the candidate.
            out_dir: the task's folder; relative files are looked for there and in its parents.
            check: ends the look at a large file that nobody waits for any more.

        Raises:
            NotUsableError: it does not exist, may not be read, or is no such thing.
            OSError: it cannot be read.
        """
        looked = []
        for candidate in self._places(request.kind, path, out_dir):
            resolved = self._readable(candidate)
            if resolved.exists():
                return _usable(request, resolved, check)
            looked.append(cut(str(resolved)))
        raise NotUsableError(f"does not exist here (looked for {', '.join(looked)})", elsewhere=True)

    def of_task(self, request: InputRequest, check: CheckWanted) -> LocalInput:
        """Look into the folder of the request's task; `check` as in `at_path`.

        Raises:
            NotUsableError: it has nothing of the kind.
            OSError: it cannot be read.
        """
        if not safe_task_id(request.task_id):
            raise NotUsableError("is no task id")
        folder = self._results_dir / request.task_id
        if not folder.is_dir():
            raise NotUsableError(f"has no folder here ({folder})", elsewhere=True)
        names = _IN_TASK_FOLDER[request.kind] or _file_names(request)
        for name in names:
            resolved = self._readable(folder / name)
            if not resolved.exists():
                continue
            try:
                return _usable(request, resolved, check)
            except NotUsableError:
                continue  # a folder without anything of the kind is as good as none
        shown = ", ".join("itself" if name == "." else cut(name) for name in names) or "a file name to look for"
        raise NotUsableError(
            f"has nothing with {_EXPECTED[request.kind]} in {folder} (looked at {shown})", elsewhere=True
        )

    def _places(self, kind: InputKind, path: str, out_dir: Path) -> Iterator[Path]:
        if kind != "file" or Path(path).is_absolute():
            yield self._results_dir / path
            return
        name = PurePosixPath(path).name
        yield from (out_dir / path, self._results_dir / path)
        if name:
            for parent in (out_dir.parent, out_dir.parent.parent):
                if self._is_allowed((parent / name).resolve()):
                    yield parent / name

    def _readable(self, path: Path) -> Path:
        """Resolve a path and make sure that it may be read. Asked before existence, so that answers tell nothing."""
        if len(str(path)) > _LONGEST_PATH:
            raise NotUsableError(f"is longer than the {_LONGEST_PATH} characters that a path may have")
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
            raise NotUsableError(f"cannot be resolved: {cut(str(error))}") from error
        if not self._is_allowed(resolved):
            raise NotUsableError(
                "lies outside the folders this worker may read "
                f"({', '.join(str(root) for root in self._roots)}; see WORKER_ALLOWED_ROOTS)"
            )
        return resolved

    def _is_allowed(self, resolved: Path) -> bool:
        if any(resolved.is_relative_to(hidden) for hidden in self._hidden):
            return False
        return any(resolved.is_relative_to(root) for root in self._roots)


def is_to_be_unpacked(request: InputRequest, file: Path) -> bool:
    """Whether a file is an archive that has to be unpacked, or is said to be one.

    Raises:
        OSError: it cannot be read.
    """
    if request.archive_format != "auto":
        return request.archive_format != "none"
    return request.kind != "file" and looks_like_archive(file)


def content_of(request: InputRequest, root: Path) -> Path:
    """Find what was asked for in an unpacked archive, or check a lone file.

    Raises:
        NotUsableError: it is no such thing.
        OSError: it cannot be read.
    """
    if request.kind == "file":
        return _only_file(root)
    if root.is_file():
        if request.kind == "adapter":
            raise NotUsableError("is a single file that is no archive; expected a folder with adapter_config.json")
        if root.suffix.lower() not in WEIGHTS_SUFFIXES:
            wanted = ", ".join(sorted(WEIGHTS_SUFFIXES))
            raise NotUsableError(f"is {root.name!r}, neither an archive nor a weights file ({wanted})")
        return root
    if request.kind == "adapter":
        return _adapter_root(root)
    names = sorted(entry.name for entry in root.iterdir())
    if not ({"config.json", "adapter_config.json"} & {*names} or any(_is_weights(name) for name in names)):
        raise NotUsableError(f"holds {_named(names)}; expected {_EXPECTED['checkpoint']}")
    return root


def stamp_of(file: Path) -> str:
    """Tell two states of one file apart, without reading it.

    Raises:
        OSError: it is gone, or may not be looked at.
    """
    facts = file.stat()
    return f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"


def cut(text: str) -> str:
    """Shorten what came from outside, so that an error stays readable."""
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


def _digest_of_file(path: Path, check: CheckWanted) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            check()
            digest.update(block)
    return digest.hexdigest()


def _usable(request: InputRequest, path: Path, check: CheckWanted) -> LocalInput:
    if path.is_dir():
        if request.kind == "file":
            raise NotUsableError("is a folder; expected a file")
        return LocalInput(content_of(request, path))
    if not path.is_file():
        raise NotUsableError("is neither a folder nor an ordinary file")
    stamp = stamp_of(path)
    if request.sha256 and (found := _digest_of_file(path, check)) != request.sha256:
        raise NotUsableError(f"has the SHA-256 digest {found[:12]}…, expected {request.sha256[:12]}…", elsewhere=True)
    if is_to_be_unpacked(request, path):
        return LocalInput(path, stamp)
    return LocalInput(content_of(request, path))


def _file_names(request: InputRequest) -> tuple[str, ...]:
    """What a file may be called in a task's folder."""
    from_url = PurePosixPath(request.url.partition("?")[0]).name if "/" in request.url else ""
    names = (
        [request.filename] if request.filename else [*(PurePosixPath(path).name for path in request.paths), from_url]
    )
    return tuple(f"{folder}{name}" for name in names if name for folder in ("artifacts/", ""))


def _only_file(root: Path) -> Path:
    if root.is_file():
        return root
    files = [Path(parent, name) for parent, _, names in os.walk(root) for name in names]
    if len(files) != 1 or not files[0].is_file():
        names = sorted(str(file.relative_to(root)) for file in files)
        raise NotUsableError(f"is an archive that holds {_named(names)}; expected one file")
    return files[0]


def _adapter_root(root: Path) -> Path:
    """Return the first folder, level by level, that holds adapter_config.json."""
    waiting = deque([root])
    for _ in range(_MOST_FOLDERS):
        if not waiting:
            break
        folder = waiting.popleft()
        if (folder / "adapter_config.json").is_file():
            return folder
        waiting.extend(sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()))
    raise NotUsableError("holds no adapter_config.json, also in no folder inside")


def _is_weights(name: str) -> bool:
    return Path(name).suffix.lower() in WEIGHTS_SUFFIXES


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return (", ".join(map(cut, names[:_MOST_NAMED])) or "nothing") + more
