"""The launcher of a training's processes, with ranks that play one scene each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fake_rank
import psutil
import pytest
from recording_report import RecordingReport
from waiting_until import wait_until

from executors.contract import EnginePolicy, LogLevel
from executors.errors import TaskCancelledError
from executors.failure_report import ReportedFailureError, verdict_on
from executors.training.ranks import rank_group
from executors.training.ranks.rank_group import RankGroup, RanksOutOfMemoryError
from executors.training.ranks.rank_logs import RankLogs
from executors.training.training_job import TrainingJob

REPO = Path(__file__).resolve().parents[3]
SPEC = {"model": {"source": {"identifier": "tiny"}}, "data": {"prompts": ["a"]}}


class CancelsAtNews(RecordingReport):
    """Cancels the task once it hears that a rank prints, or writes files."""

    def log(self, level: LogLevel, message: str) -> None:
        super().log(level, message)
        if " prints: " in message or " write " in message:
            self.cancel()


def job_in(folder: Path, **changed: object) -> TrainingJob:
    fields = {"batch_size": 4, "gradient_accumulation_steps": 1, **changed}
    return TrainingJob(kind="sft", task_id="t-1", sent_spec=SPEC, out_dir=folder, policy=EnginePolicy(), **fields)


def one(scene: str, folder: Path) -> Callable[[Path], Sequence[str]]:
    return lambda address: [sys.executable, fake_rank.__file__, str(address), "0", scene, str(folder / "pids")]


def several(*scenes: str) -> Callable[[Path], Sequence[str]]:
    """A launcher with one rank for each scene; it waits for all."""

    def command(address: Path) -> Sequence[str]:
        ranks = [[sys.executable, fake_rank.__file__, str(address), str(n), scene] for n, scene in enumerate(scenes)]
        code = (
            f"import subprocess; ranks = [subprocess.Popen(each, start_new_session=True) for each in {ranks!r}]\n"
            "for rank in ranks: rank.wait()"
        )
        return [sys.executable, "-c", code]

    return command


def group(scene: str, folder: Path, report: RecordingReport | None = None) -> RankGroup:
    return RankGroup(one(scene, folder), 1, job_in(folder), folder, report or RecordingReport())


def heard_of(scene: str, folder: Path) -> list[str]:
    """What is heard of a rank until a sign of its life."""
    report = CancelsAtNews()
    (folder / "logs").mkdir()
    with pytest.raises(TaskCancelledError):
        RankGroup(one(scene, folder), 1, job_in(folder), folder / "logs", report).run()
    return report.logged


def failure_of(scene: str, folder: Path) -> ReportedFailureError:
    with pytest.raises(ReportedFailureError) as caught:
        group(scene, folder).run()
    return caught.value


def test_what_a_rank_tells_arrives(tmp_path: Path):
    report = RecordingReport()

    outcome = group("done", tmp_path, report).run()

    assert (outcome.dataset_size, outcome.model_name, outcome.metrics) == (4, "tiny", {"steps": 2})
    assert outcome.warnings == ["one of the outcome's own", "the tokenizer has no padding token"]
    assert report.told == [(1, 2)]
    assert report.metrics == [{"loss": 0.5}]
    assert {"info: rank 0 trains", "warning: the tokenizer has no padding token"} <= set(report.logged)


def test_of_several_ranks_the_first_reports_and_each_warning_counts_once(tmp_path: Path):
    report = RecordingReport()

    outcome = RankGroup(several("done", "done"), 2, job_in(tmp_path, ranks=2), tmp_path, report).run()

    assert outcome.warnings == ["one of the outcome's own", "the tokenizer has no padding token"]
    assert report.told == [(1, 2)]
    assert {"info: rank 0 trains", "info: rank 1 trains"} <= set(report.logged)


def test_a_failure_is_passed_on_with_the_last_lines(tmp_path: Path):
    verdict = verdict_on(failure_of("failed", tmp_path))

    assert verdict.engine_usable
    assert (verdict.failure.reason, verdict.failure.message) == ("executor_error", "ValueError: no such thing")
    assert verdict.failure.log_tail == ("first line", "last line")


def test_a_foreseen_failure_says_all_by_itself(tmp_path: Path):
    failure = failure_of("refused", tmp_path).failure

    assert (failure.reason, failure.message, failure.log_tail) == ("bad_data", "the data set is empty", ())


def test_the_lines_of_an_earlier_try_are_not_shown(tmp_path: Path):
    (tmp_path / "rank0.log").write_text("an older line\n")

    assert failure_of("failed", tmp_path).failure.log_tail == ("first line", "last line")
    assert (tmp_path / "rank0.log").read_text().startswith("an older line\nfirst line")


def test_a_lack_of_memory_is_told_with_its_numbers(tmp_path: Path):
    error = failure_of("greedy", tmp_path)

    assert isinstance(error, RanksOutOfMemoryError)
    assert (error.rank, error.failure.reason, error.memory["total"]) == (0, "gpu_oom", 4 * 2**30)


@pytest.mark.parametrize(
    ("scene", "text", "tail"),
    [
        ("killed", "rank 0 ended by SIGKILL in the middle of the training", ("the last words",)),
        ("exits", "rank 0 ended with status 3 in the middle of the training", ()),
        ("silent", "the training's process ended with status 4 in the middle", ("no connection for me",)),
    ],
)
def test_a_rank_that_ends_without_a_word_is_a_crash(scene: str, text: str, tail: tuple[str, ...], tmp_path: Path):
    failure = failure_of(scene, tmp_path).failure

    assert (failure.reason, failure.retryable, failure.log_tail) == ("engine_crash", True, tail)
    assert text in failure.message
    assert "logs/rank0.log" in failure.hint


def test_the_death_of_one_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_group, "_STATUS_SEC", 0.1)
    before = children()
    with pytest.raises(ReportedFailureError) as caught:
        RankGroup(several("hangs_alone", "exits"), 2, job_in(tmp_path, ranks=2), tmp_path, RecordingReport()).run()

    assert "rank 1 ended without a word" in caught.value.failure.message
    assert children() == before


class LosesTheSecond(RecordingReport):
    """Kills rank 1 when both are at work; rank 0 then fails too, and the launcher hears of both at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._pids: dict[str, int] = {}

    def log(self, level: LogLevel, message: str) -> None:
        super().log(level, message)
        name, found, pid = message.partition(" works as pid ")
        if found:
            self._pids[name] = int(pid)
        if not found or len(self._pids) < 2:
            return
        second = psutil.Process(self._pids["rank 1"])
        second.kill()
        wait_until(lambda: second.status() == psutil.STATUS_ZOMBIE or not second.is_running(), "rank 1 is dead")
        os.kill(self._pids["rank 0"], signal.SIGUSR1)
        wait_until(lambda: "it has said so" in (self._folder / "torchrun.log").read_text(), "rank 0 has failed")


