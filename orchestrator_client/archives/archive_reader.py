"""Unpacks archives that came from outside: checkpoints, adapters (WIRE 4.3, 4.9).

The work is done by a process of its own: it may be killed, and its memory is bounded. Here it is started and heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ValidationError

from orchestrator_client.archives.archive_reader_folder import shown
from orchestrator_client.archives.archive_reader_formats import (
    ArchiveFormat,
    UnpackLimits,
    choose_format,
    looks_like_archive,
)
from orchestrator_client.archives.archive_unpacking import remove_leftovers
from orchestrator_client.errors import ArchiveError, UnsafeArchiveError

__all__ = ["ArchiveFormat", "UnpackLimits", "content_root", "looks_like_archive", "unpack"]

_CHILD: Final = "orchestrator_client.archives.archive_reader_child"
_PACKAGES: Final = Path(__file__).resolve().parents[2]
_ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}
"""Nothing of ours: secrets are nobody's, and PYTHON* variables would change what runs."""
_DEFAULT_LIMITS: Final = UnpackLimits()
_MOST_SHOWN: Final = 10
"""Names in an error that says what there is."""


class _Answer(BaseModel):
    kind: Literal["unpacked", "unsafe", "archive", "os"]
    number: int = 0
    text: str = ""


async def unpack(
    archive: Path, target: Path, archive_format: ArchiveFormat = "auto", limits: UnpackLimits = _DEFAULT_LIMITS
) -> int:
    """Unpack an archive that nobody vouches for.

    Nothing is written but `target` and a temporary folder beside it, which is gone afterwards. Files get the modes 0644
    or 0755. Relative symbolic links that stay inside are kept. A name that comes twice is refused, unless both are
    folders.

    Args:
        archive: the file.
        target: a folder that must not exist. It is there whole and on the disk, or not at all. Only one at a time may
            unpack into it.
        archive_format: what the archive must be; "auto" takes whatever it is.
        limits: how much may come out of it.

    Returns:
        Bytes of the unpacked files.

    Raises:
        ArchiveError: it is no archive, broken, cut off, or not of that format.
        UnsafeArchiveError: it would write outside, holds a device, or is more than the limits, or memory, allow.
        OSError: the disk; with ENOSPC if it is full, or would take more than `limits.room_bytes`; EEXIST if `target`
            exists.
    """
    await asyncio.to_thread(choose_format, archive, archive_format)  # most wrong files need no process to be refused
    request = _request(archive, target, archive_format, limits)
    unpacked = False
    try:
        async with asyncio.timeout(limits.seconds) as timer:
            status, output = await _run_child(request)
        answer = _read(status, output)
        unpacked = answer.kind == "unpacked"
    except TimeoutError:
        if not timer.expired():
            raise
        text = f"archive refused: it is not unpacked after the {limits.seconds:g} s that are allowed"
        raise UnsafeArchiveError(text) from None
    finally:
        if not unpacked:
            # A killed process leaves its folder. If that cannot be removed now, the next unpacking tries it again.
            with contextlib.suppress(OSError):
                await _in_own_thread(partial(remove_leftovers, target))
    if answer.kind == "unsafe":
        raise UnsafeArchiveError(answer.text)
    if answer.kind == "archive":
        raise ArchiveError(answer.text)
    if answer.kind == "os":
        raise OSError(answer.number, answer.text, str(target))
    return answer.number


def content_root(unpacked: Path, subdir: str | None) -> Path:
    """Find the folder that counts in an unpacked archive (WIRE 4.9).

    Args:
        unpacked: what `unpack` has made.
        subdir: the folder in it that the spec names, if it names one.

    Returns:
        That folder; without one the only top-level folder if there is nothing beside it (`__MACOSX` and `._*` do not
        count), else `unpacked`.

    Raises:
        ArchiveError: there is no such folder inside.
    """
    if subdir is not None and subdir.strip():
        return _subfolder(unpacked, subdir.strip())
    entries = [path for path in unpacked.iterdir() if path.name != "__MACOSX" and not path.name.startswith("._")]
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        return entries[0]
    return unpacked


def _subfolder(unpacked: Path, subdir: str) -> Path:
    try:
        folder = (unpacked / subdir).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, a NUL in the name, a loop of links
        folder = None
    if folder is not None and folder.is_dir() and folder.is_relative_to(unpacked.resolve()):
        return folder
    names = sorted(path.name for path in unpacked.iterdir())
    there = ", ".join(repr(name) for name in names[:_MOST_SHOWN]) + (" and more" if len(names) > _MOST_SHOWN else "")
    raise ArchiveError(
        f"subdir {shown(subdir)} is no folder inside the archive; at the top it holds {there or 'nothing'}"
    )


def _request(archive: Path, target: Path, archive_format: ArchiveFormat, limits: UnpackLimits) -> bytes:
    request = {
        "archive": str(archive.absolute()),  # the process works in another folder
        "target": str(target.absolute()),
        "archive_format": archive_format,
        "limits": dataclasses.asdict(limits),
    }
    return json.dumps(request).encode() + b"\n"


async def _in_own_thread(call: Callable[[], None]) -> None:
    """Run what may take long: the event loop's own threads are for what is short."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="unpack")
    try:
        await asyncio.get_running_loop().run_in_executor(thread, call)
    finally:
        thread.shutdown(wait=False)


async def _run_child(request: bytes) -> tuple[int, bytes]:
    """Return the exit status and all output of the unpacking process. It has ended, also on cancellation."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", _CHILD,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=_PACKAGES,  # `-m` looks there first
        env=_ENVIRONMENT,
        start_new_session=True,  # Ctrl-C is for us
    )  # fmt: skip
    assert process.stdin is not None  # noqa: S101 - for mypy: it is a pipe
    assert process.stdout is not None  # noqa: S101 - same
    try:
        process.stdin.write(request)  # stays open: its end tells the process that we are gone
        output = await process.stdout.read()
        return await process.wait(), output
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        process.stdin.close()


def _read(status: int, output: bytes) -> _Answer:
    """Understand the answer, or say how the process ended without one."""
    last = output.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        return _Answer.model_validate_json(last)
    except ValidationError:
        pass
    if status in {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGXCPU}:
        why = f"it ended the unpacking process with {signal.Signals(-status).name}, most likely for lack of memory"
        return _Answer(kind="unsafe", text=f"archive refused: {why}")
    return _Answer(kind="archive", text=f"the unpacking process ended with status {status} and no answer: {last[:500]}")
