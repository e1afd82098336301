"""This worker as others see it in Redis: registration, status, heartbeat, farewell (WIRE 0, 1, 2.3, 2.5)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog
from redis.asyncio.client import Pipeline

from orchestrator_client.channels import (
    WORKER_EVENTS,
    WORKER_IDS,
    heartbeat_key,
    heartbeat_ttl_sec,
    worker_channel,
    worker_key,
)
from orchestrator_client.connection import DISCONNECTED
from orchestrator_client.messages import JsonObject, LifecycleEvent, WorkerEvent, now_iso
from worker.event_publisher import EventPublisher
from worker.gpu_facts import GpuReader
from worker.host_facts import Hardware, load_average
from worker.power_meter import PowerMeter, accrued_cost_usd
from worker.worker_identity import process_home

Status = Literal["STARTING", "IDLE", "RUNNING"]
"""The only values the orchestrator knows; it dispatches to IDLE workers alone (WIRE 1.2)."""

_MEASURE_WITHIN_SEC: Final = 2.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Identity:
    """What does not change while the daemon lives.

    Attributes:
        worker_id: this worker's name.
        tags: published with the registration.
        cost_per_hour: price of this host.
        interval_sec: time between heartbeats.
        environment: harmless facts about this process, for people.
    """

    worker_id: str
    tags: tuple[str, ...]
    cost_per_hour: float
    interval_sec: int
    environment: JsonObject

    @classmethod
    def describe(cls, worker_id: str, tags: tuple[str, ...], cost_per_hour: float, interval_sec: int) -> Identity:
        """Make one for this process."""
        environment: JsonObject = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": platform.node(),
            "executable": sys.executable,
        }
        return cls(worker_id, tags, cost_per_hour, interval_sec, environment)


class WorkerPresence:
    """Tells the orchestrator that this worker exists, what it does, and that it is alive."""

    def __init__(self, identity: Identity, publisher: EventPublisher, gpus: GpuReader, hardware: Hardware) -> None:
        self._identity = identity
        self._publisher = publisher
        self._hardware = hardware
        self._power = PowerMeter(gpus)
        self._started = time.monotonic()
        self._started_at = now_iso()
        self._registered = False
        self._measuring: asyncio.Future[JsonObject] | None = None
        self._measured: JsonObject = {}
        self.status: Status = "STARTING"
        self.gaps = 0
        self._listening = True
        self._task_id = ""
        self._last_task = ""

    async def register(self) -> bool:
        """Steps 3 to 5 of WIRE 0: set, hash and REGISTER; heartbeat key and first HEARTBEAT; then the status.

        Returns:
            Whether the broker accepted it; it may lack a permission, or have another kind of value under our key.

        Raises:
            DISCONNECTED: the broker went away meanwhile; the heartbeat will do it again.
        """
        replies = await self._publisher.request(self._add_registration)
        if errors := [reply for reply in replies if isinstance(reply, Exception)]:
            log.error(
                "registration refused", action="register", worker_id=self._identity.worker_id, error=str(errors[0])
            )
            return False
        self._registered = True
        log.info("registered", action="register", worker_id=self._identity.worker_id, status=self.status)
        return True

    def set_listening(self, *, listening: bool) -> None:
        """Whether tasks would reach us now. While not, nobody may think us IDLE: what is sent then is lost."""
        if listening != self._listening:
            self._listening = listening
            self._publisher.say(lambda pipe: self._add_status(pipe, {}, {}))

    def set_running(self, task_id: str) -> None:
        """A task begins."""
        self.status, self._task_id = "RUNNING", task_id
        self._publisher.say(lambda pipe: self._add_status(pipe, {"task_id": task_id}, {"extra_task_id": task_id}))

    def set_busy(self) -> None:
        """A task was accepted; from now on no other may be sent here."""
        self.status = "RUNNING"

    def set_idle(self, last_task: str = "") -> None:
        """Everything accepted has ended."""
        self.status, self._task_id, self._last_task = "IDLE", "", last_task
        payload: JsonObject = {"last_task": last_task} if last_task else {}
        fields = {"extra_task_id": ""} | ({"extra_last_task": last_task} if last_task else {})
        self._publisher.say(lambda pipe: self._add_status(pipe, payload, fields))

    def job_started(self, task_id: str) -> None:
        """Tell tuning managers that a task runs (WIRE 2.5)."""
        self._lifecycle("job_started", {"task_id": task_id, "experiment_id": None, "parameters": {}})

    def job_completed(self, task_id: str, succeeded: bool) -> None:  # noqa: FBT001 - it is the news
        """Tell tuning managers that a task has ended (WIRE 2.5)."""
        status = "success" if succeeded else "failed"
        job: JsonObject = {"task_id": task_id, "experiment_id": None, "status": status, "objective_score": None}
        self._lifecycle("job_completed", job)

    def _lifecycle(self, event_type: Literal["job_started", "job_completed"], data: JsonObject) -> None:
        self._publisher.say(lambda pipe: self._add_lifecycle(pipe, event_type, data))

    async def beat_forever(self) -> None:
        """Beat every interval until cancelled, whatever happens to the broker."""
        due = time.monotonic() + self._identity.interval_sec
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + self._identity.interval_sec, time.monotonic())
            try:
                await self.beat()
            except DISCONNECTED as error:
                log.warning("heartbeat not delivered", action="heartbeat", error=str(error))

    async def beat(self) -> None:
        """One heartbeat: re-assert hash, status and TTL key; register anew when the broker has forgotten us.

        Raises:
            DISCONNECTED: the broker is away.
        """
        metrics = await self._measure()
        own_key = worker_key(self._identity.worker_id)

        def build(pipe: Pipeline) -> None:
            pipe.sismember(WORKER_IDS, self._identity.worker_id)
            pipe.hget(own_key, "worker_id")
            self._add_beat(pipe, metrics)

        member, known_id, *_ = await self._publisher.request(build)
        expected = self._identity.worker_id.encode()
        if not self._registered or not member or known_id != expected:
            if self._registered:
                log.warning("the broker has forgotten this worker; registering again", action="register")
            await self.register()

    async def unregister(self) -> None:
        """WIRE 1.5: remove the keys and say good-bye, in one transaction.

        Raises:
            DISCONNECTED: the broker is away; it will notice by the TTL.
        """
        await self._measure()
        await self._publisher.transaction(self._add_farewell)
        self._registered = False
        log.info("unregistered", action="unregister", worker_id=self._identity.worker_id)

    def _uptime_sec(self) -> float:
        return time.monotonic() - self._started

    def _cost(self) -> float:
        return accrued_cost_usd(self._identity.cost_per_hour, self._uptime_sec())

    async def _measure(self) -> JsonObject:
        """Load, cost and power; what was measured last, if a driver does not answer in time.

        NVML can take seconds, and on a sick host for ever. So it gets a thread that nothing waits for: not the
        heartbeat, and not the end of the process.
        """
        if self._measuring is None or self._measuring.done():
            self._measuring = _in_thread(self._metrics)
        try:
            async with asyncio.timeout(_MEASURE_WITHIN_SEC):
                self._measured = await asyncio.shield(self._measuring)
        except TimeoutError:
            log.warning("power readings do not come; using old ones", action="measure", waited_sec=_MEASURE_WITHIN_SEC)
        return self._measured | {"uptime_sec": round(self._uptime_sec(), 3), "accrued_cost_usd": self._cost()}

    def _metrics(self) -> JsonObject:
        power = self._power.sample()
        metrics: JsonObject = {
            "power": power.model_dump(mode="json"),
            "power_summary": self._power.summary().model_dump(mode="json"),
            "estimated_energy_kwh": self._power.estimated_energy_kwh(),
        }
        if load := load_average():
            metrics["loadavg"] = {**load}
        return metrics

    def _add_registration(self, pipe: Pipeline) -> None:
        who = self._identity
        hardware = self._hardware.model_dump(mode="json", exclude_none=True)
        fields = {
            "worker_id": who.worker_id,
            "status": "STARTING",
            "started_at": self._started_at,
            "last_seen": now_iso(),
            "pid": str(os.getpid()),
            "env_json": json.dumps(who.environment),
            "hardware_json": self._hardware.to_json(),
            "tags_json": json.dumps(who.tags),
            "cost_per_hour": str(who.cost_per_hour),
            "heartbeat_interval_sec": str(who.interval_sec),
            "host_id": process_home(),
            "gaps": str(self.gaps),
        }
        payload: JsonObject = {"env": who.environment, "hardware": hardware, "cost_per_hour": who.cost_per_hour}
        pipe.sadd(WORKER_IDS, who.worker_id)
        self._add_fields(pipe, fields)
        self._add_event(
            pipe,
            WorkerEvent(type="REGISTER", worker_id=who.worker_id, status="STARTING", tags=who.tags, payload=payload),
        )
        self._add_lifecycle(pipe, "registered", {"pid": os.getpid()})
        self._add_beat(pipe, {"uptime_sec": round(self._uptime_sec(), 3), "accrued_cost_usd": self._cost()})
        task: JsonObject = {"task_id": self._task_id} if self._task_id else {}
        self._add_status(pipe, task, {})

    @property
    def _shown(self) -> Status:
        return "STARTING" if self.status == "IDLE" and not self._listening else self.status

    def _add_beat(self, pipe: Pipeline, metrics: JsonObject) -> None:
        who = self._identity
        self._add_fields(pipe, {"status": self._shown, "last_seen": now_iso(), "gaps": str(self.gaps)})
        pipe.set(heartbeat_key(who.worker_id), now_iso(), ex=heartbeat_ttl_sec(who.interval_sec))
        self._add_event(
            pipe, WorkerEvent(type="HEARTBEAT", worker_id=who.worker_id, status=self._shown, metrics=metrics)
        )
        self._add_lifecycle(pipe, "heartbeat", {"status": self._shown})

    def _add_status(self, pipe: Pipeline, payload: JsonObject, fields: Mapping[str, str]) -> None:
        who = self._identity
        self._add_fields(pipe, {"status": self._shown, "last_seen": now_iso(), **fields})
        self._add_event(pipe, WorkerEvent(type="STATUS", worker_id=who.worker_id, status=self._shown, payload=payload))

    def _add_farewell(self, pipe: Pipeline) -> None:
        who = self._identity
        payload: JsonObject = {
            "cost_per_hour": who.cost_per_hour,
            "uptime_sec": round(self._uptime_sec(), 3),
            "accrued_cost_usd": self._cost(),
            "power_summary": self._power.summary().model_dump(mode="json"),
        }
        pipe.srem(WORKER_IDS, who.worker_id)
        pipe.delete(worker_key(who.worker_id))
        pipe.delete(heartbeat_key(who.worker_id))
        self._add_event(pipe, WorkerEvent(type="UNREGISTER", worker_id=who.worker_id, payload=payload))
        self._add_lifecycle(pipe, "offline", {})

    def _add_fields(self, pipe: Pipeline, fields: Mapping[str, str]) -> None:
        mapping: dict[Any, Any] = dict(fields)  # redis-py's own type is invariant and wider
        pipe.hset(worker_key(self._identity.worker_id), mapping=mapping)

    def _add_event(self, pipe: Pipeline, event: WorkerEvent) -> None:
        pipe.publish(WORKER_EVENTS, event.encode())

    def _add_lifecycle(
        self,
        pipe: Pipeline,
        event_type: Literal["registered", "heartbeat", "job_started", "job_completed", "offline"],
        data: JsonObject,
    ) -> None:
        event = LifecycleEvent(worker_id=self._identity.worker_id, event_type=event_type, data=data)
        pipe.publish(worker_channel(self._identity.worker_id), event.encode())


def _in_thread(work: Callable[[], JsonObject]) -> asyncio.Future[JsonObject]:
    """Run something in a thread that may hang without keeping the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[JsonObject] = loop.create_future()

    def settle(result: JsonObject | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result or {})

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 - the one who waits gets it
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="measure", daemon=True).start()
    return future
