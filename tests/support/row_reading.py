"""Reads `spec.data` in this process, as one rank does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from executors.contract import EnginePolicy
from executors.training.rows.training_rows import read_rows
from executors.training.spec.trainer_specs import SPEC_TYPES, TrainingKind
from executors.training.spec.training_data_spec import JSONL
from executors.training.training_job import TrainingJob
from executors.training.training_run import TrainingRun

if TYPE_CHECKING:
    import datasets


@dataclass
class Told:
    """Keeps what a rank tells the sender of the task."""

    warnings: list[str] = field(default_factory=list)

    def progress(self, step: int, total: int, metrics: dict[str, float], message: str = "") -> None:
        """Nothing is kept."""

    def log(self, level: str, text: str) -> None:
        """Nothing is kept."""

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Reading:
    """What was read, and what was told about it."""

    run: TrainingRun
    rows: datasets.Dataset
    warnings: list[str]

    @property
    def records(self) -> list[dict[str, object]]:
        return [dict(row) for row in self.rows]

    @property
    def texts(self) -> list[str]:
        return list(self.rows["text"])


def reading_run(
    root: Path,
    kind: TrainingKind,
    data: Mapping[str, object],
    *,
    inputs: dict[str, Path] | None = None,
    batch_size: int = 1,
    ranks: int = 1,
    **sections: object,
) -> TrainingRun:
    rewards = {"reward_functions": [{"name": "length"}]} if kind in {"ppo", "grpo"} else {}
    spec = {"taskType": kind, "model": {"source": {"identifier": "a/b"}}, "data": data, **rewards, **sections}
    job = TrainingJob(
        kind=kind,
        task_id="t",
        sent_spec=spec,
        out_dir=root / "out",
        policy=EnginePolicy(allowed_roots=(root,)),
        inputs=inputs or {},
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        ranks=ranks,
    )
    return TrainingRun(job=job, spec=SPEC_TYPES[kind].model_validate(spec), rank=0, world_size=ranks, tell=Told())


def read(root: Path, kind: TrainingKind, data: Mapping[str, object], **options: object) -> Reading:
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    run = reading_run(root, kind, data, **options)
    rows = read_rows(run, scratch)
    assert isinstance(run.tell, Told)
    return Reading(run, rows, run.tell.warnings)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(root: Path, kind: TrainingKind, text: str | bytes, **data: object) -> Reading:
    path = root / "fetched.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(root, kind, {"jsonl": {"path": str(path)}, **data}, inputs={JSONL: path})


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
