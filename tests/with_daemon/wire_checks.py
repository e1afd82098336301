"""What an orchestrator's parser demands of a worker's messages and keys (WIRE 1 to 2.5); nothing of ours is imported.

Each function returns sentences about what is wrong; an empty list is a pass.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

Json = dict[str, Any]
Number = (int, float)
TASK_TYPES = ("TASK_STARTED", "TASK_PROGRESS", "TASK_SUCCEEDED", "TASK_FAILED")
WORKER_TYPES = ("REGISTER", "STATUS", "HEARTBEAT", "UNREGISTER")
LIFECYCLE_TYPES = ("registered", "heartbeat", "job_started", "job_completed", "offline")


def parse(body: str) -> Json:
    """Parse a message as strictly as the worst reader: no NaN, an object."""
    message = json.loads(body, parse_constant=_refuse)
    if not isinstance(message, dict):
        raise TypeError(f"no object: {body[:80]}")
    return message


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def is_time(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return datetime.fromisoformat(value).utcoffset() is not None
    except ValueError:
        return False


def is_number(value: object) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def task_event(event: Json) -> list[str]:
    """WIRE 2.2."""
    kind = event.get("type")
    payload = event.get("payload")
    found = [
        (isinstance(kind, str) and kind == kind.strip().upper() and kind in TASK_TYPES, "type"),
        (isinstance(event.get("task_id"), str) and bool(event["task_id"].strip()), "task_id"),
        (isinstance(event.get("worker_id"), str), "worker_id"),
        (is_time(event.get("ts")), "ts"),
        (isinstance(payload, dict), "payload"),
        (event.get("error") is None or isinstance(event["error"], str), "error"),
        (event.get("status") is None or isinstance(event["status"], str), "status"),
    ]
    if isinstance(payload, dict):
        found.append((isinstance(payload.get("taskType", ""), str), "payload.taskType"))
        if kind in {"TASK_STARTED", "TASK_SUCCEEDED", "TASK_FAILED"}:
            found += [(is_time(payload.get("started_at")), "payload.started_at")]
            found += [(is_time(payload.get("dispatched_at")), "payload.dispatched_at")]
        if kind in {"TASK_SUCCEEDED", "TASK_FAILED"}:
            found += [(is_time(payload.get("finished_at")), "payload.finished_at")]
            found += [(is_number(payload.get("runtime_sec")) and payload["runtime_sec"] >= 0, "payload.runtime_sec")]
        if kind == "TASK_FAILED":
            found.append((bool(event.get("error")), "error of a failure"))
    return _wrong(found, event)


def worker_event(event: Json) -> list[str]:
    """WIRE 2.3."""
    kind, payload, metrics, tags = (event.get(key) for key in ("type", "payload", "metrics", "tags"))
    found = [
        (kind in WORKER_TYPES, "type"),
        (isinstance(event.get("worker_id"), str) and bool(event["worker_id"]), "worker_id"),
        (is_time(event.get("ts")), "ts"),
        (event.get("status") is None or isinstance(event["status"], str), "status"),
        (tags is None or (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)), "tags"),
        ("metrics" not in event or isinstance(metrics, dict), "metrics"),
        ("payload" not in event or isinstance(payload, dict), "payload"),
    ]
    wrong = _wrong(found, event)
    if kind == "REGISTER" and isinstance(payload, dict):
        found = [(isinstance(payload.get("env"), dict), "payload.env")]
        found += [(is_number(payload.get("cost_per_hour")), "payload.cost_per_hour")]
        wrong += _wrong(found, event) + hardware(payload.get("hardware"))
    if kind == "STATUS":
        wrong += _wrong([(event.get("status") in {"IDLE", "RUNNING", "STARTING"}, "status")], event)
    if kind == "HEARTBEAT" and isinstance(metrics, dict):
        wrong += heartbeat_metrics(metrics)
    if kind == "UNREGISTER" and isinstance(payload, dict) and payload:
        keys = ("cost_per_hour", "uptime_sec", "accrued_cost_usd")
        wrong += _wrong([(is_number(payload.get(key)), f"payload.{key}") for key in keys], event)
        wrong += power_summary(payload.get("power_summary"))
    return wrong


def heartbeat_metrics(metrics: Json) -> list[str]:
    """WIRE 2.3, the second table."""
    found = [(is_number(metrics.get(key)), key) for key in ("uptime_sec", "accrued_cost_usd")]
    if "estimated_energy_kwh" in metrics:
        found.append((is_number(metrics["estimated_energy_kwh"]), "estimated_energy_kwh"))
    if "loadavg" in metrics:
        load = metrics["loadavg"]
        found.append((isinstance(load, dict) and all(is_number(load.get(k)) for k in ("1m", "5m", "15m")), "loadavg"))
    wrong = _wrong(found, metrics)
    if "power" in metrics:
        wrong += power(metrics["power"])
    if "power_summary" in metrics:
        wrong += power_summary(metrics["power_summary"])
    return wrong


def power(value: object) -> list[str]:
    if not isinstance(value, dict) or not isinstance(value.get("gpu_watts"), dict):
        return [f"power has the wrong shape: {value}"]
    gpus = value["gpu_watts"].get("per_gpu")
    found = [
        (is_time(value.get("timestamp")), "power.timestamp"),
        (value.get("cpu_watts") is None or is_number(value["cpu_watts"]), "power.cpu_watts"),
        (value["gpu_watts"].get("total") is None or is_number(value["gpu_watts"]["total"]), "power.gpu_watts.total"),
        (isinstance(gpus, list) and all(is_count(gpu.get("index")) for gpu in gpus), "power.gpu_watts.per_gpu"),
    ]
    return _wrong(found, value)


def power_summary(value: object) -> list[str]:
    if not isinstance(value, dict):
        return [f"power_summary is no object: {value}"]
    parts, samples = value.get("estimated_energy_breakdown"), value.get("samples")
    found = [
        (is_number(value.get("uptime_sec")), "power_summary.uptime_sec"),
        (is_number(value.get("estimated_energy_kwh")), "power_summary.estimated_energy_kwh"),
        (isinstance(value.get("per_gpu_avg_watts"), dict), "power_summary.per_gpu_avg_watts"),
        (isinstance(parts, dict) and all(is_number(parts.get(k)) for k in ("cpu_kwh", "gpu_kwh")), "breakdown"),
        (isinstance(samples, dict) and all(is_count(samples.get(k)) for k in ("cpu", "gpu")), "samples"),
    ]
    return _wrong(found, value)


def hardware(value: object) -> list[str]:
    """WIRE 1.3: `cpu`, `memory` and `gpu` are objects, never null; each GPU has both memory fields."""
    if not isinstance(value, dict):
        return [f"hardware is no object: {value}"]
    cpu, memory, gpu = (value.get(key) for key in ("cpu", "memory", "gpu"))
    if not (isinstance(cpu, dict) and isinstance(memory, dict) and isinstance(gpu, dict)):
        return [f"hardware lacks an object among cpu, memory, gpu: {value}"]
    gpus = gpu.get("gpus")
    found = [
        (is_count(cpu.get("logical_cores")) and cpu["logical_cores"] > 0, "cpu.logical_cores"),
        (isinstance(cpu.get("model", ""), str), "cpu.model"),
        (is_count(memory.get("total_bytes")) and memory["total_bytes"] > 0, "memory.total_bytes"),
        (isinstance(gpus, list), "gpu.gpus"),
    ]
    for each in gpus if isinstance(gpus, list) else []:
        found += [(is_count(each.get(key)), f"gpu.{key}") for key in ("index", "memory_total_bytes", "memory_bytes")]
        found += [(isinstance(each.get(key), str), f"gpu.{key}") for key in ("uuid", "name")]
        found.append((each.get("memory_total_bytes") == each.get("memory_bytes"), "both memory fields"))
        found.append((isinstance(each.get("memory", {}), dict), "gpu.memory is no scalar"))
    return _wrong(found, value)


def registration(worker_id: str, fields: dict[str, str], tags: list[str], cost: float) -> list[str]:
    """The hash `worker:<id>` (WIRE 1.2)."""
    wrong = []
    parsed: dict[str, object] = {}
    for name, wanted in (("env_json", dict), ("hardware_json", dict), ("tags_json", list)):
        try:
            parsed[name] = json.loads(fields.get(name, "null"), parse_constant=_refuse)
        except ValueError as error:
            wrong.append(f"{name} of {worker_id} is no JSON: {error}")
            continue
        if not isinstance(parsed[name], wanted):
            wrong.append(f"{name} of {worker_id} poisons every dispatch: {parsed[name]!r}")
    found = [
        (fields.get("worker_id") == worker_id, "worker_id"),
        (fields.get("status") in {"STARTING", "IDLE", "RUNNING"}, "status"),
        (is_time(fields.get("started_at")), "started_at"),
        (is_time(fields.get("last_seen")), "last_seen"),
        (fields.get("pid", "").isdigit(), "pid"),
        (parsed.get("tags_json") == tags, f"tags_json, expected {tags}"),
        (float(fields.get("cost_per_hour", "nan")) == cost, f"cost_per_hour, expected {cost}"),
    ]
    return wrong + _wrong(found, fields) + hardware(parsed.get("hardware_json"))


def lifecycle(event: Json) -> list[str]:
    """A message on `channel:worker:<id>` (WIRE 2.5)."""
    found = [
        (isinstance(event.get("worker_id"), str), "worker_id"),
        (event.get("event_type") in LIFECYCLE_TYPES, "event_type"),
        (isinstance(event.get("data"), dict), "data"),
        (is_time(event.get("timestamp")), "timestamp"),
    ]
    data = event.get("data") or {}
    if event.get("event_type") == "job_completed":
        found.append((data.get("status") in {"success", "failed"}, "data.status"))
    if str(event.get("event_type", "")).startswith("job_"):
        found.append(({"task_id", "experiment_id"} <= data.keys(), "data's keys"))
    return _wrong(found, event)


def _wrong(found: list[tuple[bool, str]], whole: object) -> list[str]:
    return [f"{name} is wrong in {json.dumps(whole)[:300]}" for right, name in found if not right]
