"""`spec.data` of the kinds of training, with the real library and real files."""

import shutil
from pathlib import Path

import pytest
from row_reading import lines, read, read_jsonl, reading_run, write_jsonl

from executors.errors import BadDataError, BadSpecError
from executors.training.rows.training_rows import clipped_batch, describe, read_rows
from executors.training.spec.trainer_specs import TrainingKind
from executors.training.spec.training_data_spec import JSONL

pytestmark = pytest.mark.model

TEN = [{"text": f"text {number}", "more": number} for number in range(10)]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


# Sources


def test_texts_in_the_spec(tmp_path: Path):
    reading = read(tmp_path, "sft", {"prompts": ["one", "two"]})
    assert reading.records == [{"text": "one"}, {"text": "two"}]
    assert reading.warnings == []
    assert describe(reading.rows) == "2 rows with text"


def test_a_local_data_set_and_its_slice_shuffle_and_limit(tmp_path: Path):
    data = {"dataset_name": str(write_jsonl(tmp_path / "a.jsonl", TEN))}
    assert read(tmp_path, "sft", data).texts == [row["text"] for row in TEN]
    shuffled = {**data, "split": "train[:6]", "shuffle": True, "seed": 7}
    whole = read(tmp_path, "sft", shuffled).texts
    assert sorted(whole) == [f"text {number}" for number in range(6)]
    assert whole != sorted(whole)
    assert read(tmp_path, "sft", {**shuffled, "max_samples": 4}).texts == whole[:4]
    assert read(tmp_path, "lora_sft", {**shuffled, "max_samples": 99}).texts == whole


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_of_text(suffix: str, tmp_path: Path):
    mark = "," if suffix == "csv" else "\t"
    path = tmp_path / f"a.{suffix}"
    path.write_text(f"question{mark}answer\nq{mark}1\nr{mark}2\n")
    columns = {"prompt_column": "question", "response_column": "answer", "separator": " = "}
    assert read(tmp_path, "sft", {"dataset_name": str(path), **columns}).texts == ["q = 1", "r = 2"]


def test_parquet_and_a_folder(tmp_path: Path):
    import datasets

    folder = tmp_path / "set"
    folder.mkdir()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(TEN).to_parquet(str(folder / "train.parquet"))
    assert len(read(tmp_path, "sft", {"dataset_name": str(folder)}).rows) == 10


def test_a_jsonl_file_comes_before_all_else(tmp_path: Path):
    reading = read_jsonl(
        tmp_path, "sft", lines({"text": "from the file"}), dataset_name="acme/none", prompts=["inline"], split="test"
    )
    assert reading.texts == ["from the file"]
    assert "split 'test' has no effect" in reading.warnings[0]


def test_a_path_alone_names_a_jsonl_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    assert read(tmp_path, "sft", {"jsonl_path": str(path)}, inputs={JSONL: path}).texts == ["x"]


def test_blank_lines_a_mark_and_windows_line_ends_are_skipped(tmp_path: Path):
    text = b'\xef\xbb\xbf\r\n{"text": "a"}\r\n\n  \t\n{"text": "b"}'
    assert read_jsonl(tmp_path, "sft", text).texts == ["a", "b"]


def test_shuffle_and_limit_of_a_jsonl_file(tmp_path: Path):
    text = lines(*TEN)
    shuffled = read_jsonl(tmp_path, "sft", text, shuffle=True, seed=3).texts
    assert sorted(shuffled) == [row["text"] for row in TEN]
    assert shuffled != sorted(shuffled)
    assert read_jsonl(tmp_path, "sft", text, shuffle=True, seed=3, max_samples=4).texts == shuffled[:4]
    # What lies behind the wanted lines is not looked at.
    assert read_jsonl(tmp_path, "sft", text + "no json", max_samples=10).texts == [row["text"] for row in TEN]


