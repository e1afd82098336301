"""An executor that leaves a model folder behind, as training does, and counts how often it ran."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal

from executors.contract import Artifact, ChildOutput, Executor, ExecutorTask, TaskOutput
from executors.task_spec import TaskSpec

RUNS = "runs.txt"


class ProducingSpec(TaskSpec):
    """What to leave.

    Attributes:
        size: bytes of the model's one file.
        copy_of: a folder to leave instead.
        folder: where, in the task's folder.
        key: what its keys in the result begin with.
        always: archive it for local results too.
        export: leave a JSONL file too.
        names: paths to name as artifacts without making them.
    """

    size: int = 1000
    copy_of: Path | None = None
    folder: str = "final_model"
    key: Literal["final_model", "final_lora"] = "final_model"
    always: bool = False
    export: bool = False
    names: tuple[str, ...] = ()
    fail: bool = False


class Producing(Executor[ProducingSpec]):
    """See the module's text."""

    spec_type = ProducingSpec

    def run(self, task: ExecutorTask[ProducingSpec]) -> TaskOutput:
        spec = task.spec
        with (task.out_dir / RUNS).open("a") as runs:
            runs.write("ran\n")
        if spec.fail:
            raise ValueError("told to fail")
        folder = task.out_dir / spec.folder
        if spec.copy_of is not None:
            shutil.copytree(spec.copy_of, folder)
        elif not spec.names:
            folder.mkdir(parents=True, exist_ok=True)
            content = random.Random(task.task_id).randbytes(spec.size)  # noqa: S311 - repeatable is the point
            (folder / "model.bin").write_bytes(content)
        (task.out_dir / "checkpoints").mkdir(exist_ok=True)
        (task.out_dir / "checkpoints" / "step-1").write_text("a checkpoint")
        artifacts = [Artifact(path=name, key="final_model") for name in spec.names] or [
            Artifact(path=spec.folder, key=spec.key, archive_always=spec.always)
        ]
        result: dict[str, object] = {"ok": True, "runs": (task.out_dir / RUNS).read_text().count("ran")}
        if spec.export:
            (task.out_dir / "rows.jsonl").write_text('{"a": 1}\n')
            artifacts.append(Artifact(path="rows.jsonl", key="jsonl_export", kind="file"))
            result["jsonl_export"] = {"path": "rows.jsonl", "record_count": 1}
        children = {child.task_id: ChildOutput(result={"ok": True, "own": child.task_id}) for child in task.children}
        return TaskOutput(result=result, children=children, artifacts=tuple(artifacts))  # type: ignore[arg-type]  # JSON
