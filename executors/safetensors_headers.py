"""What safetensors files say about their tensors, read without a library and without reading the tensors.

A file is: eight bytes with the header's length (little endian), the header (JSON), the tensors' bytes without gaps.
The files come from anywhere, so every number in them is checked before it is used.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NoReturn

from executors.errors import ModelLoadError

INDEX_NAME: Final = "model.safetensors.index.json"
"""Names the files of a model that is saved in several; has a map from tensor to file."""

_HEADER_LIMIT: Final = 100_000_000  # the format's own limit
_VALUES_LIMIT: Final = 4_000_000  # JSON values in one header: keeps parsing within a second or so and some 100 MB
_TENSORS_LIMIT: Final = 1_000_000  # of all files together; the largest models of 2026 have some 200 000
_FILES_LIMIT: Final = 10_000
_DIMENSIONS_LIMIT: Final = 64
_NUMBER_LIMIT: Final = 2**63
_SHOWN_CHARACTERS: Final = 80  # of a name in an error's text

_BITS: Final = (
    dict.fromkeys(("F4",), 4)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)
"""Bits of one element. A dtype that is not listed is left to the library that loads the file."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor as its file describes it.

    Attributes:
        dtype: the file's own word: "BF16", "F32", "I8" …
        shape: its dimensions.
        nbytes: its size in the file.
        file: which file holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def read_headers(folder: Path) -> dict[str, TensorFacts]:
    """Facts of all tensors in the safetensors files of a model's or an adapter's folder; empty if there are none.

    With `model.safetensors.index.json` these are the files that it names, else all `*.safetensors` of the folder.
    Files named `consolidated*` are a second copy where there are others. A tensor that is in several files counts once:
    the index says which, else the first file by name has it.

    Raises:
        ModelLoadError: a file is missing, cut off or no safetensors file; the text names it.
    """
    index = folder / INDEX_NAME
    homes = _read_index(index) if os.path.lexists(index) else {}
    files = sorted(set(homes.values())) or _files_of(folder)
    tensors: dict[str, TensorFacts] = {}
    for file in files:
        for name, facts in _read_file(file).items():
            if name not in tensors or homes.get(name) == file:
                tensors[name] = facts
        if len(tensors) > _TENSORS_LIMIT:
            _refuse(folder, f"has more than {_TENSORS_LIMIT} tensors")
    return tensors


def read_json_object(file: Path, size_limit: int = _HEADER_LIMIT) -> dict[str, Any]:
    """The JSON object in a file that may come from anywhere.

    Raises:
        ModelLoadError: too large, too many values, damaged, or no object; the text names the file.
    """
    try:
        if not file.is_file():  # opening a named pipe would wait for a writer
            _refuse(file, "is not a regular file" if file.exists() else "is missing")
        with file.open("rb") as opened:
            raw = opened.read(size_limit + 1)
    except OSError as error:
        _refuse(file, f"cannot be read: {error.strerror}")
    if len(raw) > size_limit:
        _refuse(file, f"is larger than {size_limit} bytes")
    return _parse(file, raw)


def _files_of(folder: Path) -> list[Path]:
    # Dot files are what some systems' archivers put beside each file, not weights.
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    if len(files) > _FILES_LIMIT:
        _refuse(folder, f"has {len(files)} safetensors files, expected at most {_FILES_LIMIT}")
    # Some models come twice: once more under their maker's own names.
    return [file for file in files if not file.name.startswith("consolidated")] or files


def _read_index(index: Path) -> dict[str, Path]:
    """The map from tensor to file."""
    found = read_json_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        _refuse(index, "has no weight_map: expected an object that maps each tensor to its file")
    files: dict[str, Path] = {}
    for name in found.values():
        if not isinstance(name, str) or not _is_inside(name):
            _refuse(index, f"names the file {_shown(name)}, expected one in the same folder")
        files[name] = index.parent / name
        if len(files) > _FILES_LIMIT:
            _refuse(index, f"names more than {_FILES_LIMIT} files")
    return {tensor: files[name] for tensor, name in found.items()}


def _is_inside(name: str) -> bool:
    # By name only: in the cache of a model hub, each file of a folder is a link to a blob outside it.
    path = PurePosixPath(name)
    return (
        0 < len(name) < 1000
        and bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and name.isprintable()
    )


