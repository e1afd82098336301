"""The commands of `flowmesh-worker` for people: submit, look, cancel, diagnose. Never imported by the daemon."""
# ruff: noqa: FBT002 -- typer reads flags from boolean parameters with defaults

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from pydantic import BaseModel

from orchestrator_client.errors import WireError
from orchestrator_client.messages import TASK_ID_PATTERN
from orchestrator_client.task_client import TaskClient, TaskOrder
from orchestrator_client.task_states import TaskState
from worker import exit_codes
from worker.commands import demo_run, doctor_checks
from worker.commands.state_tables import show_findings, show_outcome, show_task, show_workers
from worker.commands.task_files import TaskFileError, load_task
from worker.commands.task_watch import (
    NotTakenError,
    StillRunningError,
    order_delivery,
    submit_order,
    wait_for_end,
)
from worker.commands.text_screen import complain, say
from worker.commands.watch_views import watch_view
from worker.settings import SettingsError, read_broker_settings

_CANCEL_WITHIN_SEC = 30.0
_LOOK_EVERY_SEC = 0.2

EXIT_CODES = (
    (exit_codes.OK, "done; the task succeeded; a worker that was told to stop has stopped"),
    (exit_codes.FAILED, "the task failed, is unknown, open or could not be cancelled; a check of doctor failed"),
    (exit_codes.USAGE, "the command line or the task file is wrong"),
    (exit_codes.UNAVAILABLE, "no broker answers, no worker takes the task, or none has a result to deliver"),
    (exit_codes.CRASHED, "a fault of the program itself"),
    (exit_codes.ID_IN_USE, "run: another live process has this WORKER_ID"),
    (exit_codes.BAD_CONFIG, "a setting is missing or wrong"),
    (exit_codes.TIMED_OUT, "submit --wait or deliver, with --timeout: the time is over, the task goes on"),
    (exit_codes.INTERRUPTED, "Ctrl-C"),
)
"""Every way to end, for `--help` and docs/configuration.md."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, the same on a terminal and in a file
    help="Run a worker for LLM tasks, and look after tasks and workers through the broker (REDIS_URL).",
    epilog="\b\nExit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES),
)

Broker = Annotated[str, typer.Option("--broker", metavar="URL", help="The broker; default: REDIS_URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TaskIdArgument = Annotated[str, typer.Argument(metavar="ID", help="The task's id.")]


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def run() -> None:
    """Run the worker itself, as `python worker/main.py`. Its `--help` lists every setting."""
    # Listed here only: command_line.main starts the daemon before this module is imported.
    _fail("`run` must be the first word: flowmesh-worker run", exit_codes.USAGE)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave broker and worker running until Ctrl-C.")] = False,
) -> None:
    """Start a broker and a worker here and let a small model answer some questions."""
    raise typer.Exit(demo_run.run_demo(keep=keep))


@app.command()
def submit(  # noqa: PLR0913 - each is one option of the command
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Task in YAML or JSON, whole or just its spec; - is stdin.")
    ],
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress and wait for the end.")] = False,
    worker: Annotated[str, typer.Option(metavar="ID", help="The worker that shall run it; default: any.")] = "",
    task_id: Annotated[str, typer.Option(metavar="ID", help="The task's id; default: a new UUID.")] = "",
    timeout: Annotated[
        float | None, typer.Option(metavar="SEC", min=0, help="With --wait: how long to wait; default: for ever.")
    ] = None,
    broker: Broker = "",
) -> None:
    """Hand a task to the workers."""
    task = load_task(file)
    order = TaskOrder(task=task, worker_id=worker, task_id=_checked_id(task_id)) if task_id else TaskOrder(task, worker)
    with _client(broker) as client:
        if worker:
            _require_worker(client, worker)
        if task_id and (known := client.task(task_id)) is not None and known.status in {"QUEUED", "RUNNING"}:
            _fail(f"task {task_id} is {known.status} on {known.worker_id} already", exit_codes.FAILED)
        state = _submit(client, order, wait=wait, timeout_sec=timeout)
    if not state.ended:
        say(f"task {state.task_id} is {state.status.lower()} on {state.worker_id}")
        say(f"look at it: flowmesh-worker task {state.task_id}")
        return
    show_outcome(state)
    raise typer.Exit(exit_codes.OK if state.status == "SUCCEEDED" else exit_codes.FAILED)


@app.command()
def workers(*, as_json: AsJson = False, broker: Broker = "") -> None:
    """List the registered workers."""
    with _client(broker) as client:
        found = client.workers()
    if as_json:
        _print_json(found)
    elif found:
        show_workers(found)
    else:
        say("no worker is registered; start one: flowmesh-worker run")


@app.command()
def task(task_id: TaskIdArgument, *, as_json: AsJson = False, broker: Broker = "") -> None:
    """Show one task's state."""
    with _client(broker) as client:
        state = client.task(_checked_id(task_id))
    if state is None:
        _fail(f"the broker knows no task {task_id}: never accepted, or ended more than a day ago", exit_codes.FAILED)
    if as_json:
        _print_json(state)
    else:
        show_task(state)


