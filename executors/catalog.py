"""Which kinds of task exist, and where their executors live. Plain data: importing this loads no executor.

A kind may have several executors, in order of preference: the daemon takes the first that can run a task.
Other distributions add kinds through the entry point group `flowmesh_worker.executors` (docs/adding-an-executor.md).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import structlog

from executors.contract import Executor
from executors.errors import MissingLibraryError

ENTRY_POINT_GROUP = "flowmesh_worker.executors"

log = structlog.get_logger()


_TRAINING_NEEDS = ("trl", "torch", "transformers", "peft", "datasets", "accelerate")


@dataclass(frozen=True)
class CatalogEntry:
    """One executor of a kind of task.

    Attributes:
        kind: the task type, lower case.
        target: the executor as "module:Class".
        extra: the extra of this project that installs its libraries; empty if it needs none or is not ours.
        requires: top-level modules that must be importable.
        name: the executor's own name, lower case; that of the kind where this is its only executor.
    """

    kind: str
    target: str
    extra: str = ""
    requires: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        """Fill in the name."""
        object.__setattr__(self, "name", self.name or self.kind)

    @property
    def key(self) -> str:
        """The kind, with the executor's name where it has one of its own."""
        return self.kind if self.name == self.kind else f"{self.kind}.{self.name}"


_BUILT_IN = (
    CatalogEntry("echo", "executors.echo_task:EchoTask"),
    CatalogEntry(
        "inference",
        "executors.inference.on_vllm.vllm_generation:VllmGeneration",
        name="vllm",
        extra="vllm",
        requires=("vllm", "torch", "transformers"),
    ),
    CatalogEntry(
        "inference",
        "executors.inference.on_transformers.text_generation:TextGeneration",
        name="transformers",
        extra="inference",
        requires=("torch", "transformers", "accelerate"),
    ),
    *(
        CatalogEntry(kind, f"executors.training.training_task:{name}", extra="training", requires=_TRAINING_NEEDS)
        for kind, name in (
            ("sft", "SftTraining"),
            ("lora_sft", "LoraSftTraining"),
            ("dpo", "DpoTraining"),
            ("ppo", "PpoTraining"),
            ("grpo", "GrpoTraining"),
            ("reward", "RewardTraining"),
        )
    ),
)


@cache
def entries() -> dict[str, tuple[CatalogEntry, ...]]:
    """All kinds of task by name, ours and those of other distributions, with their executors, the preferred first."""
    found: dict[str, tuple[CatalogEntry, ...]] = {}
    for entry in _BUILT_IN:
        found[entry.kind] = (*found.get(entry.kind, ()), entry)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        kind = point.name.strip().lower()
        if kind in found:
            log.warning(
                "entry point ignored: this kind exists already", action="catalog", kind=kind, target=point.value
            )
        else:
            found[kind] = (CatalogEntry(kind, point.value),)
    return found


def missing_libraries(entry: CatalogEntry) -> list[str]:
    """Return the modules of `entry.requires` that are not installed; imports nothing."""
    return [name for name in entry.requires if importlib.util.find_spec(name) is None]


def install_command(entry: CatalogEntry) -> str:
    """The command, or what to do, that installs what an executor needs."""
    if entry.extra:
        return f"uv sync --inexact --extra {entry.extra}"
    return f"install the distribution that provides {entry.target.partition(':')[0]}"


def install_hint(entry: CatalogEntry) -> str:
    """Say how to install what an executor needs."""
    return f"install it on the worker: {install_command(entry)}" if entry.extra else install_command(entry)


def executor_class(entry: CatalogEntry) -> type[Executor[Any]]:
    """Import an executor; its module is light by contract.

    Raises:
        MissingLibraryError: a library is missing, the import fails, or the target is no executor.
    """
    if missing := missing_libraries(entry):
        raise MissingLibraryError(
            f"task type {entry.kind!r} needs {', '.join(missing)}, not installed here", hint=install_hint(entry)
        )
    module_name, _, class_name = entry.target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:  # a foreign module may raise anything while it is imported
        raise MissingLibraryError(
            f"the executor {entry.target} of task type {entry.kind!r} cannot be imported: "
            f"{type(error).__name__}: {error}",
            hint=install_hint(entry),
        ) from error
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise MissingLibraryError(
            f"{entry.target} of task type {entry.kind!r} is no subclass of executors.contract.Executor"
        )
    return found
