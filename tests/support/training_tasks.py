"""Trainings of tiny models through the daemon: their specs, and what lies in their folders afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from daemon_world import TaskEnd

Json = dict[str, Any]

TRAINING_SEC: Final = 240.0
"""A training of a tiny model has ended by then, also on a busy machine."""

SENTENCES: Final = [
    "What is snow? Frozen water.",
    "Who wrote it? Nobody knows.",
    "When is noon? At twelve.",
    "Why is it so? Ask the sea.",
]
PAIRS: Final = [
    {"prompt": "The sky is ", "chosen": "blue", "rejected": "green"},
    {"prompt": "The grass is ", "chosen": "green", "rejected": "blue"},
    {"prompt": "Snow is ", "chosen": "white", "rejected": "black"},
    {"prompt": "Coal is ", "chosen": "black", "rejected": "white"},
]
PROMPTS: Final = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
LETTERS: Final = {"name": "character_share", "characters": "abcdefghijklmnopqrstuvwxyz"}

_TEXTS: Final[Json] = {"data": {"prompts": SENTENCES}}
_PAIRS: Final[Json] = {"data": {"preferences": PAIRS}}
_PROMPTS: Final[Json] = {
    "data": {"prompts": PROMPTS},
    "generation": {"max_new_tokens": 8, "temperature": 1.0},
    "reward_functions": [LETTERS],
}
_SECTIONS: Final[dict[str, Json]] = {
    "sft": _TEXTS,
    "lora_sft": _TEXTS,
    "dpo": _PAIRS,
    "reward": _PAIRS,
    "ppo": _PROMPTS,
    "grpo": _PROMPTS,
}
_QUICK: Final[Json] = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "batch_size": 4, "max_seq_length": 64}
_QUICK_OF: Final[dict[str, Json]] = {"grpo": {"num_generations": 4}}


def training_task(kind: str, model: Path | str, *, training: Json | None = None, **sections: object) -> Json:
    """A spec that trains four steps on the CPU within a second or so of computing.

    Args:
        kind: the kind of training.
        model: folder or name of the model.
        training: options beside the quick ones, or instead of them; None removes one.
        sections: further sections of the spec, instead of the usual ones; None removes one.
    """
    options = {**_QUICK, **_QUICK_OF.get(kind, {}), **(training or {})}
    spec = {
        "taskType": kind,
        "enforce_cpu": True,
        "model": {"source": {"identifier": str(model)}},
        **_SECTIONS[kind],
        "training": {key: value for key, value in options.items() if value is not None},
        **sections,
    }
    return {key: value for key, value in spec.items() if value is not None}


def metrics_of(folder: Path) -> list[Json]:
    """The lines of `artifacts/metrics.jsonl` in a task's folder."""
    lines = (folder / "artifacts" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=_no_such_number) for line in lines]


def logged(end: TaskEnd, name: str) -> list[float]:
    """The values of one metric, oldest first."""
    return [line[name] for line in metrics_of(end.folder) if name in line]


def _no_such_number(name: str) -> float:
    raise AssertionError(f"metrics.jsonl holds {name}, which is no JSON")
