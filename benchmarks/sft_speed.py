"""Samples a second of an `sft` task on the bundled SmolLM2, against TRL's own script (`benchmarks.bare_sft`).

Both train the same float32 weights on the same rows with the same options, on the processor, each in new processes.
The two take turns, so that a busy machine hurts both; each figure is a median. The samples a second are of the training
steps alone, as Transformers counts them on both sides; the whole time (ours: from PUBLISH to TASK_SUCCEEDED, with the
model on the disk) stands beside it. Counts only if both have come to the same loss.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Final

from benchmarks.bare_sft import Trained, train_with_trl
from benchmarks.bf16_model import bf16_model
from benchmarks.broker_link import BenchError
from benchmarks.live_worker import Broker, LiveWorker, running_worker
from benchmarks.report_table import Row, against_target, beside

_ROWS: Final = 64
_BATCH: Final = 2
_STEPS: Final = 8
_TARGET_RATIO: Final = 0.97
_MOST_BELIEVABLE: Final = 1.1
"""We do what the other side does and more; a figure far above it says that the machine was busy with other things."""
_LOSSES_MAY_DIFFER: Final = 0.01
_WITHIN_SEC: Final = 900.0
_COMMON: Final[dict[str, object]] = {
    "max_steps": _STEPS,
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "seed": 42,
}
"""Options that both sides call the same."""


def measure(broker: Broker, *, pairs: int) -> list[Row]:
    """Nothing, with a note, where the extra `training` or the model is not installed."""
    model = bf16_model(broker, needs=("trl",))
    if model is None:
        print("sft: left out, the extra `training` or the group `demo` is not installed", file=sys.stderr)
        return []
    rows = _write_rows(broker.folder / "sft-rows")
    spec = {
        "taskType": "sft",
        "enforce_cpu": True,
        "model": {"source": {"identifier": str(model)}},
        "data": {"dataset_name": str(rows / "train.jsonl")},
        "training": {**_COMMON, "batch_size": _BATCH, "max_seq_length": 128},
    }
    options = {
        **_COMMON,
        "per_device_train_batch_size": _BATCH,
        "max_length": 128,
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    roots = f"{model}:{rows}"
    environment = {"WORKER_ALLOWED_ROOTS": roots, "HF_HUB_OFFLINE": "1", "TASK_MIN_TURNAROUND_MS": "0"}
    ours, others = [], []
    with running_worker(broker, "sft", environment) as worker:
        for number in range(pairs):
            ours.append(_train(worker, f"sft-{number}", spec))
            others.append(train_with_trl(model, rows, broker.folder / "trl-sft", options, _WITHIN_SEC))
    for one, other in zip(ours, others, strict=True):
        if abs(one.loss / other.loss - 1) > _LOSSES_MAY_DIFFER:
            raise BenchError(f"not comparable: a loss of {one.loss} against {other.loss}")
    mine, theirs = (statistics.median(each.samples_per_sec for each in side) for side in (ours, others))
    whole, their_whole = (statistics.median(each.wall_sec for each in side) for side in (ours, others))
    if mine / theirs > _MOST_BELIEVABLE:
        raise BenchError(f"TRL's script made {theirs:.2f} samples/s, the task {mine:.2f}: something disturbed it")
    details = {
        "fastest": max(each.samples_per_sec for each in ours),
        "fastest of TRL": max(each.samples_per_sec for each in others),
        "loss": ours[-1].loss,
        "loss of TRL": others[-1].loss,
    }
    return [
        beside(f"sft, {_STEPS} steps of {_BATCH}", ("TRL's script", theirs), mine, "samples/s", details),
        against_target("sft / TRL's script, samples/s", mine / theirs, (">=", _TARGET_RATIO), "times"),
        beside("sft, the whole task", ("TRL's script", their_whole), whole, "s"),
    ]


def _write_rows(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    story = "The river rose for {0} days, and on day {0} the people of the village carried {0} boats up the hill. "
    lines = (json.dumps({"text": story.format(number) * 2}) for number in range(1, _ROWS + 1))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _train(worker: LiveWorker, task_id: str, spec: dict[str, object]) -> Trained:
    seconds = worker.run_one(task_id, spec, _WITHIN_SEC)
    metrics = worker.results / task_id / "artifacts" / "metrics.jsonl"
    summary = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    if "train_samples_per_second" not in summary:
        raise BenchError(f"{metrics} does not end with the summary of the run: {summary}")
    return Trained(summary["train_samples_per_second"], summary["train_loss"], seconds)
