"""Which executor runs a task, where its kind has several, and what is said when none can."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from choosing_subjects import ALONE, BROKEN, FAST, KIND, MISSING, PICKY, PLAIN, use_catalog
from pydantic import ValidationError

from executors.catalog import CatalogEntry
from executors.contract import EngineHost, Failure, JsonObject
from executors.errors import BadSpecError
from executors.task_spec import TaskSpec
from worker.executor_choice import CheckedSpec, ChosenExecutor, ExecutorMask, choose_executor

OFF = "switched off by WORKER_EXECUTOR_MASK"
LACKS = "no_such_library is not installed here (uv sync --inexact --extra more)"


class Task:
    """One task's spec, and against which models it was validated."""

    def __init__(self, **spec: object) -> None:
        self.spec = spec
        self.asked: list[type[TaskSpec]] = []

    def check(self, spec_type: type[TaskSpec]) -> CheckedSpec:
        self.asked.append(spec_type)
        sent: JsonObject = {"taskType": KIND, **self.spec}  # type: ignore[dict-item]  # what a test gives
        try:
            return spec_type.model_validate(sent), sent
        except ValidationError as error:
            raise BadSpecError(f"{spec_type.__name__} says no", hint="correct it") from error


def choose(task: Task, *mask: str, gpus: int = 1, kind: str = KIND) -> ChosenExecutor | Failure:
    return choose_executor(kind, ExecutorMask(mask), EngineHost(gpus=gpus), task.check)


@pytest.mark.parametrize(
    ("entries", "mask", "spec", "gpus", "why"),
    [
        ([FAST, PLAIN], "", {}, 1, "fast: first choice for subject"),
        ([PLAIN, FAST], "", {}, 1, "plain: first choice for subject"),
        ([FAST, PLAIN], "subject", {}, 1, "fast: first choice for subject"),
        ([FAST, PLAIN], "plain", {}, 1, f"plain, not fast: {OFF}"),
        ([FAST, PLAIN], "Subject.Plain", {}, 1, f"plain, not fast: {OFF}"),
        ([FAST, PLAIN], "plain,fast", {}, 1, "fast: first choice for subject"),
        ([FAST, PLAIN], "subject,plain", {}, 1, "fast: first choice for subject"),
        ([MISSING, PLAIN], "", {}, 1, f"plain, not missing: {LACKS}"),
        ([FAST, PLAIN], "", {"refused_by": {"fast": "spec.x is 1"}}, 1, "plain, not fast: spec.x is 1"),
        ([FAST, PLAIN], "", {"wants_gpu": True}, 1, "fast: first choice for subject"),
        ([FAST, MISSING, PICKY], "", {"wants_gpu": True, "text": "a"}, 0,
         f"picky, not fast: there is no GPU here; not missing: {LACKS}"),
        ([PICKY, PLAIN], "", {}, 1, "plain, not picky: PickySpec says no"),
    ],
)  # fmt: skip
def test_the_first_that_can_run_the_task_is_taken(
    *, monkeypatch: pytest.MonkeyPatch, entries: list[CatalogEntry], mask: str, spec: JsonObject, gpus: int, why: str
):
    use_catalog(monkeypatch, *entries)

    choice = choose(Task(**spec), *filter(None, mask.split(",")), gpus=gpus)

    assert isinstance(choice, ChosenExecutor)
    assert choice.why == why
    assert why.startswith(choice.entry.name)
    assert choice.executor.__name__.lower() == choice.entry.name


def test_an_executor_that_cannot_be_imported_is_passed_over_with_the_error(monkeypatch: pytest.MonkeyPatch):
    use_catalog(monkeypatch, BROKEN, PLAIN)

    choice = choose(Task())

    assert isinstance(choice, ChosenExecutor)
    assert choice.why.startswith("plain, not broken: the executor no_such_module:Fast of task type 'subject' cannot")


def test_the_only_executor_of_a_kind_is_not_asked_and_needs_no_reason(monkeypatch: pytest.MonkeyPatch):
    use_catalog(monkeypatch, ALONE)

    choice = choose(Task(refused_by={"fast": "never"}), kind="alone")

    assert isinstance(choice, ChosenExecutor)
    assert choice.why == ""


