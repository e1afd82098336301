"""An adapter that `lora_sft` has trained, at run time in vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from executor_tasks import Json, TaskMaker, adapter
from same_outputs import differences
from training_models import run_for, train

from executors.inference.on_transformers.text_generation import TextGeneration
from executors.inference.on_vllm.vllm_generation import VllmGeneration

pytestmark = pytest.mark.vllm

NEAR = 0.01
"""Both compute in float32, as in test_same_as_transformers.py."""

QUESTION = {"role": "user", "content": "What is the capital of France?"}
LEARNT = "Ask the sea about it."


def test_vllm_says_what_the_adapter_has_learnt(
    loaded: VllmGeneration, other: TextGeneration, tasks: TaskMaker, smollm: Path, tmp_path: Path
):
    spec: Json = {
        "taskType": "lora_sft",
        "model": {"source": {"identifier": str(smollm)}},
        "data": {"messages": [QUESTION, {"role": "assistant", "content": LEARNT}]},
        "training": {"max_steps": 10, "batch_size": 1, "learning_rate": 3e-3, "save_strategy": "no"},
        "lora": {"r": 8, "dropout": 0},
    }
    trained = train(run_for("lora_sft", spec, tmp_path / "training", roots=(tmp_path, smollm)))
    assert trained.folder is not None
    fields: Json = {"items": [[QUESTION], "The three largest cities are"], "max_tokens": 16, "logprobs": 2}

    before = loaded.run(tasks.task(**fields)).result["items"]
    ours, theirs = (
        executor.run(tasks.task(**fields, adapters=[adapter(trained.folder)])).result["items"]
        for executor in (loaded, other)
    )

    assert LEARNT not in before[0]["output"]
    assert ours[0]["output"].strip() == LEARNT
    assert not differences(ours, theirs, near=NEAR)
