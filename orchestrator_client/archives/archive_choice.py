"""Which compressor an archive gets, and how large it will be.

The operator's level is obeyed. Without one, pieces from all over the data are compressed, and of the candidates in
`_RANKED` the first wins that makes them no larger than level 6 of pigz (zlib) does. The rank is by measured speed, and
no clock decides, so equal data gives equal archives. Measured on two cores, whole pipeline, fsync included, 1.08 GB of
bf16 weights and 0.54 GB of fp32 weights, in seconds and MB:

    isal level 1     2.4   842      1.1   499
    isal level 2     2.5   842
    isal level 3     2.5   842
    pigz -H          5.7   844      2.8   499
    pigz -0          2.4  1076      1.0   538
    pigz -1         14.2   864
    pigz -6         42     855

So neither `pigz -H` nor storing is a candidate: isal's levels use Huffman codes too where matching does not pay, and
store, at 2 GB/s, what does not compress at all. What remains for pigz is data with long repetitions, such as text.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from orchestrator_client.archives.archive_content import Content
from orchestrator_client.errors import ArchiveError

SAMPLED_FROM_BYTES: Final = 32 * 1024**2
"""Smaller folders are compressed with the default level: sampling would cost more than it saves."""
MOST_ISAL_THREADS: Final = 8
"""Each holds some MB, and this many are faster than any disk."""
_DEFAULT_LEVEL: Final = 6
_SAMPLES: Final = 48
_SAMPLE_BYTES: Final = 128 * 1024
"""As large as the blocks that pigz compresses one by one."""
_NOISE: Final = 1.001
"""Sizes of samples that differ by no more than this are equal."""
_RANKED: Final = (1, 2, 3)
"""Levels of isal, the fastest first."""

Program = Literal["pigz", "isal", "store"]


@dataclass(frozen=True)
class Choice:
    """How an archive is compressed.

    Attributes:
        program: pigz, isal in this process, or stored in this process (plain gzip, not compressed).
        level: in the program's own scale; 0 for `store`.
        ratio: expected size of the archive by the size of the content; None if nothing was sampled.
    """

    program: Program
    level: int
    ratio: float | None = None

    def describe(self, threads: int) -> str:
        """For people."""
        if self.program == "store":
            return "stored, not compressed"
        how = f"pigz -{self.level}" if self.program == "pigz" else f"isal level {self.level}"
        used = threads if self.program == "pigz" else min(threads, MOST_ISAL_THREADS)
        return f"{how}, {used} thread{'s' if used > 1 else ''}"


def choose(content: Content, level: int | None, *, with_pigz: bool, threads: int, check: Callable[[], None]) -> Choice:
    """Choose the compressor. Blocks for some tenths of a second.

    Args:
        content: what is to be archived.
        level: the operator's level, 0 to 9, or None.
        with_pigz: whether pigz can be used.
        threads: how many samples are compressed at a time.
        check: called between samples; what it raises ends the sampling.

    Raises:
        ArchiveError: a sample cannot be read.
    """
    if level is not None or content.size < SAMPLED_FROM_BYTES:
        return _by_level(_DEFAULT_LEVEL if level is None else level, with_pigz=with_pigz)
    sizes = _sample(content, threads, check)
    for isal_level, size in zip(_RANKED, sizes.isal, strict=True):
        if size <= sizes.zlib * _NOISE:
            return Choice("isal", isal_level, size / sizes.raw)
    if with_pigz:
        return Choice("pigz", _DEFAULT_LEVEL, sizes.zlib / sizes.raw)
    size, isal_level = min(zip(sizes.isal, _RANKED, strict=True))
    return Choice("isal", isal_level, size / sizes.raw)


def _by_level(level: int, *, with_pigz: bool) -> Choice:
    """A level of pigz; without pigz 0 is stored, 1 to 3 become isal's 1, 4 and 5 its 2, 6 to 9 its 3.

    (isal's own level 0 uses one fixed code and makes weights larger than they were.)
    """
    if with_pigz:
        return Choice("pigz", level)
    if level == 0:
        return Choice("store", 0)
    return Choice("isal", 1 if level <= 3 else 2 if level <= 5 else 3)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of all samples: as they are, at zlib's level 6, and at each level of isal in `_RANKED`."""

    raw: int
    zlib: int
    isal: tuple[int, ...]


def _sample(content: Content, threads: int, check: Callable[[], None]) -> _Sizes:
    """Compress pieces at even distances, as if all files were one."""
    pieces = [(content.size - _SAMPLE_BYTES) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    places: list[tuple[Path, int]] = []
    end = 0
    for member in content.members:
        begin, end = end, end + member.size
        while len(places) < _SAMPLES and pieces[len(places)] < end:
            # A piece that would reach over the end of its file begins earlier.
            within = min(pieces[len(places)] - begin, max(member.size - _SAMPLE_BYTES, 0))
            places.append((member.source, within))

    def measured(place: tuple[Path, int]) -> tuple[int, ...]:
        check()
        return _compressed_sizes(_read(*place))

    with ThreadPoolExecutor(threads, thread_name_prefix="archive-sample") as pool:
        raw, deflated, *isal = (sum(sizes) for sizes in zip(*pool.map(measured, places), strict=True))
    return _Sizes(raw, deflated, tuple(isal))


def _read(path: Path, offset: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            data = os.pread(descriptor, _SAMPLE_BYTES, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ArchiveError(f"cannot archive {str(path)!r}: {error.strerror}") from error
    if not data:
        raise ArchiveError(f"cannot archive {str(path)!r}: it changed while it was archived; archive it again")
    return data


def _compressed_sizes(data: bytes) -> tuple[int, ...]:
    from isal import isal_zlib  # noqa: PLC0415 - the daemon starts without it

    return (
        len(data),
        len(zlib.compress(data, _DEFAULT_LEVEL, wbits=-15)),
        *(len(isal_zlib.compress(data, level, wbits=-15)) for level in _RANKED),
    )
