"""What a task needs that lies elsewhere: checkpoints, adapters, JSONL files (WIRE 4.3, 4.4, 4.9)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from executors.task_spec import Headers, SpecSection, lower

InputKind = Literal["checkpoint", "adapter", "file"]
ArchiveFormat = Literal["auto", "zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "none"]


class InputRequest(BaseModel):
    """One thing to be found before the task runs: local paths first, then another task's folder, then the URL.

    Attributes:
        name: the spec's key, for example `checkpoint.load`; also the name in `ExecutorTask.inputs` and in error texts.
        kind: a checkpoint and an adapter are folders in the end (a checkpoint may be one file); a file stays one.
        paths: local candidates in order; those that do not exist, or may not be read, are passed over.
        task_id: a task whose folder on this worker may hold it; empty: none.
        url: where to fetch it; empty: nowhere. When it is empty and `filename` and `task_id` are set, the URL is built
            from ORCHESTRATOR_BASE_URL.
        filename: its name on the server or here; empty: from the URL.
        base_url: replaces ORCHESTRATOR_BASE_URL in that URL.
        headers: sent to the URL's own origin only.
        timeout_sec: of one operation on the connection; None is 60 s.
        sha256: digest that the fetched file must have; empty: not checked.
        archive_format: what the fetched file is.
        subdir: folder inside the archive; empty: its single top-level folder, or all of it.
        with_token: whether ORCHESTRATOR_TOKEN goes with it (to the orchestrator's own origin only).
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: InputKind
    paths: tuple[str, ...] = ()
    task_id: str = ""
    url: str = ""
    filename: str = ""
    base_url: str = ""
    headers: dict[str, str] = Field(default_factory=dict)
    timeout_sec: float | None = None
    sha256: str = ""
    archive_format: ArchiveFormat = "auto"
    subdir: str = ""
    with_token: bool = True


# What follows comes from outside and may hold secrets. Errors raised as ValueError are shown without the value.

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_TASK_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@=+-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_NAME = 200


def _one_line(value: str) -> str:
    if _UNPRINTABLE.search(value):
        raise ValueError("holds a control character; expected plain text")
    return value


def _file_name(value: str) -> str:
    if value in {".", ".."} or re.search(r"[/\\]", _one_line(value)) or len(value) > _LONGEST_NAME:
        raise ValueError(f"is no file name; expected at most {_LONGEST_NAME} characters without a slash")
    return value


def _task_id(value: str) -> str:
    if not _TASK_ID.fullmatch(value):
        raise ValueError(
            "is no task id; expected letters, digits and . _ @ = + -, at most 200, not starting with a dot"
        )
    return value


def _inner_folder(value: str) -> str:
    if _one_line(value).startswith("/") or ".." in PurePosixPath(value).parts or "\\" in value:
        raise ValueError("leaves the archive; expected a relative folder without '..'")
    return value


def _digest(value: str) -> str:
    digest = value.strip().lower().removeprefix("sha256:")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("is no SHA-256 digest; expected 64 hex digits")
    return digest


Line = Annotated[str, AfterValidator(_one_line)]
FileName = Annotated[str, AfterValidator(_file_name)]
TaskReference = Annotated[str, AfterValidator(_task_id)]
InnerFolder = Annotated[str, AfterValidator(_inner_folder)]
Digest = Annotated[str, AfterValidator(_digest)]
Seconds = Annotated[float, Field(gt=0)]


def _is_url(value: str) -> bool:
    """Whether a candidate is an address; `/api/v1/…` is one of the orchestrator's own (WIRE 6, row "Order")."""
    return "://" in value or value.startswith("/api/v1/")


def _sorted(candidates: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Return the local paths in order, each once, and the first URL."""
    given = list(dict.fromkeys(filter(None, candidates)))
    return tuple(each for each in given if not _is_url(each)), next(filter(_is_url, given), "")


class _InputSection(SpecSection):
    """Base: a blank value counts as absent like a null, and so does a second name for the same thing."""

    same: ClassVar[dict[str, tuple[str, ...]]] = {"taskId": ("taskId", "task_id")}
    """All names of a key; the first that is given wins."""

    @model_validator(mode="before")
    @classmethod
    def _fold(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            raise ValueError("expected an object, for instance with path, taskId or url")  # noqa: TRY004 - for pydantic
        kept = {key: item for key, item in value.items() if not (isinstance(item, str) and not item.strip())}
        for key, names in cls.same.items():
            found = [kept.pop(name) for name in names if kept.get(name) is not None]
            if found:
                kept[key] = found[0]
        return kept


class _FetchedFolder(_InputSection):
    """What checkpoints and adapters have in common."""

    path: Line = ""
    task_id: TaskReference = Field(default="", alias="taskId")
    url: Line = ""
    filename: FileName = ""
    base_url: Line = ""
    headers: Headers = Field(default_factory=dict, repr=False)
    timeout_sec: Seconds | None = Field(default=None, alias="timeoutSec")
    archive_format: Annotated[ArchiveFormat, BeforeValidator(lower)] = "auto"
    subdir: InnerFolder = ""
    sha256: Digest = ""

    def _request(self, name: str, kind: InputKind, candidates: Iterable[str]) -> InputRequest:
        # A `url` of another scheme stays a URL, so that its refusal says so.
        paths, url = _sorted(candidates)
        return InputRequest(
            name=name,
            kind=kind,
            paths=paths,
            url=self.url or url,
            **self.model_dump(include=_PASSED_ON, by_alias=False),
        )


_PASSED_ON = {"task_id", "filename", "base_url", "headers", "timeout_sec", "sha256", "archive_format", "subdir"}


class CheckpointLoad(_FetchedFolder):
    """`checkpoint.load` (WIRE 4.9): weights to start from. Its `type` decides nothing: all that is given is tried.

    Raises:
        pydantic.ValidationError: nothing to look for is given, or a name would leave its folder.
    """

    type: Annotated[Literal["local", "http"], BeforeValidator(lower)] | None = None
    uri: Line = ""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not (self.path or self.uri or self.task_id or self.url):
            raise ValueError("names nothing to load; expected at least one of path, taskId and url")
        return self

    @property
    def shown_name(self) -> str:
        """A short name for people: the last part of path or URL, or the task id."""
        paths, url = _sorted((self.path, self.uri))
        address = re.split(r"[?#]", (self.url or url).partition("://")[2])[0]
        last = unquote(PurePosixPath(address.partition("/")[2]).name)  # never the host, which may hold a password
        names = (*(PurePosixPath(path).name for path in paths), self.filename, last, self.task_id)
        return next(filter(None, names), "checkpoint")

    @property
    def identity(self) -> str:
        """Digest of all that decides which files these are; it holds no secret."""
        asked = self.request("").model_dump_json(exclude={"headers", "timeout_sec", "with_token"})
        return hashlib.sha256(asked.encode()).hexdigest()

    def request(self, name: str) -> InputRequest:
        """What to find.

        Args:
            name: the spec's key, which becomes the name in `ExecutorTask.inputs`.
        """
        return self._request(name, "checkpoint", (self.path, self.uri))


class AdapterEntry(_FetchedFolder):
    """One entry of `model.adapters` (WIRE 4.3). Those of another type than `lora` are to be skipped.

    Attributes:
        name: what the adapter is called; `id` and `adapter_id` are other words for it.
        apply: used at run time, or merged into the weights.
        scale: factor on its effect.

    Raises:
        pydantic.ValidationError: a LoRA adapter that names nothing to look for, or a name that would leave its folder.
    """

    same: ClassVar[dict[str, tuple[str, ...]]] = {"taskId": ("taskId", "task_id"), "name": ("name", "id", "adapter_id")}

    type: Annotated[str, BeforeValidator(lower)] = "lora"
    name: FileName = ""
    apply: Annotated[Literal["runtime", "merge"], BeforeValidator(lower)] = "runtime"
    scale: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _name_as_text(cls, value: object) -> object:
        # Reference engines want integer ids, so task files give such.
        if not isinstance(value, Mapping):
            return value
        numbers = {
            key: str(item)
            for key, item in value.items()
            if key in {"name", "id", "adapter_id"} and isinstance(item, int) and not isinstance(item, bool)
        }
        return {**value, **numbers}

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.type == "lora" and not (self.path or self.task_id or self.url):
            raise ValueError("names no adapter to load; expected at least one of path, taskId and url")
        return self

    def request(self, name: str) -> InputRequest:
        """What to find.

        Args:
            name: the spec's key, for instance `model.adapters[0]`; the name in `ExecutorTask.inputs`.
        """
        return self._request(name, "adapter", (self.path,))


class JsonlSource(_InputSection):
    """Where `data.jsonl` lies (WIRE 4.4); the sections of single kinds of task add their columns.

    Local paths are tried before URLs. Of several URLs the first of `download_url`, `url`, `path`, `worker_path` counts.

    Raises:
        pydantic.ValidationError: nothing to look for is given.
    """

    same: ClassVar[dict[str, tuple[str, ...]]] = {
        "taskId": ("taskId", "task_id"),
        "headers": ("download_headers", "headers"),
        "timeoutSec": ("download_timeoutSec", "timeoutSec", "timeout"),
    }

    download_url: Line = ""
    url: Line = ""
    path: Line = ""
    worker_path: Line = ""
    task_id: TaskReference = Field(default="", alias="taskId")
    filename: FileName = ""
    headers: Headers = Field(default_factory=dict, repr=False)
    timeout_sec: Seconds | None = Field(default=None, alias="timeoutSec")
    archive_format: Annotated[ArchiveFormat, BeforeValidator(lower)] = "none"
    sha256: Digest = ""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not (self.download_url or self.url or self.path or self.worker_path or (self.task_id and self.filename)):
            raise ValueError(
                "names no file; expected at least one of download_url, url, path and worker_path, "
                "or taskId with filename"
            )
        return self

    def request(self, name: str) -> InputRequest:
        """What to find.

        Args:
            name: the spec's key, which becomes the name in `ExecutorTask.inputs`.
        """
        paths, url = _sorted((self.download_url, self.url, self.path, self.worker_path))
        return InputRequest(
            name=name,
            kind="file",
            paths=paths,
            url=url,
            **self.model_dump(include=_PASSED_ON & type(self).model_fields.keys(), by_alias=False),
        )
