"""What `responses.json` says of a task and of its merged children (WIRE 5.2)."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from executors.contract import Artifact, Failure, JsonObject
from worker.results_folder import ResultToWrite
from worker.task_preparation import Folder, PreparedTask
from worker.task_record import Outcome, Success, TaskRecord, error_text

_SENDABLE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""What an orchestrator takes for a file's name (WIRE 6)."""
ARCHIVE_SUFFIX: Final = ".tar.gz"
_MOST_SHOWN: Final = 200


def results_of(
    record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None
) -> list[ResultToWrite]:
    """A task's results. Children first: whoever sees the parent's result finds the children's."""
    timings = _timings(record, outcome)
    warnings: list[JsonValue] = [*(prepared.warnings if prepared else [])]
    children: list[ResultToWrite] = []
    if isinstance(outcome, Success):
        warnings += outcome.output.warnings
        if prepared is not None:
            children = _children(outcome, prepared, timings)
        paths = _paths(outcome.output.artifacts, folder.path)
        result = {**paths, **outcome.output.result, "task_id": record.task_id, "timings": timings, "warnings": warnings}
    else:
        result = {**failed_result(record.task_id, outcome), "timings": timings, "warnings": warnings}
    return [*children, _to_write(record.task_id, folder, result)]


def _children(outcome: Success, prepared: PreparedTask, timings: JsonObject) -> list[ResultToWrite]:
    results = []
    for child_id, folder in prepared.child_folders.items():
        output = outcome.output.children.get(child_id)
        if output is not None and output.result is not None:
            paths = _paths(output.artifacts, folder.path)
            result = {**paths, **output.result, "task_id": child_id, "timings": timings, "warnings": []}
        elif output is not None and output.failure is not None:
            result = failed_result(child_id, output.failure)
        else:
            silent = Failure(
                reason="executor_error", message=f"the executor returned nothing for merged child {child_id}"
            )
            result = failed_result(child_id, silent)
        results.append(_to_write(child_id, folder, result))
    for child_id, failed in prepared.failed_children.items():
        results.append(_to_write(child_id, failed.folder, failed_result(child_id, failed.failure)))
    return results


def _to_write(task_id: str, folder: Folder, result: JsonObject) -> ResultToWrite:
    # Who shares the disk with an orchestrator finds what a sent result would look like there (WIRE 3.1).
    return ResultToWrite(folder.path, task_id, result, folder.required, wrapped=folder.destination is None)


def _paths(artifacts: tuple[Artifact, ...], folder: Path) -> JsonObject:
    return {f"{each.key}_path": str(folder / each.path) for each in artifacts if each.kind == "folder"}


def artifact_fault(outcome: Success, folder: Path, child_folders: dict[str, Folder]) -> Failure | None:
    """What is wrong with the artifacts that an executor named; None if nothing is."""
    named = [(folder, outcome.output.artifacts)]
    for child_id, child in child_folders.items():
        output = outcome.output.children.get(child_id)
        if output is not None:
            named.append((child.path, output.artifacts))
    for parent, artifacts in named:
        sent: set[str] = set()
        for artifact in artifacts:
            name = Path(artifact.path).name + (ARCHIVE_SUFFIX if artifact.kind == "folder" else "")
            problem = _problem(artifact, parent, name)
            if not problem and name in sent:
                problem = f"would be sent as {name!r}, like another one"
            sent.add(name)
            if problem:
                text = f"the executor names the artifact {artifact.path[:_MOST_SHOWN]!r}, which {problem}"
                return Failure(reason="executor_error", message=text)
    return None


def _problem(artifact: Artifact, parent: Path, name: str) -> str:
    """What is wrong with one artifact; empty if nothing is."""
    try:
        resolved, root = (parent / artifact.path).resolve(), parent.resolve()
        if resolved == root or not resolved.is_relative_to(root):
            return "lies outside the task's folder"
        if not (resolved.is_dir() if artifact.kind == "folder" else resolved.is_file()):
            return f"is no {artifact.kind}, or is not there"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a loop of links
        return f"cannot be looked up: {error}"
    if not _SENDABLE.fullmatch(name):
        return "has a name that cannot be sent: expected letters, digits, '.', '-' and '_'"
    return ""


def failed_result(task_id: str, failure: Failure) -> JsonObject:
    """`responses.json` of a task that failed."""
    return {
        "ok": False,
        "task_id": task_id,
        "error": error_text(failure),
        "reason": failure.reason,
        "hint": failure.hint,
        "retryable": failure.retryable,
        "log_tail": list(failure.log_tail),
    }


def _timings(record: TaskRecord, outcome: Outcome) -> JsonObject:
    timings: JsonObject = {"queue_sec": round((record.started or time.monotonic()) - record.received, 6)}
    if isinstance(outcome, Success):
        timings["load_sec"] = round(outcome.load_sec, 6)
        timings["run_sec"] = round(outcome.run_sec, 6)
        timings["engine"] = "warm" if outcome.warm else "cold"
    return timings
