"""The folder that an archive is unpacked into. Nothing that an archive says gets out of it, or makes it too large.

No link exists while files are written: symbolic links are only noted, judged together when all names are known, and
made last. So no file is ever written through a link.
"""

from __future__ import annotations

import enum
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from orchestrator_client.archives.archive_reader_formats import MEMBER_BYTES, RATIO_FREE_BYTES, UnpackLimits
from orchestrator_client.errors import UnsafeArchiveError

_LONGEST_PART: Final = 255
"""Bytes of one name in a path; file systems take no more."""
_LONGEST_NAME: Final = 2000
"""Bytes of a member's name, or of what a link points to."""
_DEEPEST: Final = 100
"""Folders in each other; removing a deeper tree needs more open files than a process may have."""
_MOST_HOPS: Final = 40
"""Links that lead to links; Linux follows no more either."""
_MOST_STEPS: Final = 1_000_000
"""Parts of all links' paths, and of those they lead through; walking that many takes less than a second."""
_HEADER_ALLOWANCE: Final = 4096
"""Bytes that a member may take in the archive besides its content."""
_SHOWN_NAME: Final = 200
_DRIVE: Final = re.compile(r"[A-Za-z]:")


class Allowance:
    """Counts what comes out of an archive, and stops it when it is too much.

    All is counted when it happens; what headers claim does not matter.
    """

    def __init__(self, limits: UnpackLimits, archive_bytes: int) -> None:
        self._limits = limits
        self._archive_bytes = archive_bytes
        self._entries = 0
        self._decompressed = 0
        self.written = 0
        """Bytes of unpacked files so far."""

    def entry(self, name: str) -> None:
        """Count a member, or a folder made for one."""
        self._entries += 1
        if self._entries > self._limits.files:
            raise refusal(name, f"the archive holds more than {self._limits.files} members")
        self._check_room()

    def decompress(self, size: int, name: str) -> None:
        """Count bytes that come out of the decompressor, whatever they are for."""
        self._decompressed += size
        if self._decompressed > self._limits.total_bytes + self._limits.files * _HEADER_ALLOWANCE:
            raise self._too_large(name)
        self._check_ratio(self._decompressed, name)

    def write(self, size: int, name: str) -> None:
        """Count bytes just before they are written."""
        self.written += size
        if self.written > self._limits.total_bytes:
            raise self._too_large(name)
        self._check_ratio(self.written, name)
        self._check_room()

    def _check_room(self) -> None:
        room = self._limits.room_bytes
        if room is not None and self.written + self._entries * MEMBER_BYTES > room:
            raise OSError(
                errno.ENOSPC, f"the content needs more than the {room} bytes that are free, but for a reserve"
            )

    def _too_large(self, name: str) -> UnsafeArchiveError:
        return refusal(name, f"the archive unpacks to more than the {self._limits.total_bytes} bytes that are allowed")

    def _check_ratio(self, unpacked: int, name: str) -> None:
        if unpacked > RATIO_FREE_BYTES and unpacked > self._limits.ratio * self._archive_bytes:
            text = (
                f"the archive of {self._archive_bytes} bytes unpacks to more than {self._limits.ratio:g} times its size"
            )
            raise refusal(name, text)


class _Kind(enum.Enum):
    FILE = "a file"
    FOLDER = "a folder"
    LINK = "a symbolic link"


