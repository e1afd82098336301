"""What a task needs that lies elsewhere: checkpoints, adapters, JSONL files (WIRE 4.3, 4.4, 4.9)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
