"""Entries of the cache of fetched files, made and looked at by tests."""

from __future__ import annotations

import os
from pathlib import Path

from worker.cache_entry import CacheRecord, Pin, Wanted
from worker.input_cache import InputCache

FORM = "auto:.gz"


def wanted(place: str = "http://h/a", sha256: str = "") -> Wanted:
    return Wanted(place, FORM, sha256)


def digest(text: str) -> str:
    return Wanted(text, "").source


async def add(
    cache: InputCache, place: str = "http://h/a", *, text: str = "x", validator: str = '"v1"', unpacked: bool = False
) -> Pin:
    """Make an entry; its digest is that of its text."""
    want = wanted(place)
    async with cache.workspace(want) as made:
        content = made.folder / "content"
        content.mkdir()
        (content / "f.bin").write_text(text)
        (made.folder / "download").write_text("left over from the making")
        record = CacheRecord(
            url="http://h/…",
            source=want.source,
            form=FORM,
            validator=validator,
            sha256=digest(text),
            fetched_bytes=len(text),
            kept_bytes=len(text),
            payload="content" if unpacked else "content/f.bin",
        )
        return await cache.add(made, record)


async def add_unused(cache: InputCache, place: str, text: str) -> None:
    (await add(cache, place, text=text)).release()


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if len(path.name) == 64)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".new-", ".old-")))


def grow_older(pin_or_entry: Path, seconds: float) -> None:
    record = pin_or_entry / "entry.json"
    was = record.stat().st_mtime
    os.utime(record, (was - seconds, was - seconds))


async def places(cache: InputCache, *names: str) -> list[str]:
    """Which of these are there; looking does not count as use."""
    there = []
    for name in names:
        if (pin := await cache.find(wanted(name))) is not None:
            pin.release()
            there.append(name)
    return there