class ConfinedFolder:
    """Makes members below `root`, an empty folder of our own.

    Every name may come once; only a folder may come again. A name that differs in case or in its Unicode form is
    another name. Owners, times and special mode bits of the archive are ignored.
    """

    def __init__(self, root: Path, allowance: Allowance) -> None:
        self._root = root
        self._allowance = allowance
        self._kinds: dict[str, _Kind] = {}
        self._links: dict[str, str] = {}

    def add_folder(self, name: str) -> None:
        """Make a folder, and those it is in.

        Raises:
            UnsafeArchiveError: the name is not one for this folder, or there are too many members.
            OSError: the disk.
        """
        parts = _parts(name)
        if not parts or "/".join(parts) in self._kinds:
            self._allowance.entry(name)  # nothing new to make, but a million of these take time, too
        self._make_folders(parts, name)

    def add_file(self, name: str, content: Iterable[bytes], *, executable: bool) -> None:
        """Write a file; the mode becomes 0644, or 0755.

        Raises:
            UnsafeArchiveError: as `add_folder`, or the content is too large.
            OSError: the disk.
        """
        path = self._claim(name, _Kind.FILE)
        mode = 0o755 if executable else 0o644
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            os.fchmod(descriptor, mode)  # whatever the umask is
            for chunk in content:
                self._allowance.write(len(chunk), name)
                left = memoryview(chunk)
                while left:
                    left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)

    def add_hard_link(self, name: str, to: str) -> None:
        """Make a second name of a file that this archive has already brought.

        Raises:
            UnsafeArchiveError: as `add_folder`, or there is no such file in this folder.
            OSError: the disk.
        """
        source = "/".join(_parts(to, of_link=name))
        if self._kinds.get(source) is not _Kind.FILE:
            raise refusal(name, f"it is a hard link to {shown(to)}, which is no earlier file of the archive")
        os.link(self._root / source, self._claim(name, _Kind.FILE), follow_symlinks=False)

    def add_symbolic_link(self, name: str, to: str) -> None:
        """Note a symbolic link; `finish` judges where it leads, and makes it.

        Raises:
            UnsafeArchiveError: as `add_folder`, or it is not a relative link.
        """
        self._claim(name, _Kind.LINK)
        if not to or "\0" in to or "\\" in to or to.startswith("/") or _DRIVE.match(to):
            raise refusal(name, f"it is a symbolic link to {shown(to)}, which is no relative path")
        if _too_long(to):
            raise refusal(name, "it is a symbolic link to something with too long a name")
        self._links["/".join(_parts(name))] = to

    def finish(self) -> int:
        """Make the links, and bring everything to the disk.

        Returns:
            The bytes of all files.

        Raises:
            UnsafeArchiveError: a link leads out of the folder.
            OSError: the disk.
        """
        steps = 0
        for place in self._links:
            steps = self._follow(place, steps)
        for place, to in self._links.items():
            (self._root / place).symlink_to(to)
        for place, kind in self._kinds.items():
            if kind is not _Kind.LINK:
                fsync(self._root / place)
        fsync(self._root)
        return self._allowance.written

    def _claim(self, name: str, kind: _Kind) -> Path:
        """Take a name for something that is no folder, and make the folders it is in."""
        self._allowance.entry(name)
        parts = _parts(name)
        if not parts or name.endswith(("/", "/.")):
            raise refusal(name, f"it is {kind.value} with the name of a folder")
        self._make_folders(parts[:-1], name)
        place = "/".join(parts)
        if (there := self._kinds.get(place)) is not None:
            raise refusal(name, f"it is {kind.value}, but an earlier member has made {there.value} there")
        self._kinds[place] = kind
        return self._root / place

    def _make_folders(self, parts: tuple[str, ...], name: str) -> None:
        for end in range(1, len(parts) + 1):
            place = "/".join(parts[:end])
            there = self._kinds.get(place)
            if there is None:
                self._allowance.entry(name)
                path = self._root / place
                path.mkdir()
                path.chmod(0o755)  # whatever the umask is
                self._kinds[place] = _Kind.FOLDER
            elif there is not _Kind.FOLDER:
                raise refusal(name, f"it needs a folder where an earlier member has made {there.value}")

    def _follow(self, place: str, steps: int) -> int:
        """Walk a link as the kernel would, through the other links, and refuse it if it gets out or never ends.

        Comparing texts is not enough: with `a/b -> ..`, the path `a/b/..` is outside, though it reads as `a`.

        Args:
            place: the link.
            steps: how many were made for other links.

        Returns:
            How many they are now.
        """
        here: list[str] = []
        left = place.split("/")[::-1]
        hops = 0
        while left:
            part = left.pop()
            steps += 1
            if steps > _MOST_STEPS:
                raise refusal(place, f"its symbolic links have more than {_MOST_STEPS} parts to follow")
            if part == "..":
                if not here:
                    raise refusal(place, f"it is a symbolic link to {shown(self._links[place])}, outside the archive")
                here.pop()
            elif part not in {"", "."}:
                here.append(part)
                to = self._links.get("/".join(here))
                if to is not None:
                    hops += 1
                    here.pop()
                    left += to.split("/")[::-1]
            if hops > _MOST_HOPS or len(here) > _DEEPEST:
                raise refusal(place, f"it is a symbolic link to {shown(self._links[place])}, which leads nowhere")
        return steps


def refusal(name: str, why: str) -> UnsafeArchiveError:
    """Make the error that refuses an archive because of a member."""
    return UnsafeArchiveError(f"archive refused at member {shown(name)}: {why}")


def shown(name: str) -> str:
    """Write a member's name so that it can be printed, and is not too long."""
    return repr(name)[:_SHOWN_NAME]


def fsync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(name: str, *, of_link: str | None = None) -> tuple[str, ...]:
    """Split a member's name; nothing is left for the root itself ("./").

    Args:
        name: what the archive says.
        of_link: the member to blame, when `name` is where it points.
    """
    why = ""
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if not name:
        why = "it has no name"
    elif name.startswith("/"):
        why = "the path is absolute"
    elif "\0" in name:
        why = "the name holds a NUL"
    elif "\\" in name:
        why = "the name holds a backslash; pack it with '/' between folders"
    elif ".." in parts:
        why = "the path holds '..'"
    elif parts and _DRIVE.match(parts[0]):
        why = "the path begins with a drive letter"
    elif _too_long(name) or any(_too_long(part, _LONGEST_PART) for part in parts):
        why = f"the name is longer than {_LONGEST_NAME} bytes in all or {_LONGEST_PART} between slashes, or no Unicode"
    elif len(parts) > _DEEPEST:
        why = f"it lies more than {_DEEPEST} folders deep"
    if not why:
        return parts
    raise refusal(name, why) if of_link is None else refusal(of_link, f"it is a hard link to {shown(name)}: {why}")


def _too_long(text: str, most: int = _LONGEST_NAME) -> bool:
    try:
        return len(os.fsencode(text)) > most
    except UnicodeEncodeError:  # half of a surrogate pair: no file can be named so
        return True
