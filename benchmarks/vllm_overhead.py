"""A second (warm) inference task of 64 prompts with vLLM, on the bundled SmolLM2 in bf16, against bare `vllm.LLM`.

Ours is the whole way, from PUBLISH to TASK_SUCCEEDED, results on disk; the other side is `benchmarks.bare_vllm`, which
has the same weights, prompts and engine arguments in a process of its own. The two take turns, so that a busy machine
hurts both; each figure is a median. Counts only if both generated as many tokens, but for a few: bf16 sums depend on
which prompts share a step, and now and then that moves the end of a text.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import psutil

from benchmarks.bare_vllm import Request
from benchmarks.bf16_model import bf16_model
from benchmarks.broker_link import BenchError
from benchmarks.live_worker import ROOT, Broker, running_worker
from benchmarks.report_table import Row, against_target, beside
from benchmarks.vllm_tasks import (
    WITHIN_SEC,
    engine_arguments,
    generated_tokens,
    prompts,
    spec_of,
    worker_environment,
)

_PROMPTS: Final = 64
_NEW_TOKENS: Final = 48
_TARGET_RATIO: Final = 1.03
_LEAST_BELIEVABLE: Final = 0.9
"""We do what the other side does and more; a figure far below it says that the machine was busy with other things."""
_TOKENS_MAY_DIFFER: Final = 0.01
_END_WITHIN_SEC: Final = 60.0
_LOG_TAIL: Final = 2000
_QUIET_PERCENT: Final = 8.0
_QUIET_WITHIN_SEC: Final = 30.0


def measure(broker: Broker, *, pairs: int) -> list[Row]:
    """Nothing, with a note, where vLLM or the model is not installed."""
    model = bf16_model(broker)
    if model is None:
        print("vllm: left out, vLLM, the extra `inference` or the group `demo` is not installed", file=sys.stderr)
        return []
    spec = spec_of(model, prompts(_PROMPTS), _NEW_TOKENS)
    ours, bare, counts, others = [], [], [], []
    with running_worker(broker, "vllm", worker_environment(model)) as worker, _bare(broker, model) as other:
        cold = worker.run_one("cold", spec, WITHIN_SEC)
        _generate(other)
        for number in range(pairs):
            _let_engines_sleep()
            ours.append(worker.run_one(f"warm-{number}", spec, WITHIN_SEC))
            counts.append(generated_tokens(worker, f"warm-{number}"))
            _let_engines_sleep()
            seconds, tokens = _generate(other)
            bare.append(seconds)
            others.append(tokens)
    mine, theirs = statistics.median(ours), statistics.median(bare)
    tokens, other_tokens = sum(counts), sum(others)
    if abs(tokens / other_tokens - 1) > _TOKENS_MAY_DIFFER:
        raise BenchError(f"not comparable: {tokens} tokens against {other_tokens}")
    if mine / theirs < _LEAST_BELIEVABLE:
        raise BenchError(f"bare vLLM took {theirs:.1f} s, the task {mine:.1f} s: something disturbed it, measure again")
    details = {
        "first task with load": cold,
        "fastest": min(ours),
        "fastest bare": min(bare),
        "tokens": tokens / pairs,
        "tokens bare": other_tokens / pairs,
    }
    return [
        beside(f"warm vLLM task, {_PROMPTS} prompts", ("bare vllm.LLM", theirs), mine, "s", details),
        against_target("warm vLLM task / bare vllm.LLM", mine / theirs, ("<=", _TARGET_RATIO), "times"),
    ]


def _let_engines_sleep() -> None:
    """Wait until both are quiet: vLLM's workers spin for some seconds after a step, on the core of the other."""
    deadline = time.monotonic() + _QUIET_WITHIN_SEC
    while psutil.cpu_percent(interval=1.0) > _QUIET_PERCENT and time.monotonic() < deadline:
        pass


@contextmanager
def _bare(broker: Broker, model: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = {**engine_arguments(), "model": str(model), "generation_config": "vllm"}
    request, log = broker.folder / "bare_vllm.json", broker.folder / "bare_vllm.log"
    request.write_text(json.dumps(asdict(Request(arguments, prompts(_PROMPTS), _NEW_TOKENS))), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.bare_vllm", str(request)]
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            if _line(process) != "ready":
                raise BenchError(f"bare vLLM did not start: {log.read_text(errors='replace')[-_LOG_TAIL:]}")
            yield process
            process.communicate(timeout=_END_WITHIN_SEC)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # vLLM's own processes outlive it where it was killed


def _generate(process: subprocess.Popen[str]) -> tuple[float, int]:
    """Let the other side answer all prompts once; returns seconds and generated tokens."""
    if process.stdin is None:
        raise BenchError("no pipe to bare vLLM")
    process.stdin.write("go\n")
    process.stdin.flush()
    line = _line(process)
    if not line:
        raise BenchError("bare vLLM ended early")
    seconds, tokens = line.split()
    return float(seconds), int(tokens)


def _line(process: subprocess.Popen[str]) -> str:
    """What it says next; empty if it has ended."""
    if process.stdout is None or not select.select([process.stdout], [], [], WITHIN_SEC)[0]:
        raise BenchError("bare vLLM takes too long")
    return process.stdout.readline().strip()
