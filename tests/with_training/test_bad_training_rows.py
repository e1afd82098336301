"""Data that cannot be trained on: each kind of fault gets an error that says where and what."""

import json
import os
from pathlib import Path

import pytest
from row_reading import lines, read, read_jsonl, write_jsonl

from executors.errors import BadDataError, BadSpecError
from executors.training.rows import jsonl_rows
from executors.training.spec.trainer_specs import TrainingKind

pytestmark = pytest.mark.model

GOOD = {"text": "good"}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", r"line 3 is not JSON: .*character 3"),
        ("[1]", "line 3 is a list; expected an object"),
        ("null", "line 3 is null; expected an object"),
        ('{"txt": "x", "more": 1}', r"line 3 has no 'text'; it has txt, more"),
        ('{"text": null}', r"line 3 'text' is null.*the row has text"),
        ('{"text": "  "}', "line 3 'text' is blank"),
        (r'{"text": "\ud800"}', "line 3 'text' holds half of a character"),
        (r'{"text": "x", "\udfff": 1}', r"line 3 has the key '\\udfff' with half of a character"),
        (f'{{"text": {DEEP}}}', "line 3 is nested too deeply"),
        (f'{{"text": {"9" * 5000}}}', "line 3 is not JSON that can be read: .*digits"),
        (f'{{"text": {json.dumps([{"role": "user", "content": "x"}])}}}', "line 3 'text' is a list of messages"),
    ],
)
def test_a_bad_line_is_named(line: str, problem: str, tmp_path: Path):
    with pytest.raises(BadDataError, match=rf"spec\.data\.jsonl: {problem}"):
        read_jsonl(tmp_path, "sft", lines(GOOD) + "\n" + line + "\n")


def test_bytes_that_are_no_text_are_named(tmp_path: Path):
    for content in (b'{"text": "\xff"}', "{}".encode("utf-16")):
        with pytest.raises(BadDataError, match=r"line 1 is not UTF-8 \(byte"):
            read_jsonl(tmp_path, "sft", content)


def test_a_line_that_is_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jsonl_rows, "LONGEST_LINE", 100)
    assert len(read_jsonl(tmp_path, "sft", lines({"text": "x" * 80})).rows) == 1
    with pytest.raises(BadDataError, match="line 2 is longer than 100 bytes"):
        read_jsonl(tmp_path, "sft", lines(GOOD, {"text": "x" * 100}))


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff\n"])
def test_an_empty_jsonl_file_is_an_error(text: str, tmp_path: Path):
    with pytest.raises(BadDataError, match=r"spec\.data\.jsonl gives no rows"):
        read_jsonl(tmp_path, "sft", text)


def test_an_empty_data_set_is_an_error(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, GOOD])
    for options in ({"split": "train[:0]"}, {"max_samples": 1}):
        with pytest.raises(BadDataError, match=r"no rows|no data"):
            read(tmp_path, "sft", {"dataset_name": str(path), **options})
    (tmp_path / "b.csv").write_text("text\n")
    with pytest.raises(BadDataError, match=r"b\.csv.*no data"):
        read(tmp_path, "sft", {"dataset_name": str(tmp_path / "b.csv")})


@pytest.mark.parametrize(
    ("kind", "data", "problem"),
    [
        ("sft", {}, r"text_field wants the column 'text'.*columns a, b"),
        ("sft", {"text_field": "c"}, r"text_field wants the column 'c'.*columns a, b"),
        ("sft", {"messages_column": "c"}, r"messages_column wants the column 'c'"),
        ("lora_sft", {"prompt_column": "a", "response_column": "c"}, r"response_column wants the column 'c'"),
        ("dpo", {}, r"chosen_column wants the column 'chosen'.*columns a, b"),
        ("reward", {"chosen_column": "a"}, r"rejected_column wants the column 'rejected'"),
        ("ppo", {}, r"prompt_column wants the column 'prompt'.*columns a, b"),
        ("grpo", {"prompt_column": "c"}, r"prompt_column wants the column 'c'"),
    ],
)
def test_a_missing_column_names_those_there_are(
    kind: TrainingKind, data: dict[str, object], problem: str, tmp_path: Path
):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": "1", "b": "2"}])
    with pytest.raises(BadDataError, match=problem):
        read(tmp_path, kind, {"dataset_name": str(path), **data})


