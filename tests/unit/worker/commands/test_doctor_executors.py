"""What `doctor` says of kinds of task and their executors."""

from __future__ import annotations

import pytest
from choosing_subjects import ALONE, BROKEN, FAST, MISSING, PICKY, PLAIN, use_catalog

from executors.catalog import CatalogEntry
from executors.contract import EngineHost
from worker.commands import doctor_checks
from worker.commands.doctor_checks import Finding, examine
from worker.gpu_facts import GpuDevice, GpuFacts

DEAD = "redis://127.0.0.1:1/0"
LACKS = "no_such_library is not installed here (uv sync --inexact --extra more)"
OFF = "left out by WORKER_EXECUTOR_MASK"


def findings(monkeypatch: pytest.MonkeyPatch, *entries: CatalogEntry, mask: str = "", gpus: int = 0) -> list[Finding]:
    use_catalog(monkeypatch, *entries)
    devices = tuple(GpuDevice(index, f"GPU-{index}", "NVIDIA T4", 2**34) for index in range(gpus))
    monkeypatch.setattr(doctor_checks, "_gpu_facts", lambda _: GpuFacts("580", "13.0", devices))
    monkeypatch.setenv("REDIS_URL", DEAD)
    monkeypatch.setenv("WORKER_EXECUTOR_MASK", mask)
    mine = {f"type {entry.kind}" for entry in entries} | {f"  {entry.name}" for entry in entries}
    return [one for one in examine() if one.subject in mine or "WORKER_EXECUTOR_MASK" in one.message]


def lines(found: list[Finding]) -> list[tuple[str, str, str]]:
    return [(one.level, one.subject, one.message) for one in found]


def test_it_names_the_executor_of_a_plain_task_and_what_each_one_lacks(monkeypatch: pytest.MonkeyPatch):
    found = findings(monkeypatch, MISSING, FAST, PLAIN)

    assert lines(found) == [
        ("OK", "type subject", f"a plain task runs with fast, not missing: {LACKS}"),
        ("OK", "  missing", f"cannot run here: {LACKS}"),
        ("OK", "  fast", "installed"),
        ("OK", "  plain", "installed"),
    ]
    assert found[1].fix == "install it on the worker: uv sync --inexact --extra more"


def test_an_executor_that_is_installed_but_broken_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    found = findings(monkeypatch, BROKEN, PLAIN)

    assert [(one.level, one.subject) for one in found] == [
        ("OK", "type subject"), ("WARN", "  broken"), ("OK", "  plain"),
    ]  # fmt: skip
    assert "No module named 'no_such_module'" in found[1].message


def test_where_no_executor_can_run_it_says_so(monkeypatch: pytest.MonkeyPatch):
    found = findings(monkeypatch, MISSING, PLAIN, mask="missing")

    assert [(one.level, one.subject) for one in found] == [
        ("WARN", "type subject"), ("WARN", "  missing"), ("OK", "  plain"),
    ]  # fmt: skip
    assert LACKS in found[0].message
    assert found[0].fix == "`uv sync --inexact --extra more` on the worker"
    assert found[2].message == OFF


@pytest.mark.parametrize(
    ("mask", "subject", "message"),
    [
        ("plain", "type subject", "a plain task runs with plain, not fast: switched off by WORKER_EXECUTOR_MASK"),
        ("plain", "  fast", OFF),
        ("plain", "type alone", OFF),
        ("alone", "type subject", OFF),
        ("alone", "type alone", "installed"),
    ],
)
def test_what_the_mask_leaves_out_says_so(monkeypatch: pytest.MonkeyPatch, mask: str, subject: str, message: str):
    assert ("OK", subject, message) in lines(findings(monkeypatch, FAST, PLAIN, ALONE, mask=mask))


def test_an_unknown_name_in_the_mask_is_a_warning_with_the_known_ones(monkeypatch: pytest.MonkeyPatch):
    warning = findings(monkeypatch, FAST, PLAIN, mask="subject,poem")[-1]

    assert (warning.level, warning.subject) == ("WARN", "settings")
    assert "'poem'" in warning.message
    assert warning.fix == "known: fast, plain, subject"


def test_an_only_executor_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    alone = CatalogEntry("alone", MISSING.target, extra="more", requires=MISSING.requires)

    assert lines(findings(monkeypatch, alone)) == [("WARN", "type alone", f"cannot run here: {LACKS}")]


def test_a_kind_whose_tasks_always_need_more_depends_on_the_task(monkeypatch: pytest.MonkeyPatch):
    again = CatalogEntry(PICKY.kind, PICKY.target, name="again")

    assert lines(findings(monkeypatch, PICKY, again))[0] == (
        "OK", "type subject", "it depends on the task which executor runs it",
    )  # fmt: skip


@pytest.mark.parametrize(("gpus", "executor"), [(2, "fast: first choice"), (0, "plain, not fast: there is no GPU")])
def test_the_gpus_of_this_host_count(monkeypatch: pytest.MonkeyPatch, gpus: int, executor: str):
    def needs_gpu(_spec: object, host: EngineHost) -> str:
        return "" if host.gpus else "there is no GPU here"

    monkeypatch.setattr("choosing_subjects.Fast.unsuitable", needs_gpu)

    (choice, *_) = findings(monkeypatch, FAST, PLAIN, gpus=gpus)

    assert choice.message.startswith(f"a plain task runs with {executor}")
