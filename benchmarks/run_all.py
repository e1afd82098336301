"""`make bench`: measures the worker against DESIGN section 7 and prints one table.

Everything runs against a real broker and the real `worker/main.py`. A figure is never a test: a missed target ends with
status 0; only a measurement that cannot be trusted (a lost task, a leftover process) ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import (
    archive_speed,
    batched_tasks,
    dispatch_latency,
    inference_overhead,
    memory_use,
    noop_throughput,
    sft_speed,
    start_time,
    upload_speed,
    vllm_overhead,
)
from benchmarks.broker_link import BenchError
from benchmarks.live_worker import Broker, running_broker
from benchmarks.machine_facts import machine_facts
from benchmarks.report_table import Row, table

Measurement = Callable[[Broker], list[Row]]


def measurements(*, quick: bool) -> dict[str, Measurement]:
    """All measurements by name, in order."""
    return {
        "start": partial(start_time.measure, starts=3 if quick else 7),
        "memory": partial(memory_use.measure, tasks=500 if quick else 2000),
        "latency": partial(dispatch_latency.measure, back_to_back=100 if quick else 500, paced=20 if quick else 80),
        "throughput": partial(noop_throughput.measure, tasks=500 if quick else 2000, rounds=1 if quick else 3),
        "inference": partial(inference_overhead.measure, pairs=1 if quick else 3),
        "vllm": partial(vllm_overhead.measure, pairs=2 if quick else 7),
        "batched": partial(batched_tasks.measure, rounds=1 if quick else 5),
        "sft": partial(sft_speed.measure, pairs=1 if quick else 3),
        "archive": lambda _: archive_speed.measure(quick=quick),
        "upload": partial(upload_speed.measure, megabytes=200 if quick else 1000, rounds=3 if quick else 5),
    }


def main(arguments: list[str]) -> int:
    """Measure and print. Returns the exit status."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    facts = machine_facts()
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[Row] = []
    broken: dict[str, str] = {}
    try:
        with running_broker() as broker:
            for name, measure in measurements(quick=options.quick).items():
                if options.only and name not in options.only:
                    continue
                print(f"measuring: {name} ...", file=sys.stderr)
                try:
                    rows += measure(broker)
                except BenchError as error:
                    broken[name] = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"\n{table(rows)}\n")
    for row in rows:
        if row.details:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in row.details.items())
            print(f"{row.name} ({row.compared_with}), {row.unit}: {figures}")
    for name, reason in broken.items():
        print(f"BROKEN  {name}: {reason}", file=sys.stderr)
    if options.json:
        report = {"machine": facts, "rows": [asdict(row) for row in rows], "broken": broken}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the worker against its targets.")
    names = list(measurements(quick=True))
    parser.add_argument("--only", nargs="+", choices=names, help="measure only these")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: rough figures in a few minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    return parser.parse_args(arguments)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
