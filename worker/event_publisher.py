"""Everything the daemon says goes through here: one connection, in order, batched.

| what | when the broker is away, or nobody listens |
|---|---|
| final events | stay in the journal until somebody has heard them |
| TASK_STARTED, progress, status | are dropped: a final event or the next heartbeat says more |

A final event is published by a script that first looks whether that dispatch has been announced already, so that a
repeat after a lost connection or a crash stays silent: exactly one final event for each dispatch. Tuning managers are
told once, too, whether or not an orchestrator listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio as aioredis
import structlog
from redis.asyncio.client import Pipeline

from orchestrator_client.channels import TASK_EVENTS, TASK_STATUS_TTL_SEC, results_channel, task_key
from orchestrator_client.connection import COMMAND_TIMEOUT_SEC, DISCONNECTED, pauses
from orchestrator_client.messages import ResultMessage, SentEvent, TaskEvent
from worker.journal_tables import OwedEvent
from worker.task_journal import JournalError, TaskJournal

_MOST_AT_ONCE: Final = 200
_LISTENER_CHECK_SEC: Final = 1.0
_FRESH_SEC: Final = 0.5
"""An owed event younger than this is on its way here by `task_ended`; the journal is for those that got stuck."""
_UNHURRIED_SEC: Final = 0.01
_COMMANDS_PER_END: Final = 3
"""Two for the hash, one for the event."""

_ANNOUNCE: Final = """
if redis.call('HGET', KEYS[1], 'announced') == ARGV[1] then return -1 end
if redis.call('HGET', KEYS[1], 'told') ~= ARGV[1] and redis.call('PUBLISH', ARGV[5], ARGV[6]) > 0 then
  redis.call('HSET', KEYS[1], 'told', ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[4])
end
local heard = redis.call('PUBLISH', ARGV[2], ARGV[3])
if heard > 0 then
  redis.call('HSET', KEYS[1], 'announced', ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[4])
