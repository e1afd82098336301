"""Executors of one kind of task, between which the daemon chooses, and a catalog that holds them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from executors import catalog
from executors.catalog import CatalogEntry
from executors.contract import EngineHost, Executor, ExecutorTask, TaskOutput
from executors.task_spec import TaskSpec

KIND = "subject"


class ChoosingSpec(TaskSpec):
    """What the executors here answer when they are asked.

    Attributes:
        refused_by: an executor's name, and what it has against this spec.
        wants_gpu: whether `Fast` needs a GPU for it.
        fault: whether asking raises.
    """

    refused_by: Mapping[str, str] = {}
    wants_gpu: bool = False
    fault: bool = False


class Fast(Executor[ChoosingSpec]):
    """The first choice."""

    spec_type = ChoosingSpec

    @classmethod
    def unsuitable(cls, spec: ChoosingSpec, host: EngineHost) -> str:
        """Say what the spec tells it to say."""
        if spec.fault:
            raise RuntimeError("asked in vain")
        if spec.wants_gpu and not host.gpus:
            return "there is no GPU here"
        return spec.refused_by.get("fast", "")

    def run(self, task: ExecutorTask[ChoosingSpec]) -> TaskOutput:
        """Return why it runs."""
        return TaskOutput(result={"ok": True, "why": task.why_this_executor})


class Plain(Fast):
    """The second choice; needs no GPU."""

    @classmethod
    def unsuitable(cls, spec: ChoosingSpec, host: EngineHost) -> str:
        """Say what the spec tells it to say."""
        del host
        return spec.refused_by.get("plain", "")


class PickySpec(TaskSpec):
    """Another model of the same task."""

    text: str


class Picky(Executor[PickySpec]):
    """An executor with a spec of its own."""

    spec_type = PickySpec

    def run(self, task: ExecutorTask[PickySpec]) -> TaskOutput:
        """Return the text."""
        return TaskOutput(result={"ok": True, "text": task.spec.text})


FAST = CatalogEntry(KIND, "choosing_subjects:Fast", name="fast")
PLAIN = CatalogEntry(KIND, "choosing_subjects:Plain", name="plain")
PICKY = CatalogEntry(KIND, "choosing_subjects:Picky", name="picky")
MISSING = CatalogEntry(KIND, "choosing_subjects:Fast", name="missing", extra="more", requires=("no_such_library",))
BROKEN = CatalogEntry(KIND, "no_such_module:Fast", name="broken")
ALONE = CatalogEntry("alone", "choosing_subjects:Fast")


def use_catalog(monkeypatch: pytest.MonkeyPatch, *entries: CatalogEntry) -> None:
    """Replace the catalog."""
    kinds = dict.fromkeys(entry.kind for entry in entries)
    found = {kind: tuple(entry for entry in entries if entry.kind == kind) for kind in kinds}
    monkeypatch.setattr(catalog, "entries", lambda: found)
