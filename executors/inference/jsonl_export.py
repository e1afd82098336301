"""`postprocess.jsonl_export` (WIRE 4.3): fields of the generated items as a JSONL file in the task's folder."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from executors.contract import Artifact, JsonObject
from executors.errors import BadDataError, BadSpecError
from executors.inference.partial_results import PARTIAL_FILE, json_text
from executors.task_spec import SpecSection

EXPORT_KEY: Final = "jsonl_export"

_FIELD: Final = "spec.postprocess.jsonl_export"
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SENDABLE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""What an orchestrator takes for a file's name (WIRE 6)."""
_LONGEST_PATH: Final = 200
_TAKEN_FILES: Final = frozenset({"responses.json", "manifest.json", PARTIAL_FILE})
_MOST_FALLBACKS: Final = 8
_LINE_ENDS: Final = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
"""Line ends for some readers of text, but not for JSON; escaped, a line stays one for all of them."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_THE_WAY: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR})


def _lower(value: object) -> object:
    return value.strip().lower() or None if isinstance(value, str) else value


def _without_nulls(value: object) -> object:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else value


def _export_path(value: str) -> str:
    """Check a path and return it without `.` and doubled slashes."""
    parts = PurePosixPath(value).parts
    if _UNPRINTABLE.search(value) or "\\" in value:
        problem = "holds a backslash or a control character; expected plain text"
    elif value.startswith("/") or ".." in parts:
        problem = "leaves the task's folder; expected a relative path without '..'"
    elif value.rpartition("/")[2] in {"", "."}:
        problem = "names no file; expected for instance 'export.jsonl'"
    elif not _SENDABLE.fullmatch(parts[-1]):
        problem = "has a file name that cannot be sent; expected letters, digits, '.', '-' and '_', no '.' first"
    elif len(value.encode()) > _LONGEST_PATH:
        problem = f"is too long; expected at most {_LONGEST_PATH} bytes"
    elif parts[0] in _TAKEN_FILES or parts[-1] in _TAKEN_FILES or parts[0] == "logs" or parts == ("artifacts",):
        problem = "is a name that the worker uses itself; expected another one, for instance 'export.jsonl'"
    elif parts[0].startswith("_"):
        problem = "begins with '_', as folders of the worker's own do; expected another name, such as 'export.jsonl'"
    else:
        return str(PurePosixPath(value))
    raise PydanticCustomError("export_path", "{problem}", {"problem": problem})


class ExportSource(SpecSection):
    """Where one field of the export comes from.

    As a string: `prompt` (what the model saw), `output`, `metadata.K`, `item.K`; any other string is a literal. Numbers
    and booleans are literals too.

    As an object, read in this order:

    1. `from` (or `source`) with `key` gives the value: `prompt`, `output`, `metadata` or `item` (without a key: the
       whole object), `literal` (what `value` or `literal` holds). Without `from` it is the literal if there is one,
       else the item's `key`, else null. What the chosen origin does not use is ignored.
    2. If that is null or blank (only white space), the value of `fallback` takes its place, whatever it is. A fallback
       is a source itself, as a string or an object, with its own `fallback` and `default`, at most 8 deep.
    3. If that is null, `default` takes its place; a blank text stays. It is a value, never the name of a source.

    A key is looked up as it is; if there is none, its dots lead into nested objects. A path that leads nowhere gives
    null, and so do NaN and infinity.

    Raises:
        pydantic.ValidationError: no source at all, an unknown origin, or too many fallbacks.
    """

    origin: Annotated[Literal["prompt", "output", "metadata", "item", "literal"] | None, BeforeValidator(_lower)] = (
        Field(default=None, alias="from")
    )
    key: str = ""
    value: JsonValue = None
    fallback: ExportSource | None = None
    default: JsonValue = None

    @model_validator(mode="before")
    @classmethod
    def _fold(cls, value: object) -> object:
        """Turn strings, and second names for the same thing, into the object form."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return _named(value)
        if isinstance(value, bool | int | float):
            return {"from": "literal", "value": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError("export_source", "expected the name of a source, a literal, or an object")
        if _depth(value) > _MOST_FALLBACKS:
            raise PydanticCustomError(
                "export_fallbacks", "expected at most {most} fallbacks in each other", {"most": _MOST_FALLBACKS}
            )
        kept = {key: item for key, item in value.items() if item is not None}
        for name, other in (("from", "source"), ("value", "literal")):
            second = kept.pop(other, None)
            if second is not None:
                kept.setdefault(name, second)
        if not kept.keys() & {"from", "origin", "key", "value", "fallback", "default"}:
            raise PydanticCustomError("export_source", "names no source; expected at least one of from, key and value")
        return kept

    def text_in(self, item: JsonObject) -> str:
        """Return the field's text for one entry of the result's `items`."""
        return _text(self._value_in(item))

    def _value_in(self, item: JsonObject) -> JsonValue:
        value = self._read(item)
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        if self.fallback is not None and (value is None or (isinstance(value, str) and not value.strip())):
            value = self.fallback._value_in(item)  # noqa: SLF001 - of the same class
        return self.default if value is None else value

    def _read(self, item: JsonObject) -> JsonValue:
        if self.origin in {"prompt", "output"}:
            return item.get(self.origin)
        if self.origin == "metadata":
            return _look_up(item.get("metadata"), self.key)
        if self.origin == "item" or (self.origin is None and self.value is None and self.key):
            return _look_up(item, self.key)
        return self.value


class JsonlExport(SpecSection):
    """`postprocess.jsonl_export`: one line for each item, those that ended with an error included.

    Attributes:
        path: the file, relative to the task's folder.
        fields: the line's keys, in this order, and where their values come from.
        required_fields: fields that may be blank in no line.

    Raises:
        pydantic.ValidationError: a path that leaves the folder or cannot be sent, no fields, a required field that is
            none of them.
    """

    path: Annotated[str, AfterValidator(_export_path)]
    fields: Annotated[dict[str, ExportSource], BeforeValidator(_without_nulls), Field(min_length=1)]
    required_fields: tuple[str, ...] = ()

    @field_validator("required_fields")
    @classmethod
    def _are_fields(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        fields = info.data.get("fields")
        unknown = [name for name in value if fields is not None and name not in fields]
        if unknown:
            raise PydanticCustomError(
                "export_required",
                "{unknown} is not in 'fields'; expected only names of {known}",
                {"unknown": repr(unknown[0]), "known": ", ".join(map(repr, fields or ()))},
            )
        return value


def write_export(export: JsonlExport, items: Sequence[JsonObject], out_dir: Path) -> tuple[JsonObject, Artifact]:
    """Write the export: one JSON object a line, all values texts. A reader sees the whole file or none.

    Args:
        export: the spec's section.
        items: the entries of the result's `items` (WIRE 5.2), in order.
        out_dir: the task's absolute, existing folder.

    Returns:
        The result's `jsonl_export` and the artifact that makes the daemon complete it. Its `path` is absolute, because
        other tasks read the file by it; once the file was sent, the daemon replaces it by the URL.

    Raises:
        BadDataError: a required field is blank.
        BadSpecError: a link or a folder lies where the file, or one of its folders, has to be.
        OSError: it cannot be written.
    """
    *folders, name = PurePosixPath(export.path).parts
    unfinished = f".{name}.unfinished"
    try:
        with _opened(out_dir, folders) as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=folder)  # of a run that was killed
            try:
                with os.fdopen(os.open(unfinished, _NEW_FILE, 0o644, dir_fd=folder), "wb") as file:
                    file.writelines(_lines(export, items))
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=folder)
                raise
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        raise BadSpecError(
            f"{_FIELD}.path is {export.path!r}, but a link or something of another kind lies there; "
            "expected a free name, and folders above it",
            hint="Choose another path.",
        ) from error
    path = str(out_dir / export.path)
    entry: JsonObject = {
        "path": path,
        "worker_path": path,
        "relative_path": export.path,
        "record_count": len(items),
        "fields": list(export.fields),
    }
    return entry, Artifact(path=export.path, key=EXPORT_KEY, kind="file")


