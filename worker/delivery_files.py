"""The files of a delivery on this worker's disk: what they hold of it, and when they may go. Everything here blocks."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Final

from executors.contract import JsonObject
from orchestrator_client.archives.archive_writer import remove_leftovers
from worker.delivery_plan import DeliveryJob, Package, PackageState, Posting, package_key, result_keys
from worker.results_folder import RESULT_FILE, RESULT_KEY, ResultToWrite, digest_of, write_results

_CHECKPOINTS: Final = "checkpoints"


class LostError(Exception):
    """What is to be delivered is not on the disk any more."""


def is_there(path: Path, state: PackageState) -> bool:
    """Whether a file that was made for sending still lies there whole."""
    return path.is_file() and path.stat().st_size == state.size_bytes


def check_folder(folder: Path) -> None:
    """Make a folder ready to be archived: what an archive that was cut off has left goes.

    Raises:
        LostError: it is gone.
    """
    if not folder.is_dir():
        raise LostError(f"{folder} is not there any more, so it cannot be delivered")
    remove_leftovers(folder)


def file_state(path: Path) -> PackageState:
    """A file that is sent as it is.

    Raises:
        LostError: it is gone.
    """
    if not path.is_file():
        raise LostError(f"{path} is not there any more, so it cannot be delivered")
    return PackageState(name=path.name, size_bytes=path.stat().st_size, sha256=digest_of(path))


def write_package_keys(job: DeliveryJob) -> None:
    """Write what became known of archives and uploads into the results on disk.

    Raises:
        LostError: a result is gone.
        OSError: it cannot be written.
    """
    for posting in job.plan.postings:
        packages = _packages_of(job, posting)
        if not packages:
            continue
        result = _read(posting)
        for package, state in packages:
            result |= result_keys(package, state, posting.folder, result.get(package.key))
        _write(posting, result, packages)


def clean_up(job: DeliveryJob) -> None:
    """Delete folders that were uploaded, their archives, and checkpoints (MODEL_CLEANUP_AFTER_UPLOAD, WIRE 7).

    Raises:
        LostError: a result is gone.
        OSError: a manifest cannot be written anew.
    """
    for posting in job.plan.postings:
        if posting.destination is None:
            continue
        packages = _packages_of(job, posting)
        going = [posting.folder / _CHECKPOINTS]
        for package, state in packages:
            if package.kind == "folder":
                path = posting.folder / package.path
                going += [path, path.with_name(state.name)]
        there = [path for path in going if path.exists()]
        for path in there:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        if there:
            _write(posting, _read(posting), packages)  # the manifest must not name what is gone


def _packages_of(job: DeliveryJob, posting: Posting) -> list[tuple[Package, PackageState]]:
    return [
        (package, job.progress.packages[package_key(package)])
        for package in job.plan.packages
        if package.task_id == posting.task_id
    ]


def _read(posting: Posting) -> JsonObject:
    path = posting.folder / RESULT_FILE
    try:
        whole: JsonObject = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise LostError(f"{path} is gone or damaged") from error
    inner = whole.get(RESULT_KEY)
    return inner if posting.destination is None and isinstance(inner, dict) else whole


def _write(posting: Posting, result: JsonObject, packages: list[tuple[Package, PackageState]]) -> None:
    digests = {state.name: state.sha256 for package, state in packages if "/" not in package.path}
    (error,) = write_results(
        [
            ResultToWrite(
                posting.folder,
                posting.task_id,
                result,
                posting.required,
                wrapped=posting.destination is None,
                digests=digests,
            )
        ]
    )
    if error is not None:
        raise error