@pytest.mark.parametrize(
    ("entries", "mask", "spec", "reason", "words", "hint", "retryable"),
    [
        ([FAST, PLAIN], "", {"refused_by": {"fast": "spec.x is 1", "plain": "spec.y is 2"}}, "bad_spec",
         ["none of its executors", "fast: spec.x is 1", "plain: spec.y is 2"], "change the task", False),
        ([FAST, MISSING], "", {"refused_by": {"fast": "spec.x is 1"}}, "bad_spec",
         ["fast: spec.x is 1", f"missing: {LACKS}"], "change the task", True),
        ([FAST, PLAIN], "fast", {"refused_by": {"fast": "spec.x is 1"}}, "bad_spec",
         ["fast: spec.x is 1", f"plain: {OFF}"], "change the task", True),
        ([FAST, PICKY], "", {"refused_by": {"fast": "spec.x is 1"}}, "bad_spec",
         ["fast: spec.x is 1", "picky: PickySpec says no"], "change the task", False),
        ([FAST, PLAIN], "", {"wants_gpu": "maybe"}, "bad_spec", ["ChoosingSpec says no"], "correct it", False),
        ([MISSING, PICKY], "", {}, "bad_spec", ["PickySpec says no"], "correct it", False),
        ([MISSING, BROKEN], "", {}, "missing_dependency", [f"missing: {LACKS}", "broken: the executor no_such_module"],
         "`uv sync --inexact --extra more` or `install the distribution", True),
        ([MISSING, PLAIN], "missing", {}, "missing_dependency", [LACKS, f"plain: {OFF}"], "--extra more", True),
        ([FAST, PLAIN], "other", {}, "executor_disabled", [f"fast: {OFF}"], "WORKER_EXECUTOR_MASK", True),
    ],
)  # fmt: skip
def test_where_none_can_the_most_useful_reason_is_given(
    *,
    monkeypatch: pytest.MonkeyPatch,
    entries: list[CatalogEntry],
    mask: str,
    spec: JsonObject,
    reason: str,
    words: Sequence[str],
    hint: str,
    retryable: bool,
):
    use_catalog(monkeypatch, *entries)

    failure = choose(Task(**spec), *filter(None, mask.split(",")))

    assert isinstance(failure, Failure)
    assert (failure.reason, failure.retryable) == (reason, retryable)
    for word in words:
        assert word in failure.message
    assert hint in failure.hint


@pytest.mark.parametrize("wants_gpu", [True, "maybe"])
def test_a_spec_is_validated_once_for_each_model(monkeypatch: pytest.MonkeyPatch, wants_gpu: object):
    use_catalog(monkeypatch, FAST, PICKY, PLAIN)
    task = Task(wants_gpu=wants_gpu, refused_by={"fast": "no", "plain": "no"})

    assert isinstance(choose(task), Failure)

    assert [asked.__name__ for asked in task.asked] == ["ChoosingSpec", "PickySpec"]


def test_what_asking_raises_is_not_swallowed(monkeypatch: pytest.MonkeyPatch):
    use_catalog(monkeypatch, FAST, PLAIN)

    with pytest.raises(RuntimeError, match="asked in vain"):
        choose(Task(fault=True))


@pytest.mark.parametrize(
    ("words", "allowed", "kinds", "unknown"),
    [
        ((), {"fast", "plain", "alone"}, ["alone", "subject"], []),
        (("subject",), {"fast", "plain"}, ["subject"], []),
        (("PLAIN",), {"plain"}, ["subject"], []),
        (("subject.fast", "alone"), {"fast", "alone"}, ["alone", "subject"], []),
        (("alone", "alone.plain", "poem"), {"alone"}, ["alone"], ["alone.plain", "poem"]),
        (("poem",), set(), [], ["poem"]),
    ],
)
def test_a_mask_names_kinds_and_executors(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], allowed: set[str], kinds: list[str], unknown: list[str]
):
    use_catalog(monkeypatch, FAST, PLAIN, ALONE)
    mask = ExecutorMask(words)

    assert {entry.name for entry in (FAST, PLAIN, ALONE) if mask.allows(entry)} == allowed
    assert mask.kinds() == kinds
    assert mask.unknown() == unknown
    assert mask.known() == "alone, fast, plain, subject"