def test_rows_outlive_their_folder_and_all_ranks_read_the_same(tmp_path: Path):
    data = {"dataset_name": str(write_jsonl(tmp_path / "a.jsonl", TEN)), "shuffle": True}
    first, second = read(tmp_path, "sft", data), read(tmp_path, "sft", data)
    shutil.rmtree(tmp_path / "scratch")
    assert first.texts == second.texts
    assert first.rows.map(lambda row: {"length": len(row["text"])})["length"] == [6] * 10


def test_only_the_first_rank_warns(tmp_path: Path):
    run = reading_run(tmp_path, "sft", {"prompts": ["one"]}, batch_size=4)
    run.rank = 1
    read_rows(run, tmp_path)
    assert run.tell.warnings == []


# Texts


def test_which_columns_of_a_data_set_are_the_text(tmp_path: Path):
    row = {"text": "T", "q": "Q", "a": "A", "messages": CHAT}
    data = {"dataset_name": str(write_jsonl(tmp_path / "a.jsonl", [row]))}
    assert read(tmp_path, "sft", data).records == [{"messages": CHAT}]
    assert read(tmp_path, "sft", {**data, "text_field": "text"}).texts == ["T"]
    assert read(tmp_path, "sft", {**data, "prompt_column": "q"}).texts == ["Q"]
    assert read(tmp_path, "sft", {**data, "response_column": "a"}).texts == ["A"]
    both = {**data, "prompt_column": "q", "response_column": "a"}
    assert read(tmp_path, "sft", both).texts == ["Q\n\nA"]
    assert read(tmp_path, "sft", {**both, "messages_column": "messages"}).records == [{"messages": CHAT}]


def test_which_keys_of_a_line_are_the_text(tmp_path: Path):
    text = lines({"text": "T", "q": "Q", "a": "A"})
    assert read_jsonl(tmp_path, "sft", text).texts == ["T"]
    assert read_jsonl(tmp_path, "sft", text, prompt_field="q").texts == ["Q"]
    both = {"prompt_field": "q", "response_field": "a", "separator": "|"}
    assert read_jsonl(tmp_path, "sft", text, **both).texts == ["Q|A"]
    assert read_jsonl(tmp_path, "sft", text, **both, text_field="text").texts == ["T"]
    path = tmp_path / "fetched.jsonl"
    assert read(tmp_path, "sft", {"jsonl": {"path": str(path), **both}}, inputs={JSONL: path}).texts == ["Q|A"]


def test_prompt_and_completion_apart(tmp_path: Path):
    trl = {"trl": {"completion_only_loss": True}}
    data = {"dataset_name": str(write_jsonl(tmp_path / "a.jsonl", [{"q": "Q", "a": "A", "messages": CHAT}]))}
    columns = {"prompt_column": "q", "response_column": "a"}
    assert read(tmp_path, "sft", {**data, **columns}, training=trl).records == [{"prompt": "Q\n\n", "completion": "A"}]
    assert read(tmp_path, "sft", data, training=trl).records == [{"prompt": CHAT[:1], "completion": CHAT[1:]}]
    with pytest.raises(BadSpecError, match=r"completion_only_loss.*response_column|one text each"):
        read(tmp_path, "sft", {"prompts": ["one"]}, training=trl)


def test_cells_that_are_no_text_are_printed(tmp_path: Path):
    text = lines({"text": 7}, {"text": [1, 2]}, {"text": True}, {"text": "a\0b"}, {"text": 10**4000})
    assert read_jsonl(tmp_path, "sft", text).texts == ["7", "[1, 2]", "True", "a\0b", str(10**4000)]


def test_blank_rows_of_a_data_set_are_left_out(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "  "}])
    reading = read(tmp_path, "sft", {"dataset_name": str(path)})
    assert reading.texts == ["a"]
    assert "2 rows" in reading.warnings[0]