@contextlib.contextmanager
def _opened(root: Path, folders: Sequence[str]) -> Iterator[int]:
    """Open a folder below `root`, made where it is missing. No link below `root` is followed."""
    folder = os.open(root, _FOLDER)
    try:
        for name in folders:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=folder)
            below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def _lines(export: JsonlExport, items: Sequence[JsonObject]) -> Iterator[bytes]:
    for index, item in enumerate(items):
        record = {name: source.text_in(item) for name, source in export.fields.items()}
        blank = next((name for name in export.required_fields if not record[name].strip()), None)
        if blank is not None:
            cause = f" (the item failed: {str(item['error'])[:_LONGEST_PATH]})" if item.get("error") else ""
            raise BadDataError(
                f"item {index}: the field {blank!r} of {_FIELD} is blank{cause}; expected text, because it is in "
                "'required_fields'",
                hint="Give the field a fallback, or take it out of 'required_fields'.",
            )
        # A broken tokenizer can give lone surrogates, which UTF-8 does not know.
        yield json_text(record).translate(_LINE_ENDS).encode(errors="replace") + b"\n"


def _named(text: str) -> JsonObject:
    """The object form of a source string."""
    head, _, key = text.partition(".")
    if text in {"prompt", "output"}:
        return {"from": text}
    if head in {"metadata", "item"} and key:
        return {"from": head, "key": key}
    return {"from": "literal", "value": text}


def _depth(value: object) -> int:
    """How many fallbacks an object has in each other; stops counting when there are too many."""
    depth = 0
    while isinstance(value, Mapping) and depth <= _MOST_FALLBACKS:
        value = value.get("fallback")
        depth += value is not None
    return depth


def _look_up(value: JsonValue, key: str) -> JsonValue:
    """Find a key, or with an empty key the value itself."""
    while key:
        if not isinstance(value, dict):
            return None
        if key in value:
            return value[key]
        head, _, key = key.partition(".")
        if not key:
            return None
        value = value.get(head)
    return value


def _text(value: JsonValue) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json_text(value)
