"""Tasks for an executor that runs inside the test's own process, and what they tell."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recording_report import RecordingReport

from executors.contract import EnginePolicy, ExecutorTask, MergedChild
from executors.inference.inference_spec import InferenceSpec, adapter_input

Json = dict[str, Any]


@dataclass(frozen=True)
class Adapters:
    """Folders of two LoRA adapters."""

    first: Path
    second: Path


def adapter(folder: Path, **entry: object) -> Json:
    """An entry for `model.adapters`."""
    return {"type": "lora", "path": str(folder), **entry}


class TaskMaker:
    """Makes tasks for one model.

    Args:
        root: tasks get folders below it.
        model: the model's folder.
        roots: further folders that tasks may read.
        vllm: `model.vllm` of each task.
        transformers: `model.transformers` of each task.
    """

    def __init__(
        self,
        root: Path,
        model: Path,
        *,
        roots: Sequence[Path] = (),
        vllm: Json | None = None,
        transformers: Json | None = None,
    ) -> None:
        self._root = root
        self._model = model
        self._policy = EnginePolicy(allowed_roots=(*roots, root, model))
        self._engine_options = {"vllm": vllm or {}, "transformers": transformers or {}}
        self._numbers = itertools.count(1)

    def spec(self, items: Sequence[object] | None = None, **fields: object) -> Json:
        """A spec as it is sent.

        Args:
            items: `data.items`; else `data` is among the fields.
            fields: `data`, `model`, `vllm`, `adapters`, `shard`, `postprocess` and so on; all others are options of
                `inference`. Greedy unless they say otherwise.
        """
        model: Json = {
            "source": {"identifier": str(fields.pop("model", self._model))},
            **self._engine_options,
            "adapters": fields.pop("adapters", []),
        }
        vllm: Any = fields.pop("vllm", {})
        model["vllm"] = {**self._engine_options["vllm"], **vllm}
        sections = {
            key: fields.pop(key) for key in ("shard", "postprocess", "_upstreamResults", "checkpoint") if key in fields
        }
        return {
            "taskType": "inference",
            "model": model,
            "data": fields.pop("data", {"type": "list", "items": items}),
            "inference": {"temperature": 0, **fields},
            **sections,
        }

    def task(
        self,
        items: Sequence[object] | None = None,
        *,
        children: Mapping[str, Json] | None = None,
        report: RecordingReport | None = None,
        folder: Path | None = None,
        **fields: Any,  # noqa: ANN401 - as `spec`
    ) -> ExecutorTask[InferenceSpec]:
        """A task.

        Args:
            items: see `spec`.
            children: by id what `spec` takes for each, on top of the task's own fields.
            report: what it tells, and how it is cancelled.
            folder: its folder; else a new one.
            fields: see `spec`.
        """
        name = f"task-{next(self._numbers)}"
        spec = InferenceSpec.model_validate(self.spec(items, **fields))
        inputs = {
            adapter_input(place): Path(entry.path or "")
            for place, entry in enumerate(spec.model.adapters)
            if entry.type == "lora"
        }
        return ExecutorTask(
            task_id=name,
            spec=spec,
            children=tuple(
                MergedChild(
                    child,
                    InferenceSpec.model_validate(self.spec(**{**fields, **own})),
                    self._folder(f"{name}-{child}"),
                    inputs,
                )
                for child, own in (children or {}).items()
            ),
            out_dir=folder or self._folder(name),
            policy=self._policy,
            report=report or RecordingReport(),
            inputs=inputs,
            why_this_executor="chosen by the test",
        )

    def _folder(self, name: str) -> Path:
        folder = self._root / name
        (folder / "artifacts").mkdir(parents=True)
        return folder
