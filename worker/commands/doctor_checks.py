"""`flowmesh-worker doctor`: is this host fit to run a worker? Each problem that is found comes with its fix."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from executors import catalog
from executors.catalog import CatalogEntry
from executors.contract import EngineHost, JsonObject
from executors.errors import BadSpecError, MissingLibraryError
from executors.task_spec import TaskSpec
from orchestrator_client.broker_probe import BrokerReport, probe_broker
from orchestrator_client.connection import redacted
from orchestrator_client.errors import WireError
from orchestrator_client.transfers.http_link import HttpLink, shown_url
from worker.destinations import http_policy
from worker.executor_choice import CheckedSpec, ChosenExecutor, ExecutorMask, choose_executor, why_unavailable
from worker.gpu_facts import GpuFacts, GpuReader
from worker.settings import (
    BrokerSettings,
    Settings,
    SettingsError,
    read_broker_settings,
    read_settings,
    unread_variables,
)

Level = Literal["OK", "WARN", "FAIL"]

_GIB: Final = 1024**3
_SCARCE_BYTES: Final = 10 * _GIB
_TOO_FEW_BYTES: Final = 1 * _GIB
_MODEL_BYTES: Final = 20 * _GIB
"""A 7B model in bf16 is 15 GB: with less room than this the first download may not fit."""
_SLOW_MS: Final = 50.0
_HEALTH_SEC: Final = 5.0
_SKEW_SEC: Final = 5.0
_LARGEST_BUFFER_BYTES: Final = 1 * _GIB
_PLAIN_SPEC: Final[JsonObject] = {
    "model": {"source": {"identifier": "org/model"}},
    "data": {"type": "list", "items": ["Hello"]},
}
"""What a task asks for that asks for nothing special, beside its type."""
_DEPENDS: Final = "it depends on the task which executor runs it"


class Finding(BaseModel):
    """What one check found."""

    model_config = ConfigDict(frozen=True)

    level: Level
    subject: str
    message: str
    fix: str = ""


def examine(broker_url: str = "") -> list[Finding]:
    """Run all checks. None of them changes anything that stays.

    Args:
        broker_url: replaces REDIS_URL unless it is empty.
    """
    # Modules that log while they look would write between our lines, or into the JSON.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    findings = [*_python(), *_environment()]
    settings: Settings | None = None
    try:
        settings = read_settings()
    except SettingsError as error:
        findings.append(Finding(level="FAIL", subject="settings", message=str(error), fix="docs/configuration.md"))
    else:
        findings.append(Finding(level="OK", subject="settings", message="all are valid"))
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _broker(broker_url, settings),
        lambda: _gpus(settings),
        lambda: _executors(settings),
        lambda: _archive_tools(settings),
    ]
    if settings is not None:
        ready = settings
        checks += [lambda: _results_folder(ready), lambda: _model_cache(ready), lambda: _orchestrator(ready)]
    for check in checks:
        findings += _guarded(check)
    return findings


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, and must not hide the others
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return [Finding(level="FAIL", subject="doctor", message=text, fix="please report this line")]


def _python() -> Iterator[Finding]:
    yield Finding(level="OK", subject="python", message=f"{platform.python_version()} ({platform.machine()})")


def _environment() -> Iterator[Finding]:
    for sentence in unread_variables():
        yield Finding(level="WARN", subject="settings", message=sentence, fix="rename or unset it")


def _broker(url: str, settings: Settings | None) -> Iterator[Finding]:
    try:
        chosen: BrokerSettings = read_broker_settings(url)
    except SettingsError as error:
        fix = "set REDIS_URL; `make demo KEEP=1` runs a broker"
        yield Finding(level="FAIL", subject="broker", message=str(error), fix=fix)
        return
    address = chosen.redis_url.get_secret_value()
    try:
        report = probe_broker(address, chosen.task_topic)
    except WireError as error:
        fix = "start the broker, or correct REDIS_URL (address, user, password, database)"
        yield Finding(level="FAIL", subject="broker", message=str(error), fix=fix)
        return
    yield Finding(
        level="WARN" if report.round_trip_ms > _SLOW_MS else "OK",
        subject="broker",
        message=f"{report.version or 'a server'} at {redacted(address)}, round trip {report.round_trip_ms:.1f} ms",
        fix="every task pays this several times: use a broker nearer by" if report.round_trip_ms > _SLOW_MS else "",
    )
    yield from _broker_rights(report)
    yield from _broker_buffer(report, settings)
    if abs(report.clock_ahead_sec) > _SKEW_SEC:
        ahead = "ahead of" if report.clock_ahead_sec > 0 else "behind"
        message = f"the broker's clock is {abs(report.clock_ahead_sec):.0f} s {ahead} ours"
        yield Finding(level="WARN", subject="clock", message=message, fix="synchronise both hosts (NTP)")
    else:
        yield Finding(level="OK", subject="clock", message="agrees with the broker's")


def _broker_rights(report: BrokerReport) -> Iterator[Finding]:
    for sentence in report.denied:
        fix = "grant the user keys worker:* task:* workers:ids and all channels (ACL SETUSER)"
        yield Finding(level="FAIL", subject="permissions", message=sentence, fix=fix)
    if not report.denied:
        rest = (
            f"; the right to publish on {', '.join(report.unchecked)} could not be looked up"
            if report.unchecked
            else ""
        )
        yield Finding(level="OK", subject="permissions", message=f"keys and channels{rest}")


def _broker_buffer(report: BrokerReport, settings: Settings | None) -> Iterator[Finding]:
    limit = report.pubsub_limit_bytes
    needed = settings.worker_max_envelope_bytes if settings is not None else 0
    subject, fix = "buffers", "CONFIG SET client-output-buffer-limit 'pubsub 64mb 16mb 60' on the broker"
    if limit is None:
        message = "the broker does not tell its client-output-buffer-limit for subscribers"
        yield Finding(level="WARN", subject=subject, message=message, fix="make sure that it is 32 MB or more")
    elif limit == 0 or limit > _LARGEST_BUFFER_BYTES:
        amount = "unlimited" if limit == 0 else f"{limit // 1024**2} MiB"
        message = f"subscriber buffers are {amount}: one stuck subscriber can fill the broker's memory"
        yield Finding(level="WARN", subject=subject, message=message, fix=fix)
    elif limit < needed:
        message = f"the broker drops a subscriber {limit} bytes behind, less than one task message may be ({needed})"
        yield Finding(level="WARN", subject=subject, message=message, fix=f"{fix}; or lower WORKER_MAX_ENVELOPE_BYTES")
    else:
        yield Finding(level="OK", subject=subject, message=f"{limit // 1024**2} MiB for a subscriber")


def _results_folder(settings: Settings) -> Iterator[Finding]:
    folder = settings.results_dir
    existing = _nearest_existing(folder)
    if not _writable(existing):
        message = f"{folder} cannot be written by this user"
        yield Finding(level="FAIL", subject="results", message=message, fix=f"chown {existing}, or set RESULTS_DIR")
        return
    free = shutil.disk_usage(existing).free
    level: Level = "FAIL" if free < _TOO_FEW_BYTES else "WARN" if free < _SCARCE_BYTES else "OK"
    fix = "" if level == "OK" else "delete old results, or set RESULTS_DIR to a larger disk"
    yield Finding(level=level, subject="results", message=f"{folder}: writable, {_gib(free)} free", fix=fix)


def _model_cache(settings: Settings) -> Iterator[Finding]:
    folder = settings.model_cache
    existing = _nearest_existing(folder)
    free = shutil.disk_usage(existing).free
    subject = "model cache"
    if not _writable(existing):
        message, fix = f"{folder} cannot be written: models cannot be downloaded", "set HF_HOME to a writable folder"
        yield Finding(level="WARN", subject=subject, message=message, fix=fix)
    elif free < _MODEL_BYTES:
        fix = "free some space, or set HF_HOME to a larger disk"
        yield Finding(level="WARN", subject=subject, message=f"{folder}: only {_gib(free)} free", fix=fix)
    else:
        state = "" if folder.is_dir() else " (will be created)"
        yield Finding(level="OK", subject=subject, message=f"{folder}{state}: {_gib(free)} free")


def _archive_tools(settings: Settings | None) -> Iterator[Finding]:
    tar = settings.model_archive_tar_bin if settings else "tar"
    pigz = settings.model_archive_pigz_bin if settings else "pigz"
    for name, purpose in ((tar, "packed"), (pigz, "compressed")):
        path = shutil.which(name)
        subject = Path(name).name
        if path is None:
            message = f"{name} not found: model archives will be {purpose} in process"
            fix = f"install it (Debian: apt-get install {subject})"
            yield Finding(level="WARN", subject=subject, message=message, fix=fix)
        else:
            yield Finding(level="OK", subject=subject, message=path)


def _orchestrator(settings: Settings) -> Iterator[Finding]:
    base = settings.orchestrator_base_url
    if not base:
        return
    try:
        status = asyncio.run(_health_of(base, settings))
    except WireError as error:
        fix = "start the orchestrator, or correct ORCHESTRATOR_BASE_URL; results wait meanwhile"
        yield Finding(level="WARN", subject="orchestrator", message=str(error), fix=fix)
        return
    if status == HTTPStatus.OK:
        yield Finding(level="OK", subject="orchestrator", message=f"{shown_url(base)} answers")
    else:
        message = f"{shown_url(base)}/healthz is answered with status {status}, expected 200"
        yield Finding(level="WARN", subject="orchestrator", message=message, fix="check ORCHESTRATOR_BASE_URL")


async def _health_of(base: str, settings: Settings) -> int:
    link = HttpLink(http_policy(settings))
    try:
        call = link.prepare("GET", f"{base}/healthz", {}, own={})
        async with link.exchange(call, None, stall_sec=_HEALTH_SEC) as answer:
            return answer.status_code
    finally:
        await link.aclose()


def _gpu_facts(settings: Settings | None) -> GpuFacts | None:
    """What the driver tells; None without one."""
    reader = GpuReader(settings.cuda_visible_devices if settings else None)
    try:
        return reader.facts() if reader.open() else None
    finally:
        reader.close()


def _gpus(settings: Settings | None) -> Iterator[Finding]:
    facts = _gpu_facts(settings)
    if facts is None:
        message = "no NVIDIA driver answers: tasks run on the processor, slowly"
        fix = "on a GPU host: install the driver, check with nvidia-smi; in a container: --gpus all"
        yield Finding(level="WARN", subject="GPUs", message=message, fix=fix)
    elif not facts.devices:
        message = f"driver {facts.driver_version}, but no usable GPU"
        yield Finding(level="WARN", subject="GPUs", message=message, fix="check CUDA_VISIBLE_DEVICES and nvidia-smi")
    else:
        names = ", ".join(f"{gpu.index}: {gpu.name} ({_gib(gpu.memory_total_bytes)})" for gpu in facts.devices)
        message = f"{names}; driver {facts.driver_version}, CUDA {facts.cuda_version}"
        yield Finding(level="OK", subject="GPUs", message=message)


def _executors(settings: Settings | None) -> Iterator[Finding]:
    mask = ExecutorMask(settings.worker_executor_mask if settings else ())
    accepted = mask.kinds()
    for kind, entries in sorted(catalog.entries().items()):
        if kind not in accepted:
            yield Finding(level="OK", subject=f"type {kind}", message="left out by WORKER_EXECUTOR_MASK")
        elif len(entries) == 1:
            yield _installed(entries[0], f"type {kind}", lack="WARN")
        else:
            choice = _choice_for_plain_task(kind, mask, settings)
            yield choice
            for entry in entries:
                if mask.allows(entry):
                    yield _installed(entry, f"  {entry.name}", lack=choice.level)
                else:
                    yield Finding(level="OK", subject=f"  {entry.name}", message="left out by WORKER_EXECUTOR_MASK")
    for name in mask.unknown():
        message = f"WORKER_EXECUTOR_MASK names {name!r}, which is neither a task type nor an executor"
        yield Finding(level="WARN", subject="settings", message=message, fix=f"known: {mask.known()}")


def _installed(entry: CatalogEntry, subject: str, *, lack: Level) -> Finding:
    """Whether an executor can be imported; `lack` is the level if its libraries are simply not installed."""
    try:
        catalog.executor_class(entry)
    except MissingLibraryError as error:
        level: Level = lack if catalog.missing_libraries(entry) else "WARN"
        message = f"cannot run here: {why_unavailable(entry, error)}"
        return Finding(level=level, subject=subject, message=message, fix=catalog.install_hint(entry))
    return Finding(level="OK", subject=subject, message="installed")


def _choice_for_plain_task(kind: str, mask: ExecutorMask, settings: Settings | None) -> Finding:
    """Which of several executors would run a task that asks for nothing special."""

    def check(spec_type: type[TaskSpec]) -> CheckedSpec:
        sent: JsonObject = {"taskType": kind, **_PLAIN_SPEC}
        try:
            return spec_type.model_validate(sent), sent
        except ValidationError as error:
            raise BadSpecError(_DEPENDS) from error

    facts = _gpu_facts(settings)
    host = EngineHost(gpus=len(facts.devices) if facts else 0)
    choice = choose_executor(kind, mask, host, check)
    subject = f"type {kind}"
    if isinstance(choice, ChosenExecutor):
        return Finding(level="OK", subject=subject, message=f"a plain task runs with {choice.why}")
    level: Level = "OK" if choice.message == _DEPENDS else "WARN"
    return Finding(level=level, subject=subject, message=choice.message, fix=choice.hint)


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _writable(folder: Path) -> bool:
    """Whether a file can really be made there: the permission bits do not know of read-only or full disks."""
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError:
        return False
    return True


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
