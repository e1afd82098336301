"""Who loads vLLM's engine, who waits, and when it is loaded anew; the engine itself is a stand-in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from recording_report import RecordingReport
from waiting_until import wait_until

from executors.contract import EngineHost, EnginePolicy, ExecutorTask
from executors.errors import ModelLoadError, TaskCancelledError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_vllm import vllm_generation
from executors.inference.on_vllm.vllm_generation import VllmGeneration


class Starts:
    """Takes the place of `start_engine`: counts, waits, fails as told."""

    def __init__(self) -> None:
        self.count = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.failure: Exception | None = None

    def __call__(self, *_: object) -> SimpleNamespace:
        self.count += 1
        assert self.may_go_on.wait(30)
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(link=SimpleNamespace(alive=True, close=lambda: None), number=self.count)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    made = Starts()
    monkeypatch.setattr(vllm_generation, "start_engine", made)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def new_task(tmp_path: Path, model: Path) -> Callable[[], ExecutorTask[InferenceSpec]]:
    spec = InferenceSpec.model_validate({"model": {"source": {"identifier": str(model)}}, "data": {"items": ["x"]}})
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    return lambda: ExecutorTask("t", spec, (), tmp_path, policy, RecordingReport())


NewTask = Callable[[], ExecutorTask[InferenceSpec]]


def number_of(executor: VllmGeneration, task: ExecutorTask[InferenceSpec]) -> int:
    """Which start of the engine a task gets."""
    with executor._current(task) as loaded:
        number: int = loaded.number  # type: ignore[attr-defined]  # the stand-in's
        return number


def test_tasks_share_the_engine_as_long_as_it_lives_and_its_files_stay(starts: Starts, new_task: NewTask, model: Path):
    executor = VllmGeneration()
    executor.load(new_task())
    assert [number_of(executor, new_task()) for _ in range(3)] == [1, 1, 1]
    assert executor._loaded is not None

    executor._loaded.link.alive = False  # type: ignore[misc]  # the stand-in's
    assert [number_of(executor, new_task()) for _ in range(2)] == [2, 2]

    (model / "config.json").write_text('{"trained": "again"}')
    assert [number_of(executor, new_task()) for _ in range(2)] == [3, 3]
    assert starts.count == 3


def test_new_files_wait_for_the_tasks_that_run_on_the_old_ones(starts: Starts, new_task: NewTask, model: Path):
    executor = VllmGeneration()
    executor.load(new_task())
    got: list[int] = []
    with executor._current(new_task()):
        (model / "config.json").write_text('{"trained": "again"}')
        waiting = threading.Thread(target=lambda: got.append(number_of(executor, new_task())))
        waiting.start()
        impatient = new_task()
        cast("RecordingReport", impatient.report).cancel()
        with pytest.raises(TaskCancelledError):
            number_of(executor, impatient)
        assert starts.count == 1
    waiting.join(30)
    assert (got, starts.count) == ([2], 2)


def test_who_waits_for_a_load_hears_a_cancel_and_inherits_no_failure(starts: Starts, new_task: NewTask):
    executor = VllmGeneration()
    starts.may_go_on.clear()
    starts.failure = ModelLoadError("damaged")
    failures: list[Exception] = []

    def first() -> None:
        try:
            number_of(executor, new_task())
        except ModelLoadError as error:
            failures.append(error)

    loading = threading.Thread(target=first)
    loading.start()
    wait_until(lambda: starts.count == 1, "the load has begun")
    impatient = new_task()
    cast("RecordingReport", impatient.report).cancel()
    with pytest.raises(TaskCancelledError):
        number_of(executor, impatient)
    assert loading.is_alive()

    starts.may_go_on.set()
    loading.join(30)
    assert failures == [starts.failure]
    starts.failure = None
    assert number_of(executor, new_task()) == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"enforce_cpu": True}, "spec.enforce_cpu is true"),
        ({"model": {"source": {"identifier": "a/b", "gguf_file": "x.gguf"}}}, "the model is a GGUF file"),
        ({"model": {"source": {"identifier": "/m/x.GGUF"}}}, "the model is a GGUF file"),
        (
            {"model": {"source": {"identifier": "a/b"}, "transformers": {"load_in_4bit": True}}},
            "spec.model.transformers asks for quantisation while loading",
        ),
        (
            {"model": {"source": {"identifier": "a/b"}, "transformers": {"device_map": "cpu"}}},
            "spec.model.transformers.device_map is 'cpu'",
        ),
    ],
)
@pytest.mark.parametrize("gpus", [0, 1])
def test_when_a_task_is_better_off_elsewhere(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], reason: str, gpus: int
):
    monkeypatch.setattr(vllm_generation, "is_processor_build", lambda: gpus == 0)
    base = {"model": {"source": {"identifier": "a/b"}}, "data": {"items": ["x"]}}
    spec = InferenceSpec.model_validate({**base, **fields})
    assert VllmGeneration.unsuitable(spec, EngineHost(gpus)) == reason


def test_a_build_for_gpus_needs_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_generation, "is_processor_build", lambda: False)
    base = {"model": {"source": {"identifier": "a/b"}}, "data": {"items": ["x"]}}
    plain = InferenceSpec.model_validate(base)
    without = InferenceSpec.model_validate({**base, "resources": {"hardware": {"gpu": {"count": 0}}}})
    assert "needs a GPU" in VllmGeneration.unsuitable(plain, EngineHost(0))
    assert "gpu.count is 0" in VllmGeneration.unsuitable(without, EngineHost(1))
    assert VllmGeneration.unsuitable(plain, EngineHost(1)) == ""