def test_the_death_of_a_rank_counts_more_than_what_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_group, "_STATUS_SEC", 0.1)
    command = several("fails_when_told", "works_on")
    with pytest.raises(ReportedFailureError) as caught:
        RankGroup(command, 2, job_in(tmp_path, ranks=2), tmp_path, LosesTheSecond(tmp_path)).run()

    assert caught.value.failure.reason == "engine_crash"
    assert "rank 1 ended without a word" in caught.value.failure.message


def test_torchrun_is_believed_about_how_a_rank_ended(tmp_path: Path):
    words = "E1 api.py:1003] failed (exitcode: -9) local_rank: 1 (pid: 77) of binary: python"
    inner = several("hangs_alone", "exits")

    def command(address: Path) -> Sequence[str]:
        return ["sh", "-c", 'echo "$0" >&2; exec "$@"', words, *inner(address)]

    with pytest.raises(ReportedFailureError) as caught:
        RankGroup(command, 2, job_in(tmp_path, ranks=2), tmp_path, RecordingReport()).run()

    assert "rank 1 ended by SIGKILL" in caught.value.failure.message
    assert "dmesg" in caught.value.failure.hint
    assert (tmp_path / "torchrun.log").read_text().startswith(words)


@pytest.mark.parametrize("scene", ["babbles", "stranger", "impatient", "without_outcome"])
def test_what_is_no_message_ends_the_training(scene: str, tmp_path: Path):
    failure = failure_of(scene, tmp_path).failure

    assert (failure.reason, failure.retryable) == ("engine_protocol", False)


def test_a_line_without_an_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_group, "LONGEST_MESSAGE", 200_000)

    failure = failure_of("never_stops", tmp_path).failure

    assert failure.reason == "engine_protocol"
    assert "more than 200000 bytes" in failure.message