def test_null_and_a_bad_split_of_a_data_set(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, {"text": None}])
    with pytest.raises(BadDataError, match=r"a\.jsonl' \(split 'train'\): row 1 'text' is null"):
        read(tmp_path, "sft", {"dataset_name": str(path)})
    with pytest.raises(BadDataError, match="cannot be read"):
        read(tmp_path, "sft", {"dataset_name": str(path), "split": "train[:oops]"})


def test_a_data_set_elsewhere_and_an_unknown_one(tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(BadSpecError, match=r"spec\.data\.dataset_name.*outside the folders"):
        read(root, "sft", {"dataset_name": str(write_jsonl(tmp_path / "a.jsonl", [GOOD]))})
    with pytest.raises(BadDataError, match=r"spec\.data\.dataset_name 'acme/no-such-set'"):
        read(root, "dpo", {"dataset_name": "acme/no-such-set"})


@pytest.mark.parametrize(
    "content",
    [
        f'{{"text": {DEEP}}}'.encode(),
        ('{"text": ' + "9" * 5000 + "}").encode(),
        ('{"text": ' + "9" * 400 + "}").encode(),
        rb'{"text": "\ud800"}',
        rb'{"text": "a\u0000b"}',
        b'{"text": "\xff"}',
        b'{"text": "a"}\n{"text": [1]}\n{"text": {"b": 2}}',
        b'{"text": "a", "text": "b"}',
        b'{"text": NaN}',
        b"\0" * 1000,
    ],
)
def test_hostile_data_sets_pass_or_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    try:
        rows = read(tmp_path, "sft", {"dataset_name": str(path)}).rows
    except BadDataError as error:
        assert "a.jsonl" in str(error)  # noqa: PT017 - both ends are right
    else:
        assert all(isinstance(text, str) for text in rows["text"])


def test_columns_that_open_other_files_are_never_decoded(tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"no picture")
    features = datasets.Features({"text": datasets.Image(), "prompt": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"text": [str(secret)], "prompt": ["p"]}, features=features)
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "a.parquet"
    rows.with_format("arrow").to_parquet(str(path))
    with pytest.raises(BadDataError, match=r"wants the column 'text'.*has the columns prompt"):
        read(tmp_path / "root", "sft", {"dataset_name": str(path)})
    assert read(tmp_path / "root", "grpo", {"dataset_name": str(path)}).records == [{"prompt": "p"}]


def test_keys_beyond_number_are_cut(tmp_path: Path):
    many = {f"k{number}": number for number in range(500)}
    reading = read_jsonl(tmp_path, "grpo", lines({"query": "q", **many}))
    assert len(reading.rows.column_names) == 101
    with pytest.raises(BadDataError, match=r"has no 'query'; it has k0, .* and 470 more"):
        read_jsonl(tmp_path, "grpo", lines(many))


def test_a_named_pipe_among_data_files_is_passed_over(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jsonl")  # opening it would wait for ever
    with pytest.raises(BadSpecError, match="no data files"):
        read(tmp_path, "sft", {"dataset_name": str(folder)})
    write_jsonl(folder / "rows.jsonl", [GOOD])
    assert read(tmp_path, "sft", {"dataset_name": str(folder)}).texts == ["good"]


@pytest.mark.parametrize("kind", ["text", "json", "parquet"])
def test_a_kind_of_files_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    (tmp_path / "notes.txt").write_text("private\n")
    monkeypatch.chdir(tmp_path)  # the library would read what lies there
    with pytest.raises(BadSpecError, match=f"is '{kind}', which is a kind of files"):
        read(tmp_path, "sft", {"dataset_name": kind})
