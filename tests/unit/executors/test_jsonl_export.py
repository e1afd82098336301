"""`postprocess.jsonl_export`: what a source gives, what a path may be, what lies on the disk afterwards."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from pydantic import JsonValue, ValidationError

from executors.contract import Artifact, JsonObject
from executors.errors import BadDataError, BadSpecError
from executors.inference.jsonl_export import ExportSource, JsonlExport, write_export
from executors.inference.partial_results import PARTIAL_FILE
from orchestrator_client.validation_text import validation_text

ITEM: JsonObject = {
    "index": 7,
    "prompt": "Be brief.\n2+2?",
    "output": "4",
    "finish_reason": "stop",
    "blank": " \n",
    "truth": True,
    "odds": 0.5,
    "many": [1, "é", None],
    "nan": float("nan"),
    "metadata": {
        "prompt": "2+2?",
        "rendered_prompt": "Be brief.\n2+2?",
        "topic": "sums",
        "a.b": "dotted",
        "nothing": None,
        "deep": {"er": {"est": 3}},
    },
}


def text_of(source: object, item: JsonObject = ITEM) -> str:
    return ExportSource.model_validate(source).text_in(item)


def export_of(**keys: object) -> JsonlExport:
    return JsonlExport.model_validate({"path": "export.jsonl", "fields": {"answer": "output"}, **keys})


def error_text(**keys: object) -> str:
    with pytest.raises(ValidationError) as caught:
        export_of(**keys)
    return validation_text(caught.value, "spec.postprocess.jsonl_export")


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("prompt", "Be brief.\n2+2?"),
        ("output", "4"),
        ("metadata.prompt", "2+2?"),
        ("metadata.topic", "sums"),
        ("metadata.a.b", "dotted"),
        ("metadata.deep.er.est", "3"),
        ("metadata.deep.er", '{"est": 3}'),
        ("metadata.deep.er.est.too", ""),
        ("metadata.nothing", ""),
        ("metadata.missing.one", ""),
        ("item.index", "7"),
        ("item.truth", "true"),
        ("item.odds", "0.5"),
        ("item.many", '[1, "é", null]'),
        ("item.nan", ""),
        ("item.metadata.topic", "sums"),
        ("item.missing", ""),
        ("quiz-1", "quiz-1"),
        (" output ", " output "),
        ("Output", "Output"),
        ("metadata", "metadata"),
        ("metadata.", "metadata."),
        ("prompt.x", "prompt.x"),
        ("", ""),
        (3, "3"),
        (False, "false"),
    ],
)
def test_source_strings(source: object, text: str):
    assert text_of(source) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"from": "prompt"}, "Be brief.\n2+2?"),
        ({"source": "Output"}, "4"),
        ({"from": "output", "source": "prompt"}, "4"),
        ({"from": "metadata", "key": "deep.er.est"}, "3"),
        ({"from": "metadata", "key": "a.b"}, "dotted"),
        ({"from": "item", "key": "index"}, "7"),
        ({"from": "literal", "value": "output"}, "output"),
        ({"from": "literal", "literal": 1.5}, "1.5"),
        ({"from": "literal", "value": {"a": [True]}}, '{"a": [true]}'),
        ({"value": "metadata.topic"}, "metadata.topic"),
        ({"literal": 0}, "0"),
        ({"key": "output"}, "4"),
        ({"key": "metadata.topic"}, "sums"),
        ({"from": None, "source": "output", "key": None}, "4"),
        ({"from": "output", "key": "left", "value": "over"}, "4"),
        ({"from": " ", "value": "x"}, "x"),
        ({"default": "x"}, "x"),
    ],
)
def test_source_objects(source: object, text: str):
    assert text_of(source) == text


def test_without_a_key_it_is_the_whole_object():
    assert json.loads(text_of({"from": "metadata"})) == ITEM["metadata"]
    assert json.loads(text_of({"from": "item"})) == {**ITEM, "nan": None}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"from": "item", "key": "missing", "fallback": "output"}, "4"),
        ({"from": "item", "key": "blank", "fallback": "metadata.topic"}, "sums"),
        ({"from": "item", "key": "nan", "fallback": "none"}, "none"),
        ({"from": "output", "fallback": "unused", "default": "unused"}, "4"),
        ({"from": "item", "key": "truth", "fallback": "unused"}, "true"),
        ({"from": "item", "key": "missing", "default": "output"}, "output"),
        ({"from": "item", "key": "missing", "default": [1]}, "[1]"),
        ({"from": "item", "key": "blank", "default": "unused"}, " \n"),
        ({"from": "item", "key": "missing", "fallback": "item.gone", "default": "last"}, "last"),
        ({"from": "item", "key": "blank", "fallback": "item.gone", "default": "last"}, "last"),
        ({"from": "item", "key": "missing", "fallback": "item.blank", "default": "unused"}, " \n"),
        ({"key": "missing", "fallback": {"key": "gone", "fallback": {"from": "metadata", "key": "topic"}}}, "sums"),
        ({"key": "missing", "fallback": {"key": "gone", "default": "inner"}, "default": "outer"}, "inner"),
        ({"fallback": "prompt"}, "Be brief.\n2+2?"),
        ({"key": "missing", "fallback": None, "default": None}, ""),
    ],
)
def test_fallback_replaces_null_and_blank_and_default_replaces_null(source: object, text: str):
    assert text_of(source) == text


def test_fallbacks_have_a_depth():
    def nested(depth: int) -> object:
        source: object = "output"
        for _ in range(depth):
            source = {"key": "missing", "fallback": source}
        return source

    assert text_of(nested(8)) == "4"
    for depth in (9, 100_000):
        assert "expected at most 8 fallbacks" in error_text(fields={"a": nested(depth)})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({}, "names no source"),
        ({"from": None, "note": "x"}, "names no source"),
        ({"from": "answer"}, "'prompt', 'output', 'metadata', 'item' or 'literal'"),
        ({"from": "metadata", "key": 3}, "valid string"),
        (["output"], "expected the name of a source"),
        ({"from": "output", "fallback": ["x"]}, "expected the name of a source"),
    ],
)
def test_no_source_is_an_error_that_names_the_field(source: object, problem: str):
    text = error_text(fields={"answer": source})
    assert text.startswith("spec.postprocess.jsonl_export.fields.answer")
    assert problem in text


@pytest.mark.parametrize(
    "path", ["export.jsonl", "a/b/c.jsonl", "artifacts/rows", "a b/é/x", "..a/x", "a.logs/x", "a/_"]
)
def test_paths_inside_the_folder(path: str):
    assert export_of(path=path).path == path


def test_a_path_is_made_plain():
    assert export_of(path="./a//./rows.jsonl").path == "a/rows.jsonl"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/etc/x.jsonl", "leaves the task's folder"),
        ("../x.jsonl", "leaves the task's folder"),
        ("a/../../x.jsonl", "leaves the task's folder"),
        ("..", "leaves the task's folder"),
        ("a\\b.jsonl", "backslash"),
        ("a\nb.jsonl", "control character"),
        ("a\0", "control character"),
        ("", "names no file"),
        (".", "names no file"),
        ("a/", "names no file"),
        ("a/.", "names no file"),
        (".hidden", "cannot be sent"),
        ("a/my rows.jsonl", "cannot be sent"),
        ("é.jsonl", "cannot be sent"),
        ("é/" * 70 + "x", "is too long"),
        ("responses.json", "uses itself"),
        ("./manifest.json", "uses itself"),
        (PARTIAL_FILE, "uses itself"),
        ("a/responses.json", "uses itself"),
        ("responses.json/x", "uses itself"),
        ("logs", "uses itself"),
        (".//logs/x.jsonl", "uses itself"),
        ("artifacts", "uses itself"),
        ("_lora_cache/out.jsonl", "begins with '_'"),
        ("./_x", "begins with '_'"),
        (None, "is missing"),
        (3, "valid string"),
    ],
)
def test_paths_that_are_refused(path: object, problem: str):
    text = error_text(path=path)
    assert text.startswith("spec.postprocess.jsonl_export.path is ")
    assert problem in text


@pytest.mark.parametrize("fields", [{}, {"a": None}, None, [], "output"])
def test_fields_are_required(fields: object):
    assert error_text(fields=fields).startswith("spec.postprocess.jsonl_export.fields is ")


def test_required_fields_have_to_be_fields():
    text = error_text(fields={"a": "output", "b": None}, required_fields=["a", "b"])
    assert text.startswith("spec.postprocess.jsonl_export.required_fields is ['a', 'b']: ")
    assert text.endswith("'b' is not in 'fields'; expected only names of 'a'")


def test_every_item_becomes_a_line_of_texts(tmp_path: Path):
    items: list[JsonObject] = [ITEM, {**ITEM, "index": 8, "output": "", "finish_reason": "error", "error": "null cell"}]
    export = export_of(
        path="a/b/rows.jsonl",
        fields={"q": "metadata.prompt", "answer": "output", "why": "item.error", "n": "item.index", "set": "quiz"},
    )

    entry, artifact = write_export(export, items, tmp_path)

    path = tmp_path / "a" / "b" / "rows.jsonl"
    assert lines_of(path) == [
        {"q": "2+2?", "answer": "4", "why": "", "n": "7", "set": "quiz"},
        {"q": "2+2?", "answer": "", "why": "null cell", "n": "8", "set": "quiz"},
    ]
    assert entry == {
        "path": str(path),
        "worker_path": str(path),
        "relative_path": "a/b/rows.jsonl",
        "record_count": 2,
        "fields": ["q", "answer", "why", "n", "set"],
    }
    assert artifact == Artifact(path="a/b/rows.jsonl", key="jsonl_export", kind="file")
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_failed_item_shows_its_defaults(tmp_path: Path):
    lost: JsonObject = {"index": 1, "prompt": "", "output": "", "finish_reason": "error", "error": "row 1: null cell"}
    fields = {
        "q": "metadata.prompt",
        "topic": {"from": "metadata", "key": "topic", "default": "unknown"},
        "answer": {"from": "output", "fallback": "item.error"},
    }
    write_export(export_of(fields=fields), [ITEM, lost], tmp_path)
    assert lines_of(tmp_path / "export.jsonl") == [
        {"q": "2+2?", "topic": "sums", "answer": "4"},
        {"q": "", "topic": "unknown", "answer": "row 1: null cell"},
    ]


def test_a_line_stays_one_line_and_utf_8(tmp_path: Path):
    output = 'a\n\r\u2028\u2029\x85\x0b\x1c\0"\\ é😀 \ud800'
    write_export(export_of(), [{"output": output}] * 2, tmp_path)

    raw = (tmp_path / "export.jsonl").read_bytes()
    assert "é😀".encode() in raw
    assert lines_of(tmp_path / "export.jsonl") == [{"answer": output.replace("\ud800", "?")}] * 2


def test_no_items_make_an_empty_file(tmp_path: Path):
    entry, _ = write_export(export_of(), [], tmp_path)
    assert entry["record_count"] == 0
    assert (tmp_path / "export.jsonl").read_bytes() == b""


@pytest.mark.parametrize("blank", ["", " \n\t", None])
def test_a_blank_required_field_is_an_error_and_no_file(blank: JsonValue, tmp_path: Path):
    (tmp_path / "export.jsonl").write_text("old")
    items: list[JsonObject] = [ITEM, {**ITEM, "output": blank, "error": "row 1: the cell is null"}]
    export = export_of(fields={"q": "prompt", "answer": "output"}, required_fields=["q", "answer"])

    with pytest.raises(BadDataError) as caught:
        write_export(export, items, tmp_path)

    assert caught.value.message.startswith("item 1: the field 'answer' of spec.postprocess.jsonl_export is blank")
    assert "row 1: the cell is null" in caught.value.message
    assert "fallback" in caught.value.hint
    assert [file.name for file in tmp_path.iterdir()] == ["export.jsonl"]
    assert (tmp_path / "export.jsonl").read_text() == "old"


def test_an_earlier_file_and_what_a_kill_left_are_replaced(tmp_path: Path):
    (tmp_path / "export.jsonl").write_text("old")
    (tmp_path / ".export.jsonl.unfinished").write_text("half")
    write_export(export_of(), [ITEM], tmp_path)
    assert lines_of(tmp_path / "export.jsonl") == [{"answer": "4"}]
    assert [file.name for file in tmp_path.iterdir()] == ["export.jsonl"]


def outside(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("task", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "x.jsonl").write_text("precious")
    return tmp_path / "task", tmp_path / "outside"


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path):
    folder, elsewhere = outside(tmp_path)
    (folder / "a").symlink_to(elsewhere)
    for path in ("a/x.jsonl", "a/b/x.jsonl"):
        with pytest.raises(BadSpecError, match=f"path is '{path}', but a link"):
            write_export(export_of(path=path), [ITEM], folder)
    assert [file.name for file in elsewhere.iterdir()] == ["x.jsonl"]
    assert (elsewhere / "x.jsonl").read_text() == "precious"


@pytest.mark.parametrize("name", ["x.jsonl", ".x.jsonl.unfinished"])
def test_a_file_that_is_a_link_is_replaced(name: str, tmp_path: Path):
    folder, elsewhere = outside(tmp_path)
    (folder / name).symlink_to(elsewhere / "x.jsonl")
    write_export(export_of(path="x.jsonl"), [ITEM], folder)
    assert (elsewhere / "x.jsonl").read_text() == "precious"
    assert not (folder / "x.jsonl").is_symlink()
    assert lines_of(folder / "x.jsonl") == [{"answer": "4"}]


def test_something_else_in_its_place_is_an_error(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for path in ("folder", "file/x.jsonl"):
        with pytest.raises(BadSpecError, match=f"path is '{path}'"):
            write_export(export_of(path=path), [ITEM], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_passed_on_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(descriptor))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_export(export_of(), [ITEM], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_result_folder_behind_a_link_is_fine(tmp_path: Path):
    """Operators link RESULTS_DIR to a larger disk."""
    folder, elsewhere = outside(tmp_path)
    folder.rmdir()
    folder.symlink_to(elsewhere)
    entry, _ = write_export(export_of(), [ITEM], folder)
    assert entry["path"] == str(folder / "export.jsonl")
    assert lines_of(elsewhere / "export.jsonl") == [{"answer": "4"}]
