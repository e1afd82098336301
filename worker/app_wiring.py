"""Builds every part once and hands it on; knows the order of start and stop, and why."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import structlog

from executors.contract import EnginePolicy
from orchestrator_client.channels import TASK_CONTROL
from orchestrator_client.connection import DISCONNECTED, batch_client, check_access, command_client, pauses, redacted
from orchestrator_client.subscriber import Subscriber
from orchestrator_client.transfers.http_link import HttpLink
from worker import exit_codes
from worker.delivery_steps import DeliveryParts
from worker.destinations import http_policy
from worker.engine_pool import EnginePool
from worker.engine_process import EngineSetup
from worker.event_publisher import EventPublisher
from worker.gpu_facts import GpuFacts, GpuReader
from worker.gpu_release import GpuRelease
from worker.host_facts import read_hardware
from worker.input_cache import InputCache
from worker.process_tree import adopt_orphans, end_everything
from worker.progress_news import ProgressNews
from worker.settings import Settings
from worker.task_delivery import TaskDelivery
from worker.task_ending import TaskEnding
from worker.task_inputs import TaskInputs
from worker.task_intake import IntakeParts, TaskIntake
from worker.task_journal import JournalError, TaskJournal
from worker.task_preparation import TaskPreparation
from worker.task_runner import RunnerParts, TaskRunner
from worker.worker_identity import StateFolder, take_over
from worker.worker_presence import Identity, WorkerPresence

_THREADS = 32
_SETTLE_SEC = 1.0
_FAREWELL_SEC = 5.0
_CANCEL_AGAIN_SEC = 1.0
_PRUNE_EVERY_SEC = 3600.0

log = structlog.get_logger()


class Daemon:
    """The whole worker. Make it inside a running event loop."""

    def __init__(self, settings: Settings, state: StateFolder) -> None:
        self._settings = settings
        self._state = state
        self._url = settings.redis_url.get_secret_value()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """Parts that must run until the end; if one ends, the daemon is broken."""
        self._side_tasks: set[asyncio.Task[None]] = set()
        adopt_orphans()
        self._gpus = GpuReader(settings.cuda_visible_devices)
        self._client = command_client(self._url)
        self._publisher_client = batch_client(self._url)
        self._journal = TaskJournal(state.journal)
        turnaround_sec = settings.task_min_turnaround_ms / 1000
        self._publisher = EventPublisher(self._publisher_client, self._journal, turnaround_sec)
        self._link = HttpLink(http_policy(settings))
        cache = InputCache(settings.input_cache, settings.worker_cache_max_bytes)
        self._inputs = TaskInputs(self._link, cache, settings)
        self._delivery: TaskDelivery | None = None
        self._engine_tag = str(state.path) + "/"  # the slash keeps w-1 apart from w-10
        self._pool: EnginePool | None = None

    async def run(self) -> int:
        """Start, work until a signal, stop.

        Returns:
            The exit code.

        Raises:
            IdInUseError: another live process has this id.
            BrokerRefusedError: the broker refuses the credentials.
        """
        loop = asyncio.get_running_loop()
        # More than asyncio's own: slow lookups of names, of which several may hang, must not keep files waiting.
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="side"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        try:
            return await self._live()
        finally:
            await _cancelled([*self._tasks.values(), *self._side_tasks])
            if self._delivery is not None:
                await self._delivery.close()
            await self._inputs.close()
            if self._pool is not None:
                await self._pool.close()
            await self._link.aclose()
            await self._journal.close()
            self._gpus.close()
            for client in (self._client, self._publisher_client):
                with contextlib.suppress(*DISCONNECTED):
                    await client.aclose()

    async def _engine_pool(self, gpus: GpuFacts) -> EnginePool:
        settings, uuids = self._settings, tuple(gpu.uuid for gpu in gpus.devices)
        policy = EnginePolicy(
            allowed_roots=settings.readable_roots, allow_remote_code=settings.worker_allow_remote_code, gpus=uuids
        )
        setup = EngineSetup(tag=self._engine_tag, working_dir=self._state.path / "engine", policy=policy)
        release = GpuRelease()
        await release.watch(uuids)
        return EnginePool(setup, settings.executor_idle_ttl_sec, release.engine_gone)

    async def _live(self) -> int:
        await self._reach_broker()
        if self._stop.is_set():
            return exit_codes.OK
        # What a killed daemon left running would compete for the GPU with what we start.
        leftovers = asyncio.create_task(asyncio.to_thread(end_everything, self._engine_tag))
        await asyncio.to_thread(self._gpus.open)
        gpu_facts = self._gpus.facts()
        hardware = await asyncio.to_thread(
            read_hardware,
            gpu_facts,
            redis_host=urlsplit(self._url).hostname,
            bandwidth_bytes_per_sec=self._settings.worker_network_bandwidth_bytes_per_sec,
        )
        await leftovers
        pool = self._pool = await self._engine_pool(gpu_facts)
        self._inputs.start()
        identity = Identity.describe(
            self._state.worker_id,
            self._settings.worker_tags,
            self._settings.worker_cost_per_hour,
            self._settings.heartbeat_interval_sec,
        )
        presence = WorkerPresence(identity, self._publisher, self._gpus, hardware)
        preparation = TaskPreparation(self._settings, self._link, gpus=len(hardware.gpu.gpus))
        preparation.check_mask()
        worker_id = self._state.worker_id
        turnaround_sec = self._settings.task_min_turnaround_ms / 1000
        news = ProgressNews(worker_id, self._publisher)
        ending = TaskEnding(worker_id, self._journal, self._publisher, turnaround_sec, presence.job_completed)
        delivery = self._delivery = TaskDelivery(
            DeliveryParts(self._settings, worker_id, self._link, self._journal, self._publisher, news), ending
        )
        runner = TaskRunner(
            RunnerParts(
                self._settings,
                worker_id,
                preparation,
                pool,
                self._journal,
                self._publisher,
                presence,
                news,
                ending,
                delivery,
                self._inputs,
            )
        )
        intake = TaskIntake(
            IntakeParts(
                worker_id,
                self._settings.worker_max_envelope_bytes,
                turnaround_sec,
                self._client,
                preparation,
                self._journal,
                self._publisher,
                runner,
                delivery,
            )
        )
        subscribed = asyncio.Event()

        async def on_subscribed() -> None:
            if subscribed.is_set():  # after a gap the broker may have forgotten us, or have been flushed
                presence.gaps = subscriber.gaps
                presence.set_listening(listening=True)
                self._spawn_side(_quietly(presence.beat()))
            subscribed.set()

        subscriber = Subscriber(
            self._url,
            (self._settings.task_topic, TASK_CONTROL),
            intake.on_message,
            on_subscribed,
            lambda: presence.set_listening(listening=not subscribed.is_set()),
        )
        # Subscribe before anybody is told of us: whoever sees this worker may send to it at once (WIRE 0, 9.3).
        self._spawn("publisher", self._publisher.run())
        self._spawn("subscriber", subscriber.run())
        await self._either(subscribed.wait())
        if self._stop.is_set():
            return exit_codes.OK
        await intake.resume()
        await delivery.resume()
        self._spawn("intake", intake.run())
        await self._register(presence)
        runner.expect(0)  # says IDLE, or RUNNING when tasks were resumed
        self._spawn("runner", runner.run())
        self._spawn("heartbeat", presence.beat_forever())
        self._spawn("idle engines", pool.end_idle())
        self._spawn("pruning", self._prune())
        log.info("ready", action="ready", worker_id=self._state.worker_id, accepts=preparation.kinds())

        code = await self._watch()
        if code == exit_codes.OK:
            await self._shut_down(intake, runner, delivery, presence)
        else:  # the journal keeps what is open; only say good-bye, so that the orchestrator need not wait for the TTL
            await _cancelled([*self._tasks.values(), *self._side_tasks])  # the connection is the publisher's
            await self._say_good_bye(presence)
        return code

    async def _reach_broker(self) -> None:
        """Wait for the broker, however long it takes; then make sure that our id is ours."""

        async def attempt() -> None:
            await check_access(self._client, self._url)
            await take_over(self._client, self._state.worker_id)

        waits = pauses()
        while not self._stop.is_set():
            try:
                await self._either(attempt())
            except DISCONNECTED as error:
                pause = next(waits)
                log.warning(
                    "the broker is not there yet; trying again",
                    action="start", broker=redacted(self._url), error=str(error), pause_sec=round(pause, 2),
                )  # fmt: skip
                await self._either(asyncio.sleep(pause))
            else:
                return

    async def _register(self, presence: WorkerPresence) -> None:
        waits = pauses()
        while not self._stop.is_set():
            try:
                if await presence.register():
                    return
            except DISCONNECTED as error:
                log.warning("not registered yet", action="register", error=str(error))
            await self._either(asyncio.sleep(next(waits)))

    async def _watch(self) -> int:
        """Wait for a signal, or for a part that ends though it must not."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([stopping, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if self._stop.is_set():
            return exit_codes.OK
        for name, task in self._tasks.items():
            if task.done():
                log.error("a part of the daemon ended", action="crash", part=name, exc_info=task.exception())
        return exit_codes.CRASHED

    async def _shut_down(
        self, intake: TaskIntake, runner: TaskRunner, delivery: TaskDelivery, presence: WorkerPresence
    ) -> None:
        """Stop in an order in which nothing is lost.

        No new tasks first, but the heartbeat goes on while the running task finishes; then its end is delivered and
        announced, as far as the time suffices; then the farewell, so that the orchestrator requeues only what we never
        had.
        """
        grace_sec = self._settings.shutdown_grace_sec
        deadline = time.monotonic() + grace_sec
        log.info("shutting down", action="shutdown", grace_sec=grace_sec)
        # First nobody may think us IDLE; only then stop listening: a task sent to deaf ears is lost.
        presence.set_listening(listening=False)
        await self._publisher.settle(_SETTLE_SEC)
        await self._end("subscriber")
        draining = asyncio.create_task(runner.drain(grace_sec, self._hurry))
        await intake.close()
        await draining
        await delivery.drain(deadline - time.monotonic(), self._hurry)
        if self._pool is not None:
            await self._pool.close()
        # A beat that overtakes the farewell would bring the registration back, and nothing would end it.
        for task in self._side_tasks:
            task.cancel()
        await self._end("heartbeat")
        if not await self._publisher.settle(_FAREWELL_SEC):
            log.warning("not everything could be announced; the journal keeps it for the next start", action="shutdown")
        await self._end("publisher")
        await self._say_good_bye(presence)
        log.info("stopped", action="shutdown")

    async def _say_good_bye(self, presence: WorkerPresence) -> None:
        try:
            async with asyncio.timeout(_FAREWELL_SEC):
                await presence.unregister()
        except DISCONNECTED as error:
            log.warning("could not unregister; the registration ends by its TTL", action="shutdown", error=str(error))

    async def _prune(self) -> None:
        while True:
            try:
                await self._journal.prune()
            except JournalError as error:
                log.warning("cannot prune the journal; trying again later", action="prune", error=str(error))
            await asyncio.sleep(_PRUNE_EVERY_SEC)

    async def _end(self, name: str) -> None:
        await _cancelled([self._tasks.pop(name)])

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)

    def _spawn_side(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _either(self, work: Coroutine[None, None, object]) -> None:
        """Wait for something, or for the signal to stop."""
        both = [asyncio.create_task(work), asyncio.create_task(self._stop.wait())]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        if both[0].done():
            both[0].result()  # raises what went wrong in it

    def _on_signal(self, name: str) -> None:
        if self._stop.is_set():
            log.warning("second signal: not waiting any longer", action="signal", signal=name)
            self._hurry.set()
        else:
            log.info("signal received", action="signal", signal=name)
            self._stop.set()


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended; some library code swallows a cancellation that comes at a bad moment."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_CANCEL_AGAIN_SEC)


async def _quietly(beat: Coroutine[None, None, None]) -> None:
    """A heartbeat beside the regular ones; the next regular one does what this cannot."""
    try:
        await beat
    except DISCONNECTED as error:
        log.warning("heartbeat not delivered", action="heartbeat", error=str(error))
