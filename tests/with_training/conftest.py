"""Tiny models to train, and runs in this process as one rank makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from training_models import RunMaker, make_tiny_llama, run_for

from executors.training.training_job import ResumePoint
from executors.training.training_run import TrainingRun

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported, which happens inside the tests


@pytest.fixture(scope="session")
def tiny_chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a chat template; its context is 256 tokens."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-base", chat=False)


@pytest.fixture
def make_run(tmp_path: Path, tiny_chat_dir: Path, tiny_base_dir: Path) -> RunMaker:
    """Make a run: `make_run("sft", data={...}, training={...})`.

    Its model is `tiny_chat_dir`, unless `model` names another folder or is a whole section. Below `tmp_path` and in the
    folders of the tiny models it may read. Each run has a folder of its own, unless `out_dir` names one.
    """
    made = 0

    def make(
        kind: str,
        out_dir: Path | None = None,
        *,
        model: Path | str | dict[str, object] | None = None,
        inputs: dict[str, Path] | None = None,
        resume: ResumePoint | None = None,
        **sections: object,
    ) -> TrainingRun:
        nonlocal made
        made += 1
        named = tiny_chat_dir if model is None else model
        section = named if isinstance(named, dict) else {"source": {"identifier": str(named)}}
        spec = {"taskType": kind, "model": section, **sections}
        return run_for(
            kind,
            spec,
            out_dir or tmp_path / f"run-{made}",
            roots=(tmp_path, tiny_chat_dir, tiny_base_dir),
            inputs=inputs,
            resume=resume,
        )

    return make
