"""An executor that tells where its inputs lie and what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from executors.contract import ChildOutput, Executor, ExecutorTask, TaskOutput
from executors.input_spec import AdapterEntry, CheckpointLoad, InputRequest, JsonlSource
from executors.task_spec import TaskSpec

_MOST_SHOWN = 1000


class InputSpec(TaskSpec):
    """Any of the three kinds of input."""

    load: CheckpointLoad | None = None
    adapters: tuple[AdapterEntry, ...] = ()
    jsonl: JsonlSource | None = None

    def inputs(self) -> tuple[InputRequest, ...]:
        adapters = [entry.request(f"adapters[{number}]") for number, entry in enumerate(self.adapters)]
        one_each = [section.request(name) for name, section in (("load", self.load), ("jsonl", self.jsonl)) if section]
        return (*one_each, *adapters)


class Inputs(Executor[InputSpec]):
    """Its result holds, for each input, its path and the beginnings of its files."""

    spec_type = InputSpec
    exclusive = False

    def run(self, task: ExecutorTask[InputSpec]) -> TaskOutput:
        children = {
            child.task_id: ChildOutput(result={"ok": True, "inputs": _shown(child.inputs)}) for child in task.children
        }
        return TaskOutput(result={"ok": True, "inputs": _shown(task.inputs)}, children=children)


def _shown(inputs: Mapping[str, Path]) -> dict[str, JsonValue]:
    return {name: {"path": str(path), "files": _files(path)} for name, path in inputs.items()}


def _files(path: Path) -> dict[str, JsonValue]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {
        file.name if file == path else str(file.relative_to(path)): file.read_text(errors="replace")[:_MOST_SHOWN]
        for file in files
    }
