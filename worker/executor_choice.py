"""Which executor runs a task, where its kind has several: the first that is allowed, installed and suitable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from executors import catalog
from executors.catalog import CatalogEntry
from executors.contract import EngineHost, Executor, Failure, JsonObject
from executors.errors import ExecutorError, MissingLibraryError, Reason
from executors.task_spec import TaskSpec

CheckedSpec = tuple[TaskSpec, JsonObject]
"""A valid spec, and the JSON it was made from."""

CheckSpec = Callable[[type[TaskSpec]], CheckedSpec]
"""Validates the task's spec against one model; raises `BadSpecError`."""

_SWITCHED_OFF: Final = "switched off by WORKER_EXECUTOR_MASK"
_MOST_USEFUL: Final[tuple[Reason, ...]] = ("bad_spec", "missing_dependency", "executor_disabled")


class ExecutorMask:
    """What WORKER_EXECUTOR_MASK allows.

    Args:
        words: task types, names of executors, or both as "type.name"; none allows everything.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(word.lower() for word in words)

    def allows(self, entry: CatalogEntry) -> bool:
        """Whether tasks may run with this executor."""
        return not self._words or not {entry.kind, entry.name, entry.key}.isdisjoint(self._words)

    def kinds(self) -> list[str]:
        """Task types of which at least one executor is allowed."""
        return sorted(kind for kind, found in catalog.entries().items() if any(map(self.allows, found)))

    def unknown(self) -> list[str]:
        """Words that name nothing, in the order in which they were given."""
        known = {word for entry in _all_entries() for word in (entry.kind, entry.name, entry.key)}
        return [word for word in self._words if word not in known]

    @staticmethod
    def known() -> str:
        """The names that a mask may hold, for people."""
        return ", ".join(sorted({word for entry in _all_entries() for word in (entry.kind, entry.name)}))


@dataclass(frozen=True)
class ChosenExecutor:
    """The executor of a task.

    Attributes:
        entry: its entry in the catalog.
        executor: its class.
        spec: the task's spec, valid for it.
        sent: the JSON that `spec` was made from.
        why: one sentence on the choice, where the kind has several executors; else empty.
    """

    entry: CatalogEntry
    executor: type[Executor[Any]]
    spec: TaskSpec
    sent: JsonObject
    why: str


@dataclass(frozen=True)
class _PassedOver:
    """An executor that was not taken.

    Attributes:
        entry: its entry in the catalog.
        text: completes the sentence "not <name>: …".
        failure: the task's answer if this were the only executor.
        unsuitable: whether it said itself that it cannot run the spec here.
    """

    entry: CatalogEntry
    text: str
    failure: Failure
    unsuitable: bool = False


def choose_executor(kind: str, mask: ExecutorMask, host: EngineHost, check: CheckSpec) -> ChosenExecutor | Failure:
    """Take the first executor of a known kind that can run a task here, or say why none can.

    What `Executor.unsuitable` raises is not caught.
    """
    candidates = catalog.entries()[kind]
    checked: dict[type[TaskSpec], CheckedSpec | ExecutorError] = {}
    passed: list[_PassedOver] = []
    for entry in candidates:
        if not mask.allows(entry):
            text = f"spec.taskType is {kind!r}: {_SWITCHED_OFF}"
            off = Failure(reason="executor_disabled", message=text, hint="change the mask", retryable=True)
            passed.append(_PassedOver(entry, _SWITCHED_OFF, off))
            continue
        try:
            executor = catalog.executor_class(entry)
        except MissingLibraryError as error:
            passed.append(_PassedOver(entry, why_unavailable(entry, error), _failure(error)))
            continue
        if executor.spec_type not in checked:
            checked[executor.spec_type] = _checked(check, executor.spec_type)
        result = checked[executor.spec_type]
        if isinstance(result, ExecutorError):
            passed.append(_PassedOver(entry, result.message, _failure(result)))
            continue
        spec, sent = result
        refusal = executor.unsuitable(spec, host) if len(candidates) > 1 else ""
        if not refusal:
            why = _why(entry, passed) if len(candidates) > 1 else ""
            return ChosenExecutor(entry, executor, spec, sent, why)
        passed.append(_PassedOver(entry, refusal, Failure(reason="bad_spec", message=refusal), unsuitable=True))
    return _nobody(kind, passed)


def why_unavailable(entry: CatalogEntry, error: MissingLibraryError) -> str:
    """Say briefly why an executor cannot be imported, with the command that helps."""
    missing = catalog.missing_libraries(entry)
    if not missing:
        return error.message
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed here ({catalog.install_command(entry)})"


def _all_entries() -> list[CatalogEntry]:
    return [entry for found in catalog.entries().values() for entry in found]


def _checked(check: CheckSpec, spec_type: type[TaskSpec]) -> CheckedSpec | ExecutorError:
    try:
        return check(spec_type)
    except ExecutorError as error:
        return error


def _failure(error: ExecutorError) -> Failure:
    retryable = error.reason == "missing_dependency"  # another worker may have it
    return Failure(reason=error.reason, message=error.message, hint=error.hint, retryable=retryable)


def _why(entry: CatalogEntry, passed: list[_PassedOver]) -> str:
    if not passed:
        return f"{entry.name}: first choice for {entry.kind}"
    return f"{entry.name}, " + "; ".join(f"not {each.entry.name}: {each.text}" for each in passed)


def _nobody(kind: str, passed: list[_PassedOver]) -> Failure:
    """The most useful answer of those that the executors would give alone, or one that names them all."""
    if len(passed) == 1:
        return passed[0].failure
    refused = any(each.unsuitable for each in passed)
    reason = next(word for word in _MOST_USEFUL if any(each.failure.reason == word for each in passed))
    matching = [each for each in passed if each.failure.reason == reason]
    if reason == "bad_spec" and not refused:  # the spec is wrong for all that could be asked: its text names the field
        return matching[0].failure
    named = "; ".join(f"{each.entry.name}: {each.text}" for each in passed)
    hints: dict[Reason, str] = {
        "bad_spec": "change the task, or send it to a worker where one of them can run it",
        "missing_dependency": " or ".join(f"`{catalog.install_command(each.entry)}`" for each in matching)
        + " on the worker",
    }
    return Failure(
        reason=reason,
        message=f"spec.taskType is {kind!r}: none of its executors can run this task here: {named}",
        hint=hints.get(reason, "change WORKER_EXECUTOR_MASK, or send it to another worker"),
        retryable=any(each.failure.reason != "bad_spec" for each in passed),
    )
