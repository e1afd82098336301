"""What has to reach an orchestrator for one task, and what of it has. The journal keeps both until all of it did."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from executors.contract import Failure, JsonObject
from executors.task_spec import Destination
from orchestrator_client.messages import SentEvent, TaskEvent, now_iso

BEST_EFFORT_SEC = 15.0
"""How long the summary of a failed task is tried: its failure must be known soon."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class Posting(_Stored):
    """One result, of the task or of a merged child, that lies on disk.

    Attributes:
        task_id: whose it is.
        folder: holds its `responses.json`.
        required: names that its sender wants to see in the manifest.
        destination: where it goes; None: it stays here.
    """

    task_id: str
    folder: Path
    required: tuple[str, ...] = ()
    destination: Destination | None = None


class Package(_Stored):
    """A folder to be archived, or a file, that goes with a result; see `executors.contract.Artifact`."""

    task_id: str
    path: str
    key: str
    kind: Literal["folder", "file"]


class DeliveryPlan(_Stored):
    """All that is to be done between the end of a run and its announcement.

    Attributes:
        task_id: the task.
        dispatch: the journal's token of the dispatch that this answers.
        kind: its type, for people.
        postings: results, children first, the task's own last.
        packages: what has to be there before the results are.
        event: the final event as JSON, said when all is done.
        fields: what the hash `task:<id>` says then.
        metadata: goes with each result.
        best_effort: the task failed; its summary is sent if that works at once, and its end is said in any case.
        work: see `worker.journal_tables.Arrival`.
    """

    task_id: str
    dispatch: str
    kind: str
    postings: tuple[Posting, ...]
    packages: tuple[Package, ...] = ()
    event: str
    fields: dict[str, str]
    metadata: JsonObject = Field(default_factory=dict)
    best_effort: bool = False
    work: str = ""

    def posting_of(self, package: Package) -> Posting:
        """The result that a package belongs to."""
        return next(posting for posting in self.postings if posting.task_id == package.task_id)

    def failed_event(self, failure: Failure, error: str) -> tuple[TaskEvent, dict[str, str]]:
        """What is said instead of `event` and `fields` when the delivery fails."""
        planned = SentEvent.model_validate_json(self.event)
        told: JsonObject = {"reason": failure.reason, "hint": failure.hint, "retryable": failure.retryable}
        event = TaskEvent(
            type="TASK_FAILED",
            task_id=self.task_id,
            worker_id=planned.worker_id,
            error=error,
            payload={**planned.payload, **told},
        )
        changed = {"status": "FAILED", "error": error, "reason": failure.reason, "hint": failure.hint}
        return event, {**self.fields, **changed, "finished_at": now_iso()}


class PackageState(_Stored):
    """How far one package is.

    Attributes:
        name: of the file that is sent.
        size_bytes: its size.
        sha256: its digest.
        url: where it can be fetched; None until it was acknowledged.
    """

    name: str
    size_bytes: int
    sha256: str
    url: str | None = None


class DeliveryProgress(_Stored):
    """How far a delivery is.

    Attributes:
        packages: by `package_key`.
        results_written: whether the results on disk hold what became known of the packages.
        posted: task id of each acknowledged result, with the URL that has it.
    """

    packages: dict[str, PackageState] = Field(default_factory=dict)
    results_written: bool = False
    posted: dict[str, str] = Field(default_factory=dict)


@dataclass
class DeliveryJob:
    """A delivery under way in this process.

    Attributes:
        plan: what is to be done.
        progress: what has been.
        since: when it began, seconds since the epoch; its patience counts from here, also across restarts.
        received: when the task came, on the monotonic clock; 0 when an earlier life received it.
        redirected: whether its plan has changed since the journal got it.
        resumed: whether an earlier life of the worker began it.
    """

    plan: DeliveryPlan
    progress: DeliveryProgress = field(default_factory=DeliveryProgress)
    since: float = field(default_factory=time.time)
    received: float = 0.0
    redirected: bool = False
    resumed: bool = False

    def send_to(self, destinations: Mapping[str, Destination]) -> bool:
        """Send results elsewhere: the task came again and names other destinations.

        Args:
            destinations: by task id; those of results that stay here do not count.

        Returns:
            Whether any was another one. Then patience begins anew.
        """
        postings = tuple(
            each.model_copy(update={"destination": destinations.get(each.task_id, each.destination)})
            if each.destination is not None
            else each
            for each in self.plan.postings
        )
        if postings == self.plan.postings:
            return False
        self.plan = self.plan.model_copy(update={"postings": postings})
        self.redirected = True
        self.since = time.time()
        return True


def package_key(package: Package) -> str:
    """Names a package within its delivery."""
    return f"{package.task_id}/{package.path}"


def work_digest(spec: JsonObject, children: dict[str, JsonObject]) -> str:
    """Digest of what a task computes: everything but where its results go."""
    parts: list[JsonValue] = [_computed(spec), {child_id: _computed(child) for child_id, child in children.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _computed(spec: JsonObject) -> JsonObject:
    return {key: value for key, value in spec.items() if key != "output"}


def result_keys(package: Package, state: PackageState, folder: Path, old: JsonValue) -> JsonObject:
    """What the result says of a package (WIRE 5.2).

    Args:
        package: the package.
        state: what is known of it.
        folder: the folder of its task.
        old: what the result holds under the package's key.
    """
    path = folder / package.path
    if package.kind == "folder":
        keys: JsonObject = {
            f"{package.key}_path": str(path),
            f"{package.key}_archive": state.name,
            f"{package.key}_archive_path": str(path.with_name(state.name)),
            f"{package.key}_archive_bytes": state.size_bytes,
            f"{package.key}_archive_sha256": state.sha256,
        }
        if state.url is not None:
            keys |= {f"{package.key}_archive_url": state.url, f"{package.key}_archive_uploaded": True}
        return keys
    facts: JsonObject = dict(old) if isinstance(old, dict) else {}
    facts |= {"worker_path": str(path), "bytes": state.size_bytes, "sha256": state.sha256}
    if state.url is not None:
        facts |= {
            "uploaded": True,
            "artifact_name": state.name,
            "host_path": f"artifacts/{state.name}",
            "path": state.url,
            "url": state.url,
            "download_url": state.url,
        }
    return {package.key: facts}
