"""The processes of one training: started together, listened to, and ended together, whatever happens."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from executors.child_messages import LONGEST_MESSAGE
from executors.contract import Failure, RunReport
from executors.errors import TaskCancelledError
from executors.failure_report import ReportedFailureError
from executors.training.ranks.rank_ending import MARK, adopting_orphans, children, end_marked
from executors.training.ranks.rank_logs import RankLogs, log_name
from executors.training.ranks.rank_messages import (
    Hello,
    RankDone,
    RankFailed,
    RankLog,
    RankMessage,
    RankProgress,
    RankWarning,
    from_rank,
)
from executors.training.training_job import TrainingJob, TrainingOutcome

_POLL_SEC: Final = 0.1
_SEND_SEC: Final = 30.0
_STATUS_SEC: Final = 2.0
"""How long the exit status of a lost rank is waited for: torchrun looks at its ranks now and then."""
_END_SEC: Final = 10.0
"""How long processes may take to end by themselves when all is done."""
_LONGEST_SOCKET_PATH: Final = 100
"""Bytes."""


class RanksOutOfMemoryError(ReportedFailureError):
    """A rank ran out of memory: a smaller batch may help.

    Args:
        told: what the rank said.
        rank: which.
    """

    def __init__(self, told: RankFailed, rank: int) -> None:
        super().__init__(told.failure)
        self.memory = told.memory
        self.rank = rank


@dataclass
class _Link:
    """The launcher's end of the connection to one rank."""

    connection: socket.socket
    rank: int | None = None
    partial: bytearray = field(default_factory=bytearray)
    done: bool = False