@app.command()
def cancel(
    task_id: TaskIdArgument,
    *,
    timeout: Annotated[
        float, typer.Option(metavar="SEC", min=0, help="How long to wait for the end.")
    ] = _CANCEL_WITHIN_SEC,
    broker: Broker = "",
) -> None:
    """Stop a task: queued, running or being delivered."""
    _checked_id(task_id)
    with _client(broker) as client:
        before = client.task(task_id)
        if before is not None and before.ended:
            _report_cancelled(before)
        heard = client.cancel(task_id)
        if heard == 0:
            _fail(f"no worker listens, so nobody can cancel task {task_id}", exit_codes.UNAVAILABLE)
        if before is None:
            _fail(
                f"the broker knows no task {task_id}; the {heard} listening were asked to cancel it all the same",
                exit_codes.FAILED,
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = client.task(task_id)
            if state is not None and state.ended:
                _report_cancelled(state)
            time.sleep(_LOOK_EVERY_SEC)
    _fail(
        f"task {task_id} was asked to stop and has not ended within {timeout:.0f} s; "
        f"look again: flowmesh-worker task {task_id}",
        exit_codes.FAILED,
    )


@app.command()
def deliver(
    task_id: TaskIdArgument,
    *,
    timeout: Annotated[
        float | None, typer.Option(metavar="SEC", min=0, help="How long to wait for the end; default: for ever.")
    ] = None,
    broker: Broker = "",
) -> None:
    """Send the result of a task again whose delivery failed; nothing is run again."""
    _checked_id(task_id)
    with _client(broker) as client:
        before = client.task(task_id)
        if before is not None and before.status == "SUCCEEDED":
            say(f"task {task_id} has succeeded; there is nothing left to deliver")
            return
        with client.events(task_id) as events, watch_view() as view:
            if before is None or before.ended:
                order_delivery(client, task_id, before, view)
            state = wait_for_end(client, task_id, events, view, timeout_sec=timeout)
    show_outcome(state)
    raise typer.Exit(exit_codes.OK if state.status == "SUCCEEDED" else exit_codes.FAILED)


@app.command()
def doctor(*, as_json: AsJson = False, broker: Broker = "") -> None:
    """Check this host for everything a worker needs; each problem comes with its fix."""
    findings = doctor_checks.examine(broker)
    if as_json:
        _print_json(findings)
    else:
        show_findings(findings)
    raise typer.Exit(exit_codes.FAILED if any(found.level == "FAIL" for found in findings) else exit_codes.OK)


def run_client(arguments: list[str]) -> int:
    """Run one command; every foreseeable failure is one line on stderr and an exit code.

    Args:
        arguments: what follows the program's name.
    """
    try:
        app(args=arguments, prog_name="flowmesh-worker")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else exit_codes.OK
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - here every failure becomes one line and an exit code
        return _explain(error)
    return exit_codes.OK


_FORESEEN: tuple[tuple[type[Exception], int, str], ...] = (
    (SettingsError, exit_codes.BAD_CONFIG, ""),
    (TaskFileError, exit_codes.USAGE, ""),
    (NotTakenError, exit_codes.UNAVAILABLE, ""),
    (StillRunningError, exit_codes.TIMED_OUT, ""),
    (WireError, exit_codes.UNAVAILABLE, "; is REDIS_URL or --broker right? `flowmesh-worker doctor` looks closer"),
)


def _explain(error: Exception) -> int:
    for kind, code, advice in _FORESEEN:
        if isinstance(error, kind):
            complain(" ".join(f"{error}{advice}".split()))
            return code
    complain("a fault of the program itself; please report these lines")
    sys.stderr.write("".join(traceback.format_exception(error)))
    return exit_codes.CRASHED


def _client(broker: str) -> TaskClient:
    settings = read_broker_settings(broker)
    return TaskClient(settings.redis_url.get_secret_value(), topic=settings.task_topic)


def _submit(client: TaskClient, order: TaskOrder, *, wait: bool, timeout_sec: float | None) -> TaskState:
    with client.events(order.task_id) as events, watch_view() as view:
        try:
            state = submit_order(client, order, events, view)
            if not wait or state.ended:
                return state
            view.status(f"task {order.task_id} is taken by {state.worker_id}")
            return wait_for_end(client, order.task_id, events, view, timeout_sec=timeout_sec)
        except KeyboardInterrupt:
            view.note(f"no longer waiting; the task goes on. Stop it: flowmesh-worker cancel {order.task_id}")
            raise


def _require_worker(client: TaskClient, worker_id: str) -> None:
    found = client.workers()
    match = next((worker for worker in found if worker.worker_id == worker_id), None)
    if match is None:
        names = ", ".join(worker.worker_id for worker in found if worker.alive) or "none"
        _fail(f"no worker {worker_id!r} is registered; alive: {names}", exit_codes.UNAVAILABLE)
    if not match.alive:
        _fail(f"worker {worker_id!r} has no heartbeat: it is not running", exit_codes.UNAVAILABLE)


def _report_cancelled(state: TaskState) -> NoReturn:
    if state.reason == "cancelled":
        say(f"task {state.task_id} is cancelled")
        raise typer.Exit(exit_codes.OK)
    _fail(f"task {state.task_id} is not cancelled, it has ended: {state.status}", exit_codes.FAILED)


def _checked_id(task_id: str) -> str:
    if not re.match(TASK_ID_PATTERN, task_id):
        raise typer.BadParameter(f"{task_id!r} is no task id: expected letters, digits and . _ : @ = + -, at most 200")
    return task_id


def _fail(text: str, code: int) -> NoReturn:
    complain(text)
    raise typer.Exit(code)


def _print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    shown = (
        value.model_dump(mode="json")
        if isinstance(value, BaseModel)
        else [one.model_dump(mode="json") for one in value]
    )
    sys.stdout.write(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
