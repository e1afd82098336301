from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import yaml

from executors import catalog
from worker.commands.task_files import TaskFileError, load_task

EXAMPLES = Path(__file__).parents[4] / "examples"


def load(tmp_path: Path, text: str, name: str = "task.yaml") -> dict[str, object]:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return dict(load_task(str(file)))


def test_a_bare_spec_is_wrapped(tmp_path: Path):
    assert load(tmp_path, "taskType: echo\nx: 1\n") == {"spec": {"taskType": "echo", "x": 1}}


def test_a_whole_task_stays_as_it_is(tmp_path: Path):
    whole = {"apiVersion": "v", "kind": "K", "metadata": {"name": "n"}, "spec": {"taskType": "echo"}}
    assert load(tmp_path, yaml.safe_dump(whole)) == whole


@pytest.mark.parametrize("name", ["t.json", "t.yaml"])
def test_json(tmp_path: Path, name: str):
    assert load(tmp_path, '\n{"taskType": "echo",\t"x": [1.5, null, true]}', name)["spec"] == {
        "taskType": "echo",
        "x": [1.5, None, True],
    }


def test_yaml_in_braces_and_with_a_byte_order_mark(tmp_path: Path):
    assert load(tmp_path, "\ufeff{taskType: echo}") == {"spec": {"taskType": "echo"}}


def test_dates_stay_text(tmp_path: Path):
    assert load(tmp_path, "taskType: echo\nday: 2031-04-02\n")["spec"] == {"taskType": "echo", "day": "2031-04-02"}


def test_stdin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"taskType: echo")))
    assert load_task("-") == {"spec": {"taskType": "echo"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds nothing"),
        ("just words", "holds text"),
        ("[1]", "holds a list"),
        ("kind: K\n", "`spec` is missing"),
        ("spec: 3\n", "expected an object"),
        ("model: x\n", "`spec.taskType` is None"),
        ("taskType: 3\n", "`spec.taskType` is 3"),
        ("taskType: echo\na: {b: [1, .nan]}\n", "`a.b[1]` is nan"),
        ("taskType: echo\na: -.inf\n", "`a` is -inf"),
        ('{"taskType": "echo", "a": NaN}', "`a` is nan"),
        ("taskType: echo\na: {1: x}\n", "the key 1 in `a` is no text"),
        ("taskType: echo\na: !!binary aGk=\n", "`a` is bytes"),
        ("taskType: echo\na: !!python/object:os.system x\n", "could not determine a constructor"),
        ("taskType: echo\na: 1\na: 2\n", "line 3, column 1 is no valid YAML: the key 'a' is there twice"),
        ("taskType: [\n", "no valid YAML"),
        ("taskType: echo\na: &x [*x]\n", "refers to itself"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_cannot_be_a_task(tmp_path: Path, text: str, words: str):
    with pytest.raises(TaskFileError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)
    assert "task.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(TaskFileError, match="No such file"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(TaskFileError, match="Is a directory"):
        load_task(str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"taskType: \xff")
    with pytest.raises(TaskFileError, match="no UTF-8 text"):
        load_task(str(tmp_path / "b.yaml"))
    with pytest.raises(TaskFileError, match="no valid JSON"):
        load(tmp_path, "{taskType: echo}", "t.json")


@pytest.mark.parametrize("name", sorted(file.name for file in EXAMPLES.glob("*.yaml")))
def test_the_examples_are_valid(name: str):
    assert f"submit examples/{name} --wait" in (EXAMPLES / name).read_text(encoding="utf-8")
    spec = load_task(str(EXAMPLES / name))["spec"]
    assert isinstance(spec, dict)
    installed = [each for each in catalog.entries()[str(spec["taskType"])] if not catalog.missing_libraries(each)]
    assert installed
    for entry in installed:
        model = catalog.executor_class(entry).spec_type.model_validate(spec)
        assert model.task_type == spec["taskType"]