class RankGroup:
    """Runs one job in fresh processes, so that their memory is certainly free afterwards.

    A process runs one group at a time: at its end the group takes the exit status of every child that it has not found.

    Args:
        command: makes the command line for a socket's path; its processes inherit this one's environment.
        ranks: how many connect.
        job: what each of them gets.
        log_dir: an existing folder with their `rank<N>.log`.
        report: where their reports go; it is asked for a cancel.
    """

    def __init__(
        self,
        command: Callable[[Path], Sequence[str]],
        ranks: int,
        job: TrainingJob,
        log_dir: Path,
        report: RunReport,
    ) -> None:
        self._command = command
        self._ranks = ranks
        self._job = job
        self._report = report
        self._logs = RankLogs(log_dir, ranks, job.out_dir)
        self._links: list[_Link] = []
        self._outcome: TrainingOutcome | None = None
        self._done_at = math.inf
        self._warnings: list[str] = []
        self._failures: list[tuple[RankFailed, int]] = []

    def run(self) -> TrainingOutcome:
        """Start the ranks and stay until all of them are gone.

        Raises:
            TaskCancelledError: the task was asked to stop.
            ReportedFailureError: a rank failed or ended without a word; `RanksOutOfMemoryError` where memory ran out.
        """
        folder = _private_folder()
        try:
            with adopting_orphans():
                return self._run(folder / "ranks")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, address: Path) -> TrainingOutcome:
        mark, others = uuid.uuid4().hex, children()
        with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
            listener.bind(str(address))
            listener.listen(self._ranks)
            selector.register(listener, selectors.EVENT_READ)
            process = self._start(["env", f"{MARK}={mark}", *self._command(address)])
            try:
                return self._follow(process, selector)
            finally:
                process.kill()
                process.wait()
                self._end_rest(mark, others)
                for link in self._links:
                    link.connection.close()

    def _end_rest(self, mark: str, others: frozenset[int]) -> None:
        if left := end_marked(mark, others):
            pids = ", ".join(map(str, left))
            self._report.log("error", f"processes of the training survive SIGKILL: {pids}")

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._logs.started.open("ab") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def _follow(self, process: subprocess.Popen[bytes], selector: selectors.BaseSelector) -> TrainingOutcome:
        while True:
            if self._report.cancelled:
                raise TaskCancelledError("the task was asked to stop")
            ended = process.poll() is not None  # before the sockets are read: what it said last is still in them
            ready = selector.select(0 if ended else _POLL_SEC)
            lost = [rank for key, _ in ready if (rank := self._attend(key, selector)) is not None]
            if lost or self._failures:
                raise self._cause(lost, process)
            silent = ended and not ready
            if self._outcome is not None and (silent or self._all_done()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SEC)
                return self._outcome.model_copy(update={"warnings": [*self._outcome.warnings, *self._warnings]})
            if silent:
                raise self._lost(None, process)
            self._logs.cut()
            if (news := self._logs.news()) is not None:
                self._report.log("debug", news)  # whoever prints or writes is alive, however long it takes

    def _all_done(self) -> bool:
        """Whether nobody has more to say; the others get a moment after the first."""
        if time.monotonic() > self._done_at + _END_SEC:
            return True
        return sum(link.done for link in self._links) == self._ranks

    def _attend(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> int | None:
        """Let a rank in, or hear what one says; the rank, if it ended without its last word."""
        link: _Link | None = key.data
        if link is None:
            listener = key.fileobj
            assert isinstance(listener, socket.socket)  # noqa: S101 - tells the type checker what was registered
            connection, _ = listener.accept()
            connection.settimeout(_SEND_SEC)
            self._links.append(_Link(connection))
            selector.register(connection, selectors.EVENT_READ, self._links[-1])
            return None
        try:
            chunk = link.connection.recv(1 << 20)
        except OSError:
            chunk = b""
        if chunk:
            self._read(link, chunk)
            return None
        selector.unregister(link.connection)
        if link.done or self._outcome is not None:
            link.done = True
            return None
        return link.rank

    def _read(self, link: _Link, chunk: bytes) -> None:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            whole = bytes(link.partial) + line
            link.partial.clear()
            self._hear(link, whole)
        link.partial += rest
        if len(link.partial) > LONGEST_MESSAGE:
            raise self._garbled(link, f"a line of more than {LONGEST_MESSAGE} bytes")

    def _hear(self, link: _Link, line: bytes) -> None:
        try:
            message = from_rank.validate_json(line)
        except ValidationError as error:
            raise self._garbled(link, str(error).splitlines()[0]) from error
        if isinstance(message, Hello):
            self._welcome(link, message)
        elif link.rank is None or link.done:
            raise self._garbled(link, f"{message.type!r} out of turn")
        else:
            self._take(link, link.rank, message)

    def _welcome(self, link: _Link, hello: Hello) -> None:
        taken = {known.rank for known in self._links}
        if link.rank is not None or hello.rank >= self._ranks or hello.rank in taken:
            raise self._garbled(link, f"a greeting as rank {hello.rank} of {self._ranks}, which is not expected")
        link.rank = hello.rank
        self._report.log("debug", f"rank {hello.rank} of {self._ranks} has started, pid {hello.pid}")
        try:
            link.connection.sendall(self._job.model_dump_json().encode() + b"\n")
        except TimeoutError as error:
            raise self._deaf(hello.rank) from error
        except OSError:  # it has ended; that is seen when its socket is read
            pass

    def _take(self, link: _Link, rank: int, message: RankMessage) -> None:
        match message:
            case RankProgress() if rank == 0:
                known = {name: value for name, value in message.metrics.items() if math.isfinite(value)}
                self._report.progress(message.step, message.total, unit="steps", message=message.message, metrics=known)
            case RankLog():
                self._report.log(message.level, message.message)
            case RankWarning():
                if message.message not in self._warnings:  # every rank may have seen the same
                    self._warnings.append(message.message)
                    self._report.log("warning", message.message)
            case RankDone():
                link.done = True
                if rank == 0:
                    if message.outcome is None:
                        raise self._garbled(link, "'done' of rank 0 without an outcome")
                    self._outcome, self._done_at = message.outcome, time.monotonic()
            case RankFailed():
                link.done = True
                self._failures.append((message, rank))
            case _:  # the progress of another rank
                pass

    def _cause(self, lost: Sequence[int], process: subprocess.Popen[bytes]) -> ReportedFailureError:
        """What to report when ranks have failed, or have ended without a word, at about the same time.

        Of a rank that fails because another is gone comes an error of the network, so that the lost one counts more.
        """
        for message, rank in self._failures:
            if message.foreseen or message.out_of_memory:
                return self._failed(message, rank)
        return self._lost(lost[0], process) if lost else self._failed(*self._failures[0])

    def _failed(self, message: RankFailed, rank: int) -> ReportedFailureError:
        failure = message.failure
        if not message.foreseen:
            failure = failure.model_copy(update={"log_tail": self._logs.tail(rank)})
        told = message.model_copy(update={"failure": failure})
        return RanksOutOfMemoryError(told, rank) if message.out_of_memory else ReportedFailureError(failure)

    def _garbled(self, link: _Link, what: str) -> ReportedFailureError:
        who = "a rank" if link.rank is None else f"rank {link.rank}"
        return ReportedFailureError(
            Failure(
                reason="engine_protocol",
                message=f"{who} of the training sent something that is no message: {what}",
                hint="this is a fault of the worker, or of code that the task brought along",
                log_tail=() if link.rank is None else self._logs.tail(link.rank),
            )
        )

    def _deaf(self, rank: int) -> ReportedFailureError:
        """What to say of a rank that has only a part of its job and would wait for the rest for ever."""
        return ReportedFailureError(
            Failure(
                reason="engine_crash",
                message=f"rank {rank} did not read its job within {_SEND_SEC:g} s",
                hint="the worker's host may be overloaded: send the task again",
                retryable=True,
                log_tail=self._logs.tail(rank),
            )
        )

    def _lost(self, rank: int | None, process: subprocess.Popen[bytes]) -> ReportedFailureError:
        """What to say of a rank, or of all, that ended without a word."""
        deadline = time.monotonic() + _STATUS_SEC
        while (told := self._logs.torchrun_says()) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SEC / 5)
        rank, status = told or (rank, process.poll() if rank is None or self._ranks == 1 else None)
        who = "the training's process" if rank is None else f"rank {rank}"
        hint = f"its output is in the task's logs/{self._logs.started.name if rank is None else log_name(rank)}"
        if status == -signal.SIGKILL:
            hint = f"look at `dmesg` for the out-of-memory killer; {hint}"
        failure = Failure(
            reason="engine_crash",
            message=f"{who} ended {_how(status)} in the middle of the training",
            hint=hint,
            retryable=True,
            log_tail=self._logs.tail(rank),
        )
        return ReportedFailureError(failure)


def _how(status: int | None) -> str:
    if status is None:
        return "without a word"
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"


def _private_folder() -> Path:
    """A new folder that nobody else may look into, with a path that is short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    if len(os.fsencode(folder)) <= _LONGEST_SOCKET_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="ranks-", dir="/tmp"))
