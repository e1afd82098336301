"""One loaded model for the whole session, a tiny random one for shapes, and a way to make tasks."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from model_files import bundled_model, make_tiny_model
from recording_report import RecordingReport

from executors.contract import EnginePolicy, ExecutorTask, MergedChild
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported, which happens inside the tests

TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    return bundled_model().parent


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers without a chat template; its context is 64 tokens."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def task_with(tmp_path: Path) -> TaskMaker:
    """Make a task for a model folder: `task_with(folder, items=[...], **inference options)`.

    Tasks share a folder unless `out_dir` says otherwise.
    """

    def make(
        model: Path | str,
        items: list[object] | None = None,
        *,
        data: dict[str, object] | None = None,
        children: dict[str, dict[str, object]] | None = None,
        roots: tuple[Path, ...] = (),
        report: RecordingReport | None = None,
        sections: dict[str, object] | None = None,
        adapters: Sequence[Path | dict[str, object]] = (),
        out_dir: Path | None = None,
        **options: object,
    ) -> ExecutorTask[InferenceSpec]:
        found = {}
        entries = []
        for place, adapter in enumerate(adapters):
            entry = {"path": adapter} if isinstance(adapter, Path) else adapter
            found[f"model.adapters[{place}]"] = Path(str(entry["path"]))
            entries.append({**entry, "path": str(entry["path"])})

        def spec_of(**own: object) -> InferenceSpec:
            base: dict[str, object] = {
                "taskType": "inference",
                "model": {"source": {"identifier": str(model)}, "adapters": entries},
                "data": data or {"items": items},
                "inference": {"temperature": 0, **options},
                **(sections or {}),
            }
            return InferenceSpec.model_validate({**base, **own})

        def folder_of(task_id: str) -> Path:
            folder = tmp_path / task_id
            folder.mkdir(exist_ok=True)
            return folder

        return ExecutorTask(
            task_id="parent",
            spec=spec_of(),
            children=tuple(
                MergedChild(
                    task_id,
                    spec_of(
                        data={key: value for key, value in own.items() if key != "system_prompt"},
                        inference={"temperature": 0, **options, "system_prompt": own.get("system_prompt")},
                    ),
                    folder_of(task_id),
                )
                for task_id, own in (children or {}).items()
            ),
            out_dir=out_dir or folder_of("parent"),
            inputs=found,
            policy=EnginePolicy(allowed_roots=(*roots, tmp_path, *([model] if isinstance(model, Path) else []))),
            report=report or RecordingReport(),
        )

    return make


@pytest.fixture(scope="session")
def smollm(smollm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextGeneration:
    """The executor with SmolLM2-135M-Instruct, loaded once; loading takes some seconds."""
    spec = InferenceSpec.model_validate(
        {"model": {"source": {"identifier": str(smollm_dir)}}, "data": {"items": ["x"]}}
    )
    executor = TextGeneration()
    policy = EnginePolicy(allowed_roots=(smollm_dir,))
    executor.load(ExecutorTask("load", spec, (), tmp_path_factory.mktemp("load"), policy, RecordingReport()))
    return executor


@pytest.fixture
def tiny(tiny_dir: Path, task_with: TaskMaker) -> TextGeneration:
    executor = TextGeneration()
    executor.load(task_with(tiny_dir, ["x"]))
    return executor


@pytest.fixture
def make_report() -> type[RecordingReport]:
    return RecordingReport
