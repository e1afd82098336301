"""A task's folder: confined, whole, and described by its manifest (WIRE 5.1, 5.3, 5.4)."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from worker.results_folder import ResultToWrite, choose_folder, prepare, write_results, write_whole


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, "t1"),
        ("  ", "t1"),
        ("runs", "runs/t1"),
        ("runs/t1", "runs/t1"),
        ("runs/t1/", "runs/t1"),
        ("a/../b", "b/t1"),
    ],
)
def test_paths_inside_the_results_dir_are_taken_as_given(tmp_path: Path, wanted: str | None, expected: str):
    assert choose_folder("t1", wanted, tmp_path, ()) == (tmp_path / expected, "")


@pytest.mark.parametrize("wanted", ["/ignored/out", "../elsewhere", "a/../../b", ".worker/w1", "/"])
def test_paths_outside_or_hidden_are_mapped_into_the_results_dir_with_a_warning(tmp_path: Path, wanted: str):
    folder, warning = choose_folder("t1", wanted, tmp_path, ())

    assert folder == tmp_path / "t1"
    assert wanted in warning


def test_a_link_does_not_lead_out(tmp_path: Path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "link").symlink_to(tmp_path)

    folder, warning = choose_folder("t1", "link/x", results, ())

    assert folder == results / "t1"
    assert "outside" in warning


def test_an_absolute_path_under_an_allowed_root_is_kept(tmp_path: Path):
    results, other = tmp_path / "results", tmp_path / "other"

    assert choose_folder("t1", str(other / "x"), results, (other,)) == (other / "x" / "t1", "")


def write_result(folder: Path, task_id: str, result: dict[str, object], required: tuple[str, ...]) -> None:
    assert write_results([ResultToWrite(folder, task_id, result, required)]) == [None]


def test_one_result_that_cannot_be_written_keeps_no_other_back(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    wanted = [ResultToWrite(tmp_path / name, name, {"n": name}, ()) for name in ("a", "file", "b")]

    first, second, third = write_results(wanted)

    assert (first, third) == (None, None)
    assert isinstance(second, FileExistsError | NotADirectoryError)
    assert json.loads((tmp_path / "b" / "responses.json").read_text()) == {"n": "b"}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "artifacts",
        "logs",
        "manifest.json",
        "responses.json",
    ]


def test_a_loop_of_links_below_a_declared_name_is_only_missing(tmp_path: Path):
    folder = tmp_path / "t1"
    prepare(folder)
    (folder / "loop").symlink_to("loop")

    write_result(folder, "t1", {"ok": True}, ("loop/x", "loop", "logs/../../t1/logs"))

    entries = {entry["name"]: entry for entry in json.loads((folder / "manifest.json").read_text())["entries"]}
    assert entries["loop/x"]["status"] == "missing"
    assert entries["loop"]["status"] == "present"


def test_a_result_is_indented_utf8_without_nan(tmp_path: Path):
    write_result(tmp_path / "t1", "t1", {"text": "Grüße", "loss": math.nan, "more": [math.inf, 1.5]}, ())

    raw = (tmp_path / "t1" / "responses.json").read_bytes()
    assert "Grüße".encode() in raw
    assert b"\n  " in raw
    assert json.loads(raw) == {"text": "Grüße", "loss": None, "more": [None, 1.5]}


def test_the_manifest_lists_required_and_other_entries(tmp_path: Path):
    folder = tmp_path / "t1"
    prepare(folder)
    (folder / "logs" / "engine.log").write_text("hello")
    (folder / "final_model").mkdir()
    (folder / "final_model" / "weights.bin").write_bytes(b"12345")
    (folder / "notes.txt").write_text("x")

    write_result(folder, "t1", {"ok": True}, (" ./final_model/ ", "final_lora.tar.gz", "../outside"))

    manifest = json.loads((folder / "manifest.json").read_text())
    entries = {entry["name"]: entry for entry in manifest["entries"]}
    assert manifest["task_id"] == "t1"
    assert manifest["generated_at"].endswith("+00:00")
    assert list(entries)[:6] == sorted(
        ["../outside", "artifacts", "final_lora.tar.gz", "final_model", "logs", "responses.json"]
    )
    digest = hashlib.sha256((folder / "responses.json").read_bytes()).hexdigest()
    assert entries["responses.json"]["sha256"] == digest
    assert entries["responses.json"]["type"] == "result"
    assert (entries["logs"]["type"], entries["logs"]["file_count"], entries["logs"]["size"]) == ("logs", 1, 5)
    assert (entries["final_model"]["type"], entries["final_model"]["size"]) == ("directory", 5)
    assert entries["final_lora.tar.gz"] == {
        "name": "final_lora.tar.gz",
        "path": "final_lora.tar.gz",
        "type": "artifact",
        "required": True,
        "status": "missing",
    }
    assert entries["../outside"]["status"] == "missing"
    assert (entries["notes.txt"]["required"], entries["notes.txt"]["type"]) == (False, "artifact")
    assert entries["notes.txt"]["sha256"] == hashlib.sha256(b"x").hexdigest()
    assert "manifest.json" not in entries


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path):
    target = tmp_path / "file.json"
    write_whole(target, b"old")
    blocked = tmp_path / "folder.json"
    blocked.mkdir()

    with pytest.raises(OSError, match="directory"):
        write_whole(blocked, b"new")
    write_whole(target, b"new")

    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder.json"]
