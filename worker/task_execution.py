"""Runs one prepared task in an engine. Deadlines, silence, cancel and shutdown are all judged here.

To stop a task: ask the engine, wait `cancel_grace_sec`, then end the process with everything it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog

from executors.child_messages import Loaded, LogLine, Progress, RunTask, TaskDone, TaskFailed
from executors.contract import Failure
from worker.engine_end import Cause, EngineEnd, failure_of
from worker.engine_pool import EnginePool
from worker.engine_process import EngineProcess
from worker.results_folder import LOGS
from worker.task_mailbox import ChannelEnd, EngineMessage, TaskMailbox
from worker.task_preparation import PreparedTask, RejectedError
from worker.task_record import Outcome, Success

ENGINE_LOG: Final = "engine.log"
_END_STATUS_WAIT_SEC: Final = 2.0
_LONGEST_WAIT_SEC: Final = 60.0

StopCause = Literal["cancelled", "worker_shutdown", "timeout", "no_progress"]

log = structlog.get_logger()


@dataclass(frozen=True)
class Displaced:
    """The engine had to be ended because of another task, so that this one may run again.

    Attributes:
        by: the other task.
        failure: what to say if it may not.
    """

    by: str
    failure: Failure


@dataclass(frozen=True)
class _Verdict:
    outcome: Outcome | Displaced
    keep_engine: bool


class TaskExecution:
    """One run of one task.

    Args:
        prepared: the task.
        pool: where engines come from.
        cancel_grace_sec: how long it may take to obey before its engine is ended.
        on_progress: called for each progress message.
        fetch: gets what the task needs from elsewhere and returns the order for the engine; raises RejectedError.
    """

    def __init__(
        self,
        prepared: PreparedTask,
        pool: EnginePool,
        cancel_grace_sec: float,
        on_progress: Callable[[Progress], None],
        fetch: Callable[[], Coroutine[None, None, RunTask]],
    ) -> None:
        self._prepared = prepared
        self._fetch = fetch
        self._fetching: asyncio.Task[RunTask] | None = None
        self._task_id = prepared.order.task_id
        self._pool = pool
        self._cancel_grace_sec = cancel_grace_sec
        self._on_progress = on_progress
        self._stop_cause: StopCause | None = None
        self._stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._mailbox: TaskMailbox | None = None
        self._force_at: float | None = None
        self._warm = False
        self._load_sec = 0.0

    def stop(self, cause: StopCause, *, grace_sec: float | None = None) -> None:
        """Ask the task to stop; the first cause counts. Returns at once."""
        if self._stop_cause is None:
            self._stop_cause = cause
            self._stopping.set_result(None)
            self._force_at = time.monotonic() + (self._cancel_grace_sec if grace_sec is None else grace_sec)
            if self._fetching is not None:
                self._fetching.cancel()
            if self._mailbox is not None:
                self._mailbox.nudge()

    async def run(self) -> Outcome | Displaced:
        """Run to the end, whatever that is."""
        if (stopped := self._stopped()) is not None:
            return stopped
        began = time.monotonic()
        order = await self._order()
        if isinstance(order, Failure):
            return order
        try:
            engine = await self._engine(began)
        except OSError as error:  # no process, no descriptor, no memory to fork
            return Failure(reason="engine_crash", message=f"no engine process can be started: {error}", retryable=True)
        if isinstance(engine, Failure):
            return engine
        outcome = await self._run_in(engine, order, began)
        if isinstance(outcome, Displaced):  # it may have been stopped while the engine was being ended
            return self._stopped() or outcome
        return outcome

    async def _engine(self, began: float) -> EngineProcess | Failure:
        """An engine for the task, unless it has to stop before there is one.

        Raises:
            OSError: no process can be started.
        """
        prepared = self._prepared
        acquiring = asyncio.create_task(
            self._pool.acquire(
                prepared.engine_key,
                prepared.entry.target,
                exclusive=prepared.exclusive,
                concurrent=prepared.concurrent,
            )
        )
        limit = max(began + prepared.timeout_sec - time.monotonic(), 0.0) if prepared.timeout_sec else None
        taken = False
        try:
            either: tuple[asyncio.Future[Any], ...] = (acquiring, self._stopping)
            await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not acquiring.done():
                self.stop("timeout")  # if it was not stopped before
            if (stopped := self._stopped()) is not None:
                return stopped
            taken = True
            engine, self._warm = acquiring.result()
        finally:
            if not taken:
                self._pool.give_back_later(acquiring)
        return engine

    async def _run_in(self, engine: EngineProcess, order: RunTask, began: float) -> Outcome | Displaced:
        keep = False
        try:
            engine.output.attach(self._task_id, self._prepared.folder.path / LOGS / ENGINE_LOG)
            self._mailbox = engine.run(order)
            verdict = await self._follow(engine, self._mailbox, began)
            keep = verdict.keep_engine
        except OSError as error:
            return Failure(reason="result_write", message=f"cannot write the task's log: {error}", retryable=True)
        finally:
            engine.leave(self._task_id)
            engine.output.detach(self._task_id)
            if not keep and engine.alive:  # it ends because of this task, and not the other way round
                engine.spoil(self._task_id)
            await self._pool.release(engine, keep=keep)
        return verdict.outcome

    def _stopped(self) -> Failure | None:
        return failure_of(self._end(self._stop_cause)) if self._stop_cause is not None else None

    async def _order(self) -> RunTask | Failure:
        """What the engine gets, once everything that it needs is here."""
        if not self._prepared.wants_inputs:
            return self._prepared.order
        self._fetching = asyncio.create_task(self._fetch())
        try:
            # The limit of silence does not count here: a transfer that stalls ends by its own.
            async with asyncio.timeout(self._prepared.timeout_sec or None):
                return await self._fetching
        except RejectedError as error:
            return error.failure
        except TimeoutError:
            return failure_of(self._end("timeout"))
        except asyncio.CancelledError:
            if self._stop_cause is None:
                raise
            return failure_of(self._end(self._stop_cause))
        finally:
            self._fetching.cancel()
            self._fetching = None

    async def _follow(self, engine: EngineProcess, mailbox: TaskMailbox, began: float) -> _Verdict:
        heard = time.monotonic()
        asked = False
        while True:
            now = time.monotonic()
            heard = max(heard, engine.output.last_heard)
            if self._stop_cause is None:
                self._check_limits(now, began, heard)
            if self._stop_cause is not None and not asked:
                asked = True
                engine.cancel(self._task_id)
                log.info("asking the task to stop", action="stop", task_id=self._task_id, cause=self._stop_cause)
            if self._force_at is not None and now >= self._force_at:
                return await self._forced(engine)
            message = await mailbox.next(self._wait_sec(now, began, heard))
            if message is not None:
                heard = time.monotonic()
                verdict = await self._hear(message, engine)
                if verdict is not None:
                    return verdict

    async def _hear(self, message: EngineMessage | ChannelEnd, engine: EngineProcess) -> _Verdict | None:
        match message:
            case Loaded():
                self._warm, self._load_sec = False, message.load_sec
            case Progress():
                self._on_progress(message)
            case LogLine():
                getattr(log, message.level)(message.message, action="task_log", task_id=self._task_id)
            case TaskDone():
                return _Verdict(Success(message.output, message.run_sec, self._load_sec, self._warm), keep_engine=True)
            case TaskFailed():
                return self._failed(message, engine)
            case ChannelEnd():
                return await self._ended(engine, message)
        return None

    def _check_limits(self, now: float, began: float, heard: float) -> None:
        limits = self._prepared
        if limits.timeout_sec and now - began >= limits.timeout_sec:
            self.stop("timeout")
        elif limits.no_progress_sec and now - heard >= limits.no_progress_sec:
            self.stop("no_progress")

    def _wait_sec(self, now: float, began: float, heard: float) -> float:
        if self._force_at is not None:
            return max(self._force_at - now, 0.0)
        waits = [_LONGEST_WAIT_SEC]
        if self._prepared.timeout_sec:
            waits.append(began + self._prepared.timeout_sec - now)
        if self._prepared.no_progress_sec:
            waits.append(heard + self._prepared.no_progress_sec - now)
        return max(min(waits), 0.0)

    def _failed(self, message: TaskFailed, engine: EngineProcess) -> _Verdict:
        if message.failure.reason == "cancelled" and self._stop_cause is not None:
            return _Verdict(failure_of(self._end(self._stop_cause)), keep_engine=message.engine_usable)
        if message.foreseen:
            return _Verdict(message.failure, keep_engine=message.engine_usable)
        engine.output.drain()
        failure = message.failure.model_copy(update={"log_tail": engine.output.tail(self._task_id)})
        return _Verdict(failure, keep_engine=message.engine_usable)

    async def _forced(self, engine: EngineProcess) -> _Verdict:
        assert self._stop_cause is not None  # noqa: S101 - set together with the time
        log.warning("the task does not stop; ending its engine", action="stop", task_id=self._task_id, pid=engine.pid)
        if engine.alive:
            engine.spoil(self._task_id)
        await engine.stop()
        return _Verdict(failure_of(self._end(self._stop_cause, engine)), keep_engine=False)

    async def _ended(self, engine: EngineProcess, end: ChannelEnd) -> _Verdict:
        """The channel ended before the task did."""
        if self._stop_cause is not None:
            return await self._forced(engine)
        if engine.spoiled_by:
            await engine.stop()
            facts = EngineEnd("spoiled", detail=engine.spoiled_by, log_tail=engine.output.tail(self._task_id))
            return _Verdict(Displaced(engine.spoiled_by, failure_of(facts)), keep_engine=False)
        cause: Cause = "garbage" if end.garbage else "gone"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(engine.ended), _END_STATUS_WAIT_SEC)
        if cause == "gone" and not engine.ended.done():
            cause = "channel_closed"
        kills = engine.oom_kills
        await engine.stop(gently=False)
        status = engine.ended.result() if engine.ended.done() else None
        facts = EngineEnd(cause, status, kills, detail=end.garbage, log_tail=engine.output.tail(self._task_id))
        return _Verdict(failure_of(facts), keep_engine=False)

    def _end(self, cause: StopCause, engine: EngineProcess | None = None) -> EngineEnd:
        seconds = self._prepared.timeout_sec if cause == "timeout" else self._prepared.no_progress_sec
        tail = engine.output.tail(self._task_id) if engine is not None else ()
        return EngineEnd(cause, seconds=seconds, log_tail=tail)
