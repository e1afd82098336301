"""How the command line shows workers, tasks and the doctor's findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from orchestrator_client.task_states import TaskState, WorkerState
from worker.commands.doctor_checks import Finding
from worker.commands.text_screen import complain, duration, say, show_fields, show_table
from worker.commands.watch_views import progress_text


def show_workers(workers: Sequence[WorkerState]) -> None:
    """One row for each worker."""
    show_table(
        ("worker", "heartbeat", "status", "task", "GPUs", "cost/h", "uptime", "tags"),
        [
            (
                worker.worker_id,
                "alive" if worker.alive else "stale",
                worker.status or "-",
                worker.task_id or "-",
                _gpus(worker.gpus),
                "-" if worker.cost_per_hour is None else f"{worker.cost_per_hour:g}",
                duration(worker.uptime_sec()) if worker.alive else "-",
                ", ".join(worker.tags) or "-",
            )
            for worker in workers
        ],
    )


def show_task(state: TaskState) -> None:
    """Everything that is known of one task."""
    show_fields(
        [
            ("task", state.task_id),
            ("status", state.status),
            ("type", state.task_type),
            ("worker", state.worker_id),
            ("accepted", state.accepted_at),
            ("started", state.started_at),
            ("finished", state.finished_at),
            ("progress", progress_text(state.progress)),
            ("engine", state.engine),
            ("error", state.error),
            ("reason", state.reason),
            ("hint", state.hint),
            ("result", state.result_path),
        ]
    )


def show_outcome(state: TaskState) -> None:
    """How a task that somebody waited for has ended; what went wrong goes to stderr."""
    if state.status == "SUCCEEDED":
        say(f"task {state.task_id} succeeded on {state.worker_id}", style="green")
        if state.result_path:
            say(f"result: {state.result_path}")
        return
    complain(f"task {state.task_id} failed on {state.worker_id}: {state.error or 'no error text was given'}")
    if state.reason:
        complain(f"reason: {state.reason}")
    if state.hint:
        complain(f"next: {state.hint}")
    if state.result_path:
        say(f"result: {state.result_path}")


def show_findings(findings: Sequence[Finding]) -> None:
    """One line for each check; below a bad one what to do."""
    width = max((len(found.subject) for found in findings), default=0)
    styles = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    for found in findings:
        say(f"{found.level:<4}  {found.subject:<{width}}  {found.message}", style=styles[found.level])
        if found.fix:
            say(f"      {'':<{width}}  fix: {found.fix}")
    counts = Counter(found.level for found in findings)
    say(f"{counts['OK']} fine, {counts['WARN']} to look at, {counts['FAIL']} to mend")


def _gpus(names: Sequence[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items()) or "none"
