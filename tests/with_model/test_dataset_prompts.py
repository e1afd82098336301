"""`data.type: dataset` with the real library and files of every kind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from executors.contract import EnginePolicy
from executors.errors import BadDataError, BadSpecError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.prompt_data import PromptSet, read_prompts

pytestmark = pytest.mark.model
ROWS = [{"id": number, "text": f"prompt {number}", "score": number / 4} for number in range(10)]


def read(root: Path, url: object, shard: dict[str, object] | None = None, **data: object) -> PromptSet:
    spec = InferenceSpec.model_validate(
        {
            "model": {"source": {"identifier": "a/b"}},
            "data": {"type": "dataset", "url": str(url), **data},
            "shard": shard,
        }
    )
    found = read_prompts(spec, EnginePolicy(allowed_roots=(root,)), root)
    assert not list(root.glob(".dataset-*")), "the temporary copy is gone"
    return found


def texts(found: PromptSet) -> list[str]:
    return [prompt.text for prompt in found.prompts]


def write_jsonl(path: Path, rows: list[dict[str, object]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)), encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow.parquet  # noqa: PLC0415 - comes with an extra

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_csv(path: Path) -> Path:
    path.write_text("id,text,score\n" + "".join(f"{row['id']},{row['text']},{row['score']}\n" for row in ROWS))
    return path


def write_tsv(path: Path) -> Path:
    path.write_text("id\ttext\tscore\n" + "".join(f"{row['id']}\t{row['text']}\t{row['score']}\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("b[1].parquet", write_parquet), ("c.csv", write_csv), ("d.tsv", write_tsv)],
)
def test_every_kind_of_file(name: str, write: Callable[[Path], Path], tmp_path: Path):
    found = read(tmp_path, write(tmp_path / name), column="text", metadata_columns=["id"])
    assert texts(found) == [f"prompt {number}" for number in range(10)]
    assert [prompt.metadata for prompt in found.prompts] == [{"id": number} for number in range(10)]


def test_a_relative_name_below_the_first_root(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl")
    assert len(read(tmp_path, "a.jsonl", column="text").prompts) == 10


def test_a_slice_then_shuffle_then_shard(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl")
    options = {"column": "text", "split": "train[:6]", "shuffle": True, "seed": 7}
    whole = texts(read(tmp_path, path, **options))
    assert sorted(whole) == [f"prompt {number}" for number in range(6)]
    assert whole != sorted(whole)
    parts = [texts(read(tmp_path, path, {"total": 2, "index": index}, **options)) for index in (0, 1)]
    assert parts[0] + parts[1] == whole
    every_second = texts(read(tmp_path, path, {"total": 2, "index": 1, "contiguous": False}, **options))
    assert every_second == whole[1::2]


def test_cells_that_are_no_strings_are_printed_and_null_is_a_problem(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": [1, 2]}, {"x": None}])
    found = read(tmp_path, path)
    assert texts(found) == ["[1, 2]", ""]
    assert "row 1" in found.prompts[1].problem


def test_metadata_by_map_and_all(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 1, "more": True}])
    assert read(tmp_path, path, metadata_columns={"id": "key"}).prompts[0].metadata == {"key": 1}
    everything = read(tmp_path, path, metadata_include_all=True, metadata_columns={"id": "key"})
    assert everything.prompts[0].metadata == {"text": "a", "key": 1, "more": True}


@pytest.mark.parametrize("data", [{"column": "nope"}, {"column": "text", "metadata_columns": ["nope"]}])
def test_an_unknown_column_names_those_there_are(data: dict[str, object], tmp_path: Path):
    with pytest.raises(BadSpecError, match=r"'nope'.*id, text, score"):
        read(tmp_path, write_jsonl(tmp_path / "a.jsonl"), **data)


def test_without_a_column_there_must_be_no_doubt(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": "1", "b": "2"}])
    with pytest.raises(BadSpecError, match=r"spec\.data\.column is missing.*a, b"):
        read(tmp_path, path)


def test_folders_with_splits(tmp_path: Path):
    folder = tmp_path / "set"
    write_jsonl(folder / "train-0.jsonl", [{"text": "t0"}])
    write_jsonl(folder / "train-1.jsonl", [{"text": "t1"}])
    write_jsonl(folder / "dev.jsonl", [{"text": "v"}])
    # Were it read, this would lead the library out of the folder.
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n")
    assert texts(read(tmp_path, folder)) == ["t0", "t1"]
    assert texts(read(tmp_path, folder, split="validation")) == ["v"]
    assert texts(read(tmp_path, folder, split="train[1:]+validation")) == ["t1", "v"]
    with pytest.raises(BadSpecError, match=r"'test'.*train, validation"):
        read(tmp_path, folder, split="test")


def test_a_folder_written_by_save_to_disk(tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(read(tmp_path, tmp_path / "saved", column="text").prompts) == 10


def test_mixed_and_empty_folders_are_refused(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(BadSpecError, match="no data files"):
        read(tmp_path, folder)
    write_jsonl(folder / "a.jsonl")
    write_csv(folder / "b.csv")
    with pytest.raises(BadSpecError, match=r"mixes \.csv, \.jsonl"):
        read(tmp_path, folder)


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path):
    root = tmp_path / "root"
    (root / "set").mkdir(parents=True)
    (root / "set" / "a.jsonl").symlink_to(write_jsonl(tmp_path / "secret.jsonl"))
    for url in (root / "set", root / "set" / "a.jsonl"):
        with pytest.raises(BadSpecError, match="outside the folders"):
            read(root, url)


def test_no_rows_is_an_error(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert texts(read(tmp_path, path, {"total": 20, "index": 9}, column="text")) == ["prompt 9"]
    for contiguous in (True, False):
        with pytest.raises(BadDataError, match="no rows"):
            read(tmp_path, path, {"total": 20, "index": 10, "contiguous": contiguous}, column="text")
    with pytest.raises(BadDataError, match="no data"):
        read(tmp_path, path, column="text", split="train[:0]")


def test_a_broken_file_is_a_clear_error(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(BadDataError, match=r"a\.parquet.*cannot be read"):
        read(tmp_path, path, column="text")


def test_an_unknown_hub_name_without_network(tmp_path: Path):
    with pytest.raises(BadDataError, match="acme/no-such-set") as caught:
        read(tmp_path, "acme/no-such-set")
    assert "WORKER_ALLOWED_ROOTS" in caught.value.hint


def test_an_unknown_suffix_is_refused(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(BadSpecError, match=r"\.jsonl"):
        read(tmp_path, tmp_path / "a.bin")