end
return heard
"""

Build = Callable[[Pipeline], None]
Replies = Sequence[Any]

log = structlog.get_logger()


@dataclass
class _Item:
    """Some commands. `build` is called when they are sent, so that they say what is true then."""

    build: Build
    owed: OwedEvent | None = None
    replies: asyncio.Future[Replies] | None = None
    progress_of: str | None = None


class EventPublisher:
    """See the module's text.

    Args:
        client: a `batch_client` of this publisher's own.
        journal: where owed events lie.
        min_turnaround_sec: how long final events may be held back on purpose (WIRE 9.13).
    """

    def __init__(self, client: aioredis.Redis, journal: TaskJournal, min_turnaround_sec: float = 0.0) -> None:
        self._client = client
        self._journal = journal
        self._min_age_sec = min_turnaround_sec + _FRESH_SEC
        self._items: deque[_Item] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._owing = True  # what an earlier life owes is looked up first
        self.connected = False

    def task_started(self, event: TaskEvent, fields: Mapping[str, str]) -> None:
        """Say that a task runs."""

        def build(pipe: Pipeline) -> None:
            _set_task(pipe, event.task_id, fields)
            pipe.publish(TASK_EVENTS, event.encode())

        self._put(_Item(build))

    def task_queued(self, task_id: str, fields: Mapping[str, str]) -> None:
        """Begin the hash `task:<id>` anew; what an earlier dispatch left there goes."""

        def build(pipe: Pipeline) -> None:
            pipe.delete(task_key(task_id))
            _set_task(pipe, task_id, fields)

        # Not worth a round trip of its own: TASK_STARTED, most often the next thing to say, would have to wait for it.
        self._items.append(_Item(build))
        self._idle.clear()
        asyncio.get_running_loop().call_later(_UNHURRIED_SEC, self._wake.set)

    def task_fields(self, task_id: str, fields: Mapping[str, str]) -> None:
        """Change the hash `task:<id>` of a task under way, without an event."""
        self._put(_Item(lambda pipe: _set_task(pipe, task_id, fields)))

    def task_progress(self, event: TaskEvent, fields: Mapping[str, str]) -> None:
        """Say how far a task is; replaces what has not been sent yet of the same task."""

        def build(pipe: Pipeline) -> None:
            _set_task(pipe, event.task_id, fields)
            pipe.publish(TASK_EVENTS, event.encode())

        for item in self._items:
            if item.progress_of == event.task_id:
                item.build = build
                return
        self._put(_Item(build, progress_of=event.task_id))

    def task_ended(self, owed: OwedEvent, fields: Mapping[str, str]) -> None:
        """Publish a final event that the journal owes, and update the hash."""

        def build(pipe: Pipeline) -> None:
            _set_task(pipe, owed.task_id, fields)
            _announce(pipe, owed)

        self._put(_Item(build, owed=owed))

    def say(self, build: Build) -> None:
        """Send commands that may be lost."""
        self._put(_Item(build))

    async def request(self, build: Build) -> Replies:
        """Send commands and return their replies; errors among them are exceptions in the list.

        Raises:
            DISCONNECTED: the broker is away.
        """
        future: asyncio.Future[Replies] = asyncio.get_running_loop().create_future()
        self._put(_Item(build, replies=future))
        return await future

    async def transaction(self, build: Build) -> None:
        """Send commands as one transaction, past the queue; for the farewell, when nothing else is sent.

        Raises:
            DISCONNECTED: the broker is away.
        """
        async with asyncio.timeout(COMMAND_TIMEOUT_SEC), self._client.pipeline(transaction=True) as pipe:
            build(pipe)
            await pipe.execute()

    async def settle(self, timeout_sec: float) -> bool:
        """Wait until everything said so far has been sent or dropped; False if that took too long."""
        try:
            async with asyncio.timeout(timeout_sec):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Send until cancelled."""
        waits = pauses()
        look_at = time.monotonic() + _LISTENER_CHECK_SEC
        while True:
            if self._owing and time.monotonic() >= look_at:
                await self._send_owed()
                look_at = time.monotonic() + _LISTENER_CHECK_SEC
            if self._items:
                if await self._send():
                    waits = pauses()
                else:
                    await asyncio.sleep(next(waits))
                continue
            self._idle.set()
            self._wake.clear()
            # Not wait_for: in Python 3.11 it can swallow the cancellation that ends this task.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(look_at - time.monotonic(), 0.0) if self._owing else None):
                    await self._wake.wait()

    def _put(self, item: _Item) -> None:
        self._items.append(item)
        self._idle.clear()
        self._wake.set()

    async def _send(self) -> bool:
        batch = [self._items.popleft() for _ in range(min(len(self._items), _MOST_AT_ONCE))]
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SEC), self._client.pipeline(transaction=False) as pipe:
                sizes = []
                for item in batch:
                    before = len(pipe)
                    item.build(pipe)
                    sizes.append(len(pipe) - before)
                replies = await pipe.execute(raise_on_error=False)
            lost = next((reply for reply in replies if isinstance(reply, DISCONNECTED)), None)
            if lost is not None:
                raise lost
        except DISCONNECTED as error:
            self._lost(batch, error)
            return False
        self.connected = True
        heard = []
        position = 0
        for item, size in zip(batch, sizes, strict=True):
            own = replies[position : position + size]
            position += size
            self._complain(own)
            if item.replies is not None and not item.replies.done():
                item.replies.set_result(own)
            if item.owed is not None:
                if isinstance(own[-1], int) and own[-1] != 0:
                    heard.append(item.owed.seq)
                else:
                    self._owing = True
        if heard:
            self._journal.heard(heard)
        return True

    def _lost(self, batch: list[_Item], error: Exception) -> None:
        """Drop what is waiting: final events are in the journal, the rest is stale when the broker is back."""
        if self.connected:
            log.warning("broker lost; final events wait in the journal", action="publish", error=str(error))
        self.connected = False
        for item in (*batch, *self._items):
            if item.replies is not None and not item.replies.done():
                item.replies.set_exception(error)
            self._owing = self._owing or item.owed is not None
        self._items.clear()

    async def _send_owed(self) -> None:
        """Publish what the journal owes, oldest first, once somebody listens."""
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SEC):
                ((_, listeners),) = await self._client.pubsub_numsub(TASK_EVENTS)
                # Who listens by pattern is not in that number; whether the pattern fits shows when we publish.
                listeners = listeners or await self._client.pubsub_numpat()
            self.connected = True
            if not listeners:
                return
            while events := await self._journal.owed(_MOST_AT_ONCE, min_age_sec=self._min_age_sec):
                async with asyncio.timeout(COMMAND_TIMEOUT_SEC), self._client.pipeline(transaction=False) as pipe:
                    for owed in events:
                        _set_task(pipe, owed.task_id, _shown_end(owed))  # its last words may have been lost too
                        _announce(pipe, owed)
                    replies = await pipe.execute(raise_on_error=False)
                self._complain(replies)
                answers = replies[_COMMANDS_PER_END - 1 :: _COMMANDS_PER_END]
                heard = [
                    owed.seq for owed, reply in zip(events, answers, strict=True) if isinstance(reply, int) and reply
                ]
                self._journal.heard(heard)
                if heard:
                    log.info("owed events delivered", action="publish", count=len(heard))
                if len(heard) < len(events):
                    return
            self._owing = bool(await self._journal.owed(1))
        except JournalError as error:
            log.warning("cannot read what is owed; trying again", action="publish", error=str(error))
        except DISCONNECTED as error:
            self.connected = False
            log.debug("broker still away", action="publish", error=str(error))

    def _complain(self, replies: Replies) -> None:
        for reply in replies:
            if isinstance(reply, Exception):
                log.warning("the broker refused a command", action="publish", error=str(reply))


def _set_task(pipe: Pipeline, task_id: str, fields: Mapping[str, str]) -> None:
    if not fields:
        return
    key = task_key(task_id)
    mapping: dict[Any, Any] = dict(fields)  # redis-py's own type is invariant and wider
    pipe.hset(key, mapping=mapping)
    pipe.expire(key, TASK_STATUS_TTL_SEC)


def _shown_end(owed: OwedEvent) -> dict[str, str]:
    """What the hash `task:<id>` shows of an end, read back from its event."""
    event = SentEvent.model_validate_json(owed.event)
    names = ("reason", "hint", "result_path", "finished_at", "engine")
    fields = {name: value for name in names if isinstance(value := event.payload.get(name), str)}
    status = event.type.removeprefix("TASK_")
    fields |= {"task_id": owed.task_id, "worker_id": event.worker_id, "status": status, "error": event.error or ""}
    return fields


def _announce(pipe: Pipeline, owed: OwedEvent) -> None:
    result = ResultMessage.of_final_event(owed.task_id, SentEvent.model_validate_json(owed.event)).encode()
    channel = results_channel(owed.task_id)
    key = task_key(owed.task_id)
    pipe.eval(_ANNOUNCE, 1, key, owed.token, TASK_EVENTS, owed.event, TASK_STATUS_TTL_SEC, channel, result)