def _read_file(file: Path) -> dict[str, TensorFacts]:
    try:
        if not file.is_file():
            _refuse(file, "is not a regular file" if file.exists() else "is missing")
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            if len(start) < 8:
                _refuse(file, f"is cut off or no safetensors file: it has {size} bytes, expected at least 10")
            (length,) = struct.unpack("<Q", start)
            if length > _HEADER_LIMIT:
                _refuse(file, f"is no safetensors file: a header of {length} bytes, expected at most {_HEADER_LIMIT}")
            raw = opened.read(length)
    except OSError as error:
        _refuse(file, f"cannot be read: {error.strerror}")
    if len(raw) < length:
        _refuse(file, f"is cut off or no safetensors file: it has {size} bytes, its header alone says {8 + length}")
    header = _parse(file, raw)
    header.pop("__metadata__", None)
    if len(header) > _TENSORS_LIMIT:
        _refuse(file, f"has {len(header)} tensors, expected at most {_TENSORS_LIMIT}")
    return _check_tensors(file, header, data_bytes=size - 8 - length)


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > _VALUES_LIMIT:
        _refuse(file, f"has more than {_VALUES_LIMIT} JSON values")
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    # ValueError: no UTF-8, no JSON, a number of thousands of digits, or a key that comes twice
    except (ValueError, RecursionError) as error:
        _refuse(file, f"is damaged: its JSON cannot be read ({str(error)[:200]})")
    if not isinstance(found, dict):
        _refuse(file, f"is damaged: its JSON is {_shown(found)}, expected an object")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _check_tensors(file: Path, header: dict[str, Any], *, data_bytes: int) -> dict[str, TensorFacts]:
    """The facts, once each is well formed and together they cover the file's data without gap or overlap."""
    tensors: dict[str, TensorFacts] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        facts, begin = _check_tensor(file, name, entry)
        end = begin + facts.nbytes
        if end > data_bytes:
            _refuse(file, f"is cut off: tensor {_shown(name)} ends at byte {end} of the data, which has {data_bytes}")
        tensors[name] = facts
        places.append((begin, end, name))
    covered = 0
    for begin, end, name in sorted(places):
        if begin != covered:
            _refuse(file, f"is damaged: tensor {_shown(name)} begins at byte {begin} of the data, expected {covered}")
        covered = end
    if covered != data_bytes:
        _refuse(file, f"is damaged: its tensors cover {covered} bytes, its data has {data_bytes}")
    return tensors


def _check_tensor(file: Path, name: str, entry: object) -> tuple[TensorFacts, int]:
    """Its facts, and where it begins."""
    if not isinstance(entry, dict):
        _refuse(file, f"is damaged: tensor {_shown(name)} is {_shown(entry)}, expected an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str):
        _refuse(file, f"is damaged: tensor {_shown(name)} has the dtype {_shown(dtype)}, expected a word such as BF16")
    shape = _sizes(entry.get("shape"), at_most=_DIMENSIONS_LIMIT)
    if shape is None:
        found = _shown(entry.get("shape"))
        _refuse(file, f"is damaged: tensor {_shown(name)} has the shape {found}, expected a list of sizes")
    offsets = _sizes(entry.get("data_offsets"), at_most=2)
    if offsets is None or len(offsets) < 2 or offsets[0] > offsets[1]:
        found = _shown(entry.get("data_offsets"))
        _refuse(file, f"is damaged: tensor {_shown(name)} has the offsets {found}, expected its begin and end")
    nbytes = offsets[1] - offsets[0]
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != nbytes * 8:
        found = f"{_shown(list(shape))} of {_shown(dtype)} but {nbytes} bytes"
        _refuse(file, f"is damaged: tensor {_shown(name)} has the shape {found}")
    return TensorFacts(dtype, shape, nbytes, file), offsets[0]


def _sizes(value: object, *, at_most: int) -> tuple[int, ...] | None:
    """The whole numbers of a list, if it is one of so few and all are from 0 on and fit 64 bits; `True` is none."""
    if not isinstance(value, list) or len(value) > at_most:
        return None
    sizes = tuple(each for each in value if type(each) is int and 0 <= each < _NUMBER_LIMIT)
    return sizes if len(sizes) == len(value) else None


def _shown(value: object) -> str:
    """A stranger's value for an error's text: on one line and short, whatever its size."""
    if isinstance(value, str):
        text = ascii(value[:_SHOWN_CHARACTERS])
    elif isinstance(value, list):
        text = f"[{', '.join(ascii(each) if type(each) is int else type(each).__name__ for each in value[:8])}]"
    elif isinstance(value, dict):
        text = "an object"
    else:
        text = ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _refuse(file: Path, problem: str) -> NoReturn:
    hint = "Get the file anew: it is incomplete, damaged, or not in the safetensors format."
    raise ModelLoadError(f"{file} {problem}", hint=hint)