def test_conversations_in_the_spec(tmp_path: Path):
    reading = read(tmp_path, "sft", {"messages": [CHAT, [{**CHAT[0], "name": "Ann"}]]})
    assert reading.records == [{"messages": CHAT}, {"messages": CHAT[:1]}]
    assert "name" in reading.warnings[0]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "is text; expected a list of messages"),
        ([], "has no messages"),
        (["hello"], r"message 0 .* is text"),
        ([{"from": "human", "value": "x"}], r"has no role.*from, value"),
        ([{"role": "king", "content": "x"}], r"role 'king'; expected one of system"),
        ([{"role": "user", "content": None}], "content that is null"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        (None, "is null"),
    ],
)
def test_bad_conversations_name_the_line(messages: object, problem: str, tmp_path: Path):
    with pytest.raises(BadDataError, match=rf"line 2 .*{problem}"):
        read_jsonl(tmp_path, "sft", lines({"messages": CHAT}, {"messages": messages}))


# Preferences


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_preferences_of_every_source(kind: TrainingKind, tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    assert read(tmp_path, kind, {"dataset_name": str(path)}).records == [PAIR]
    assert read(tmp_path, kind, {"preferences": [PAIR]}).records == [PAIR]
    renamed = lines({"x": "p", "good": "good", "bad": "bad"})
    fields = {"prompt_field": "x", "chosen_field": "good", "rejected_field": "bad"}
    assert read_jsonl(tmp_path, kind, renamed, **fields).records == [PAIR]


def test_a_reward_model_needs_no_prompt(tmp_path: Path):
    bare = {"chosen": "good", "rejected": "bad"}
    assert read(tmp_path, "reward", {"preferences": [bare]}).records == [bare]
    path = write_jsonl(tmp_path / "a.jsonl", [bare])
    assert read(tmp_path, "reward", {"dataset_name": str(path)}).records == [bare]
    for data in ({"dataset_name": str(path)}, {"dataset_name": str(path), "prompt_column": "prompt"}):
        with pytest.raises(BadDataError, match=r"prompt_column wants the column 'prompt'.*chosen, rejected"):
            read(tmp_path, "dpo", data)


def test_conversations_as_preferences(tmp_path: Path):
    user, good, bad = (
        [{"role": role, "content": text}] for role, text in (("user", "p"), ("assistant", "good"), ("assistant", "bad"))
    )
    expected = [{"prompt": user, "chosen": good, "rejected": bad}]
    for row in (
        {"prompt": user, "chosen": good, "rejected": bad},
        {"prompt": user, "chosen": user + good, "rejected": user + bad},
        {"prompt": "p", "chosen": user + good, "rejected": user + bad},
        {"prompt": user, "chosen": "good", "rejected": "bad"},
        {"chosen": user + good, "rejected": user + bad},
    ):
        assert read_jsonl(tmp_path, "dpo", lines(row)).records == expected
    with pytest.raises(BadDataError, match=r"line 2 'chosen' is a list of messages; expected text"):
        read_jsonl(tmp_path, "dpo", lines(PAIR, {**PAIR, "chosen": good, "rejected": bad}))
    for answer in (user, [{"role": "assistant", "content": " "}]):
        with pytest.raises(BadDataError, match=r"line 1 'rejected' does not end with an assistant's message"):
            read_jsonl(tmp_path, "dpo", lines({"prompt": user, "chosen": good, "rejected": answer}))
    with pytest.raises(BadDataError, match=r"line 1 .*do not begin with the same message"):
        read_jsonl(tmp_path, "dpo", lines({"chosen": good, "rejected": bad}))


def test_the_first_three_bad_preferences_are_named(tmp_path: Path):
    bad = [{**PAIR, "rejected": value} for value in (None, " ", "")]
    rows = [PAIR, bad[0], PAIR, bad[1], bad[2], bad[0]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadDataError) as caught:
        read(tmp_path, "dpo", {"dataset_name": str(path)})
    for text in ("row 1 'rejected' is null", "row 3 'rejected' is blank", "row 4 'rejected' is blank"):
        assert text in str(caught.value)
    assert "row 5" not in str(caught.value)
    with pytest.raises(BadDataError, match=r"line 2 has no 'rejected'; it has prompt, chosen"):
        read_jsonl(tmp_path, "dpo", lines(PAIR, {"prompt": "p", "chosen": "c"}))


def test_a_row_is_named_by_its_place_before_shuffling(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [*[PAIR] * 7, {**PAIR, "chosen": None}])
    with pytest.raises(BadDataError, match=r": row 7 'chosen' is null"):
        read(tmp_path, "dpo", {"dataset_name": str(path), "shuffle": True})


def test_equal_answers_are_a_warning(tmp_path: Path):
    reading = read(tmp_path, "dpo", {"preferences": [PAIR, {**PAIR, "rejected": "good"}]})
    assert len(reading.rows) == 2
    assert reading.warnings == ["in 1 rows 'chosen' and 'rejected' are equal; nothing is learned from those"]


# Prompts


def test_prompts_with_further_columns(tmp_path: Path):
    text = lines({"query": "q", "answer": "4", "n": 4}, {"query": "r", "tags": ["x"], "prompt": "taken"})
    reading = read_jsonl(tmp_path, "grpo", text)
    assert reading.records == [
        {"prompt": "q", "answer": "4", "n": "4", "tags": None},
        {"prompt": "r", "answer": None, "n": None, "tags": '["x"]'},
    ]
    assert reading.warnings == ["the columns prompt are left out; 100 are kept, none named 'prompt'"]


def test_the_named_answer_comes_out_as_response(tmp_path: Path):
    text = lines({"query": "q", "target": "4"})
    expected = [{"prompt": "q", "target": "4", "response": "4"}]
    assert read_jsonl(tmp_path, "ppo", text, response_field="target").records == expected
    path = tmp_path / "fetched.jsonl"
    columns = {"prompt_column": "query", "response_column": "target"}
    assert read(tmp_path, "grpo", {"dataset_name": str(path), **columns}).records == expected
    with pytest.raises(BadDataError, match=r"line 1 has no 'answer'; it has query, target"):
        read_jsonl(tmp_path, "ppo", text, response_field="answer")
    with pytest.raises(BadDataError, match=r"response_column wants the column 'answer'"):
        read(tmp_path, "grpo", {"dataset_name": str(path), **columns, "response_column": "answer"})


def test_the_only_column_of_a_data_set_holds_the_prompts(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}])
    assert read(tmp_path, "ppo", {"dataset_name": str(path)}).records == [{"prompt": "q"}]
    path = write_jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(BadDataError, match=r"wants the column 'prompt'.*question, answer"):
        read(tmp_path, "ppo", {"dataset_name": str(path)})
    named = read(tmp_path, "ppo", {"dataset_name": str(path), "prompt_column": "question"})
    assert named.records == [{"prompt": "q", "answer": "a"}]


def test_conversations_as_prompts(tmp_path: Path):
    assert read(tmp_path, "grpo", {"prompts": [CHAT[:1]]}).records == [{"prompt": CHAT[:1]}]
    with pytest.raises(BadDataError, match="entry 1 'prompt' is text; expected a list"):
        read(tmp_path, "grpo", {"prompts": [CHAT[:1], "text"]})


def test_a_batch_is_clipped_to_the_rows(tmp_path: Path):
    reading = read(tmp_path, "ppo", {"prompts": ["a", "b", "c"]}, batch_size=8)
    assert clipped_batch(reading.run, reading.rows) == 3
    assert "lowered to 3" in reading.warnings[0]
    two = reading_run(tmp_path, "ppo", {"prompts": ["a", "b", "c"]}, batch_size=1, ranks=2)
    assert clipped_batch(two, reading.rows) == 1
    assert two.tell.warnings == []


def test_a_batch_larger_than_the_data_set_is_a_warning(tmp_path: Path):
    reading = read(tmp_path, "sft", {"prompts": ["a", "b", "c"]}, batch_size=8)
    assert "one step takes 8 rows" in reading.warnings[0]
    assert read(tmp_path, "sft", {"prompts": ["a", "b", "c"]}, batch_size=3).warnings == []
