"""What a long generation keeps on disk: cuts, foreign and broken files, threads, a real kill."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from executors.inference.partial_results import PARTIAL_FILE, PartialResults

REPO = Path(__file__).resolve().parents[3]
HEADER = b'{"format": 1, "identity": "abc"}\n'


@contextmanager
def begun(folder: Path, *, resume: bool = True, identity: str = "abc") -> Iterator[PartialResults]:
    with closing(PartialResults.begin(folder, identity, resume=resume)) as partial:
        yield partial


def fill(folder: Path, count: int) -> bytes:
    with begun(folder, resume=False) as partial:
        for number in range(count):
            partial.add(f"k{number}", {"output": f"só {number}", "tokens": [number]})
    return (folder / PARTIAL_FILE).read_bytes()


def test_the_form_of_the_file(tmp_path: Path):
    with begun(tmp_path, resume=False) as partial:
        partial.add("own/0", {"output": "é\n\u2028", "score": 0.5, "nothing": None})
        assert partial.finished("own/0") is None

    header, line = (tmp_path / PARTIAL_FILE).read_bytes().splitlines()
    assert header + b"\n" == HEADER
    assert json.loads(line) == {"key": "own/0", "value": {"output": "é\n\u2028", "score": 0.5, "nothing": None}}


def test_what_was_added_is_found_again_exactly(tmp_path: Path):
    value = {"output": "a\ud800\x00\U0001f600", "big": 10**20, "deep": {"a": [1.5, None, True]}}
    with begun(tmp_path, resume=False) as partial:
        partial.add("k", value)
        partial.add("nan", {"score": float("nan")})
        partial.add("twice", {"n": 1})
        partial.add("twice", {"n": 2})

    with begun(tmp_path) as partial:
        assert partial.note == ""
        assert partial.finished("k") == value
        assert partial.finished("nan") == {"score": None}
        assert partial.finished("twice") == {"n": 2}
        assert partial.finished("other") is None


def test_without_resume_the_file_begins_anew(tmp_path: Path):
    fill(tmp_path, 3)
    with begun(tmp_path, resume=False) as partial:
        assert partial.finished("k0") is None
        assert partial.note == ""
    assert (tmp_path / PARTIAL_FILE).read_bytes() == HEADER


def test_without_an_earlier_file_there_is_nothing_to_tell(tmp_path: Path):
    with begun(tmp_path) as partial:
        assert partial.note == ""
    assert (tmp_path / PARTIAL_FILE).read_bytes() == HEADER


def test_cut_at_every_byte_of_the_last_two_lines(tmp_path: Path):
    whole = fill(tmp_path, 4)
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[-3], len(whole) + 1):
        (tmp_path / PARTIAL_FILE).write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends) - 1

        with begun(tmp_path) as partial:
            assert partial.note == ""
            found = [number for number in range(4) if partial.finished(f"k{number}")]
            assert found == list(range(kept)), cut
            partial.add("new", {"output": "fresh"})

        after = (tmp_path / PARTIAL_FILE).read_bytes()
        assert after == whole[: ends[kept]] + b'{"key": "new", "value": {"output": "fresh"}}\n', cut


def test_cut_at_every_byte_of_the_header(tmp_path: Path):
    for cut in range(len(HEADER)):
        (tmp_path / PARTIAL_FILE).write_bytes(HEADER[:cut])
        with begun(tmp_path) as partial:
            assert bool(partial.note) == (cut > 0)
        assert (tmp_path / PARTIAL_FILE).read_bytes() == HEADER


def test_another_identity_begins_anew_and_says_so(tmp_path: Path):
    fill(tmp_path, 2)
    with begun(tmp_path, identity="xyz") as partial:
        assert partial.finished("k0") is None
        assert "other data, settings or another model" in partial.note
        assert PARTIAL_FILE in partial.note
        partial.add("k1", {"n": 1})
    with begun(tmp_path, identity="xyz") as partial:
        assert partial.finished("k0") is None
        assert partial.finished("k1") == {"n": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 5000,
        b"\xff\xfe\n\xff\n",
        b"\n\n",
        b"[" * 100_000 + b"\n",
        b"[]\n",
        b'{"format": 2, "identity": "abc"}\n',
        b'{"identity": "abc"}\n',
        b'{"key": "a", "value": {}}\n',
        bytes(range(256)) * 16,
    ],
)
def test_garbage_begins_anew_and_says_so(content: bytes, tmp_path: Path):
    (tmp_path / PARTIAL_FILE).write_bytes(content)
    with begun(tmp_path) as partial:
        assert "does not begin with" in partial.note
        assert partial.finished("a") is None
    assert (tmp_path / PARTIAL_FILE).read_bytes() == HEADER


@pytest.mark.parametrize(
    "broken", [b"\x00" * 512 + b"\n", b"[" * 100_000 + b"\n", b"{}\n", b'{"key": 1, "value": {}}\n', b"\n"]
)
def test_lines_behind_a_damaged_one_do_not_count(broken: bytes, tmp_path: Path):
    whole = fill(tmp_path, 2)
    (tmp_path / PARTIAL_FILE).write_bytes(whole + broken + b'{"key": "late", "value": {}}\n')
    with begun(tmp_path) as partial:
        assert partial.finished("k1") is not None
        assert partial.finished("late") is None
        assert partial.note.startswith("line 4 of the earlier")
    assert (tmp_path / PARTIAL_FILE).read_bytes() == whole


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_is_replaced_and_never_followed(resume: bool, tmp_path: Path):  # noqa: FBT001 - a parameter
    folder, target = tmp_path / "task", tmp_path / "other.jsonl"
    folder.mkdir()
    target.write_bytes(HEADER + b'{"key": "a", "value": {"n": 1}}\n')
    (folder / PARTIAL_FILE).symlink_to(target)

    with begun(folder, resume=resume) as partial:
        assert partial.finished("a") is None
        assert bool(partial.note) == resume
        partial.add("b", {})

    assert not (folder / PARTIAL_FILE).is_symlink()
    assert target.read_bytes() == HEADER + b'{"key": "a", "value": {"n": 1}}\n'


def test_a_pipe_is_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / PARTIAL_FILE)
    with begun(tmp_path) as partial:
        assert "no ordinary file" in partial.note
    assert (tmp_path / PARTIAL_FILE).read_bytes() == HEADER


def test_a_folder_in_its_place_is_an_error(tmp_path: Path):
    (tmp_path / PARTIAL_FILE).mkdir()
    with pytest.raises(OSError, match=PARTIAL_FILE):
        PartialResults.begin(tmp_path, "abc", resume=True)


def test_too_many_open_files_do_not_cost_what_was_finished(tmp_path: Path):
    whole = fill(tmp_path, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            PartialResults.begin(tmp_path, "abc", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / PARTIAL_FILE).read_bytes() == whole


def test_closing_twice_is_fine_and_adding_afterwards_is_not(tmp_path: Path):
    partial = PartialResults.begin(tmp_path, "abc", resume=False)
    partial.close()
    partial.close()
    with pytest.raises(ValueError, match="is closed"):
        partial.add("k", {})


def test_a_full_disk_leaves_no_half_line(tmp_path: Path):
    """A limit on the size of files stands in for the disk: a write that crosses it is short, and the next one fails."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        from executors.inference.partial_results import PartialResults
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        partial = PartialResults.begin(Path(sys.argv[1]), "abc", resume=False)
        partial.add("a", {"output": "x"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            partial.add("b", {"output": "y" * 5000})
        except OSError as error:
            print(error.errno)
        partial.add("c", {"output": "z"})
        partial.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        cwd=REPO, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == [str(errno.EFBIG)]
    with begun(tmp_path) as partial:
        assert partial.finished("a") == {"output": "x"}
        assert partial.finished("b") is None
        assert partial.finished("c") == {"output": "z"}
        assert partial.note == ""


def test_a_full_disk_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{descriptor} {len(content)}")

    with begun(tmp_path, resume=False) as partial:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left") as caught:
                partial.add("k", {})
        assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / PARTIAL_FILE).read_bytes() == HEADER


def test_the_disk_is_asked_about_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, synced = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", synced.append)
    with begun(tmp_path, resume=False) as partial:
        for _ in range(31):
            partial.add("k", {})
            now[0] += 0.125
        assert len(synced) == 3
    assert len(synced) == 4


def test_threads_share_it(tmp_path: Path):
    with begun(tmp_path, resume=False) as partial:

        def work(name: str) -> None:
            for number in range(2000):
                partial.add(f"{name}{number}", {"output": name * (number % 300)})

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with begun(tmp_path) as partial:
        assert partial.note == ""
        for name in "abcd":
            for number in range(2000):
                assert partial.finished(f"{name}{number}") == {"output": name * (number % 300)}


WRITER = """
import sys
from pathlib import Path
from executors.inference.partial_results import PartialResults
partial = PartialResults.begin(Path(sys.argv[1]), "abc", resume=True)
number = 0
while partial.finished(str(number)):
    number += 1
print("from", number, flush=True)
while True:
    partial.add(str(number), {"output": str(number) * 50})
    print(number, flush=True)
    number += 1
"""


def test_a_killed_writer_loses_nothing_that_it_has_added(tmp_path: Path):
    floor = 0
    for round_number in (1, 2, 3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert int(writer.stdout.readline().removeprefix("from ")) >= floor
            seen = floor
            while seen < floor + 300 * round_number:
                seen = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().splitlines(keepends=True)
        assert writer.returncode == -signal.SIGKILL
        told = [int(line) for line in rest if line.endswith("\n")]
        last = max([seen, *told])

        with begun(tmp_path) as partial:
            assert partial.note == ""
            for number in range(last + 1):
                assert partial.finished(str(number)) == {"output": str(number) * 50}
            assert partial.finished(str(last + 2)) is None  # at most one was added and not told
        floor = last + 1


def test_a_hundred_thousand_entries_are_quick(tmp_path: Path):
    count, start = 100_000, time.monotonic()
    with begun(tmp_path, resume=False) as partial:
        for number in range(count):
            partial.add(f"own/{number}", {"output": "some words that a model wrote " * 5, "tokens": 30})
    with begun(tmp_path) as partial:
        assert partial.finished(f"own/{count - 1}") is not None
    assert time.monotonic() - start < 60, "about three seconds on an idle machine"