def test_a_cancel_leaves_nothing_behind_and_is_quick(tmp_path: Path):
    report = RecordingReport(stop_when=lambda metrics: metrics["done"] == 1)
    began = time.monotonic()

    with pytest.raises(TaskCancelledError):
        RankGroup(one("hangs", tmp_path), 1, job_in(tmp_path), tmp_path, report).run()

    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert time.monotonic() - began < 10  # with the start of four interpreters


def test_who_has_said_all_and_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_group, "_END_SEC", 0.2)
    before = children()

    assert group("lingers", tmp_path).run().dataset_size == 4
    assert children() == before


def test_who_prints_is_known_to_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("executors.training.ranks.rank_logs._NEWS_SEC", 0.0)

    assert "debug: rank 0 prints: loading" in heard_of("chatty", tmp_path)


def test_who_writes_is_known_to_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A save may take long, and prints nothing."""
    monkeypatch.setattr("executors.training.ranks.rank_logs._NEWS_SEC", 0.0)

    assert "debug: the ranks write files" in heard_of("writes", tmp_path)


def test_what_others_write_is_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("executors.training.ranks.rank_logs._NEWS_SEC", 0.0)
    for name in ("logs", "artifacts"):
        (tmp_path / name).mkdir()
    logs = RankLogs(tmp_path / "logs", 1, tmp_path)

    (tmp_path / "logs" / "engine.log").write_text("a line")
    (tmp_path / "artifacts" / "tracker.db").write_text("a row")

    assert logs.news() is None


def test_a_flood_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("executors.training.ranks.rank_logs._MOST_BYTES", 200_000)
    (tmp_path / "rank0.log").write_text("an older line\n")

    failure = failure_of("floods", tmp_path).failure

    log = (tmp_path / "rank0.log").read_text()
    assert len(log) < 200_000
    assert log.startswith("an older line\nxxx")
    assert "[too much was printed" in log
    assert failure.log_tail[-1] == "the last words"


def test_a_rank_that_does_not_read_its_job_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_group, "_SEND_SEC", 0.2)
    large = job_in(tmp_path).model_copy(update={"sent_spec": {**SPEC, "data": {"prompts": ["a" * 10**7]}}})

    with pytest.raises(ReportedFailureError) as caught:
        RankGroup(one("takes_no_job", tmp_path), 1, large, tmp_path, RecordingReport()).run()

    failure = caught.value.failure
    assert (failure.reason, failure.retryable) == ("engine_crash", True)
    assert failure.message == "rank 0 did not read its job within 0.2 s"


def test_no_socket_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    group("done", tmp_path).run()

    assert not list(tmp_path.glob("ranks-*"))


@pytest.mark.parametrize("name", ["d" * 120, "\N{SNOWMAN}" * 12])
def test_a_long_temporary_folder_is_no_obstacle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deep = tmp_path / name
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))

    assert group("done", tmp_path).run().dataset_size == 4
    assert not list(deep.iterdir())


def test_a_rank_ends_when_its_launcher_is_killed(tmp_path: Path):
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, job_in(tmp_path).model_dump_json(), str(tmp_path)], cwd=REPO
    )
    try:
        wait_until((tmp_path / "pid").exists, what="the rank has its job")
        rank = psutil.Process(int((tmp_path / "pid").read_text()))
        launcher.send_signal(signal.SIGKILL)
        wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, what="the rank has ended")
    finally:
        launcher.kill()
        launcher.wait()
    assert json.loads((tmp_path / "job").read_text())["task_id"] == "t-1"


_LAUNCHER = """
import sys
from pathlib import Path
sys.path.append("tests/support")
from recording_report import RecordingReport
from executors.training.ranks.rank_group import RankGroup
from executors.training.training_job import TrainingJob
RANK = '''
import os, signal, sys
from pathlib import Path
from executors.training.ranks.rank_channel import RankChannel
folder = Path(sys.argv[2])
(folder / "job").write_text(RankChannel(sys.argv[1], 0).job().model_dump_json())
(folder / "new").write_text(str(os.getpid()))
(folder / "new").rename(folder / "pid")
while True:
    signal.pause()
'''
job, folder = TrainingJob.model_validate_json(sys.argv[1]), Path(sys.argv[2])
command = [sys.executable, "-c", RANK]
RankGroup(lambda address: [*command, str(address), str(folder)], 1, job, folder, RecordingReport()).run()
"""


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}
