"""One engine process: starts it, talks to it, sees it end. It knows nothing of tasks' rules.

Several tasks may be in it at once; what it says about each goes to that task's mailbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

import executors
from executors.child_messages import LONGEST_MESSAGE, CancelTask, Loaded, RunTask, StartEngine, from_engine
from executors.contract import EnginePolicy
from worker.engine_end import oom_kills
from worker.engine_output import EngineOutput
from worker.process_tree import end_everything, tagged
from worker.settings import engine_environment, interpreter
from worker.task_mailbox import ChannelEnd, EngineMessage, TaskMailbox

_TERM_GRACE_SEC: Final = 3.0

log = structlog.get_logger()
_waited_for: set[int] = set()
"""Process ids whose exit status a thread of ours is going to take."""


@dataclass(frozen=True)
class EngineSetup:
    """What all engine processes of this daemon share.

    Attributes:
        tag: begins the tag of each process, by which leftovers are found; no other daemon has it.
        working_dir: an empty folder: relative names in specs must not hit files of ours.
        policy: what the operator allows.
    """

    tag: str
    working_dir: Path
    policy: EnginePolicy


class EngineProcess:
    """A living engine. `key` names what it has loaded or is about to load."""

    def __init__(self, key: str, process: subprocess.Popen[bytes], tag: str, output: EngineOutput) -> None:
        self.key = key
        self.pid = process.pid
        self.output = output
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Resolves with the exit status."""
        self.pids = frozenset({process.pid})
        """Its process tree, as it was just before it was stopped."""
        self.spoiled_by = ""
        """The task because of which it has to end, if that is the reason."""
        self._mailboxes: dict[str, TaskMailbox] = {}
        self._channel_end: ChannelEnd | None = None
        self._process = process
        self._tag = tag
        self._oom_before = oom_kills()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._lifeline = -1
        self._stopping: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, key: str, executor: str, setup: EngineSetup) -> EngineProcess:
        """Start a process for the executor "module:Class". Does not wait for it to load anything."""
        tag = f"{setup.tag}{uuid.uuid4().hex}"
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        lifeline, our_lifeline = os.pipe()
        # Python puts the working directory first on the path; ours is empty, so say where the packages are.
        packages = str(Path(executors.__path__[0]).parent)
        environment = engine_environment(task_tag=tag)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, environment.get("PYTHONPATH")]))
        setup.working_dir.mkdir(parents=True, exist_ok=True)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a fork of a few ms, and the main thread must be its parent
                [interpreter(), "-m", "executors.child", str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                cwd=setup.working_dir,
                env=environment,
                pass_fds=[theirs.fileno(), lifeline],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            os.close(read_end)
            os.close(our_lifeline)
            raise
        finally:
            theirs.close()
            os.close(write_end)
            os.close(lifeline)
        _waited_for.add(process.pid)
        loop = asyncio.get_running_loop()
        output = EngineOutput()
        engine = cls(key, process, tag, output)
        engine._lifeline = our_lifeline
        threading.Thread(target=engine._wait, args=(loop,), name=f"wait-{process.pid}", daemon=True).start()
        try:
            engine._pipe, _ = await loop.connect_read_pipe(lambda: output, open(read_end, "rb", buffering=0))  # noqa: ASYNC230, PTH123, SIM115 - the transport owns it
            reader, engine._writer = await asyncio.open_connection(sock=ours, limit=LONGEST_MESSAGE)
        except BaseException:
            engine._signal_group(signal.SIGKILL)  # nobody else knows of it
            raise
        engine._reading = asyncio.create_task(engine._read(reader))
        engine._send(StartEngine(executor=executor, policy=setup.policy))
        log.info("engine started", action="engine_start", engine=key, pid=process.pid)
        return engine

    @property
    def alive(self) -> bool:
        """Whether it can take a task."""
        return not self.ended.done() and self._channel_end is None and self._stopping is None

    @property
    def oom_kills(self) -> int:
        """Kernel out-of-memory kills in our cgroup since it was started."""
        return oom_kills() - self._oom_before

    def run(self, order: RunTask) -> TaskMailbox:
        """Hand over a task; `leave` ends what this begins."""
        mailbox = self._mailboxes[order.task_id] = TaskMailbox()
        if self._channel_end is not None:
            mailbox.end(self._channel_end)
        self._send(order)
        return mailbox

    def leave(self, task_id: str) -> None:
        """A task has ended. What the engine still says about it is read and dropped."""
        if (mailbox := self._mailboxes.pop(task_id, None)) is not None:
            mailbox.close()

    def spoil(self, task_id: str) -> None:
        """Because of this task the engine has to end; the first one counts."""
        self.spoiled_by = self.spoiled_by or task_id

    def cancel(self, task_id: str) -> None:
        """Ask it to stop a task."""
        self._send(CancelTask(task_id=task_id))

    async def stop(self, *, gently: bool = True) -> None:
        """End it: ask with SIGTERM, then kill the whole group and whatever escaped from it.

        Several may want that at once: the first decides how, and all return when it is done. One that broke may be
        tried again.
        """
        if self._stopping is None or (self._stopping.done() and self._stopping.exception() is not None):
            self._stopping = asyncio.create_task(self._stop(gently=gently))
        await asyncio.shield(self._stopping)

    async def _stop(self, *, gently: bool) -> None:
        try:
            self.pids |= {process.pid for process in await asyncio.to_thread(tagged, self._tag)}
        except Exception as error:  # noqa: BLE001 - it is logged: the GPU's memory is waited for by what is known
            log.warning("cannot look for its processes", action="engine_stop", engine=self.key, error=str(error))
        try:
            if gently and not self.ended.done():
                self._signal_group(signal.SIGTERM)
                await self._wait_for_end()
        finally:
            self._signal_group(signal.SIGKILL)
        left: list[int] = []
        try:
            left = await asyncio.to_thread(end_everything, self._tag, self.pid, frozenset(_waited_for))
        except Exception as error:  # noqa: BLE001 - it is logged: the group is dead, and the next start kills the rest
            log.error("cannot look for what an engine left", action="engine_stop", engine=self.key, error=str(error))
        await self._wait_for_end()
        self._close()
        status = self.ended.result() if self.ended.done() else None
        if left:
            log.error("processes survive SIGKILL", action="engine_stop", engine=self.key, pids=left)
        log.info("engine ended", action="engine_stop", engine=self.key, pid=self.pid, status=status)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _wait_for_end(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), _TERM_GRACE_SEC)

    def _close(self) -> None:
        self.output.drain()
        if self._reading is not None:
            self._reading.cancel()
        self._end_channel(ChannelEnd())  # for those whom a reader that was busy could not tell
        if self._writer is not None:
            self._writer.close()
        if self._pipe is not None:
            self._pipe.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _send(self, message: StartEngine | RunTask | CancelTask) -> None:
        # A lost engine is seen by the reader; what is written to it then has nowhere to go.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(message.encode())

    async def _read(self, reader: asyncio.StreamReader) -> None:
        end = ChannelEnd()
        try:
            while line := await reader.readline():
                if len(line) > 1024**2:  # decoding it takes long enough to delay a heartbeat
                    message = await asyncio.to_thread(from_engine.validate_json, line)
                else:
                    message = from_engine.validate_json(line)
                await self._pass_on(message)
        except (ValidationError, ValueError) as error:  # ValueError: the line is longer than LONGEST_MESSAGE
            end = ChannelEnd(garbage=str(error).splitlines()[0])
        except OSError as error:
            log.debug("engine channel broke", action="engine_read", engine=self.key, error=str(error))
        self._end_channel(end)

    async def _pass_on(self, message: EngineMessage) -> None:
        if isinstance(message, Loaded):
            self.output.about_all = False
        mailbox = self._mailboxes.get(message.task_id)
        if mailbox is not None:
            await mailbox.put(message)
        else:  # a thread that an earlier task left behind may still report about that one
            log.debug("message about a task that is not here", action="task_stray", task_id=message.task_id)

    def _end_channel(self, end: ChannelEnd) -> None:
        if self._channel_end is None:
            self._channel_end = end
            for mailbox in self._mailboxes.values():
                mailbox.end(end)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        status = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(self._note_end, status)

    def _note_end(self, status: int) -> None:
        _waited_for.discard(self.pid)
        if not self.ended.done():
            self.ended.set_result(status)
        self.output.last_heard = time.monotonic()
