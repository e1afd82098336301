from datetime import date
from pathlib import Path

import pytest

from executors.contract import EnginePolicy
from executors.errors import BadDataError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.prompt_data import json_value, read_prompts


def spec_with(data: dict[str, object], **sections: object) -> InferenceSpec:
    return InferenceSpec.model_validate({"model": {"source": {"identifier": "a/b"}}, "data": data, **sections})


def test_a_list_of_strings_and_conversations(tmp_path: Path):
    messages = [{"role": "user", "content": "hi", "name": "ann"}]
    found = read_prompts(
        spec_with({"items": ["a", messages], "items_metadata": [{"k": 1}, {"k": 2}]}), EnginePolicy(), tmp_path
    )
    assert [prompt.original for prompt in found.prompts] == ["a", messages]
    assert [prompt.metadata for prompt in found.prompts] == [{"k": 1}, {"k": 2}]
    assert found.with_system_prompt
    assert found.warnings == ()


def test_a_shard_of_a_list_is_warned_about(tmp_path: Path):
    found = read_prompts(spec_with({"items": ["a"]}, shard={"total": 2}), EnginePolicy(), tmp_path)
    assert "spec.shard has no effect" in found.warnings[0]


def test_metadata_that_the_result_needs_itself_is_warned_about(tmp_path: Path):
    found = read_prompts(spec_with({"items": ["a"], "metadata": [{"prompt": "x"}]}), EnginePolicy(), tmp_path)
    assert "'prompt'" in found.warnings[0]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_graph_template_is_one_prompt(tmp_path: Path, *, wanted: bool):
    template = {"name": "mine", "text": "T", "append_system_prompt": wanted}
    spec = spec_with({"type": "graph_template", "template": template}, _upstreamResults={"a": {}})
    found = read_prompts(spec, EnginePolicy(), tmp_path)
    assert [prompt.text for prompt in found.prompts] == ["T"]
    assert found.with_system_prompt is wanted


def test_text_beside_a_built_in_template_is_warned_about(tmp_path: Path):
    columns = [{"expr": "a.x"}, {"expr": "a.y"}]
    spec = spec_with({"template": {"text": "T", "columns": columns}}, _upstreamResults={"a": {"x": "1", "y": "2"}})
    assert "template.text has no effect" in read_prompts(spec, EnginePolicy(), tmp_path).warnings[0]


def test_a_graph_template_without_upstream_is_an_error(tmp_path: Path):
    with pytest.raises(BadDataError):
        read_prompts(spec_with({"template": {"name": "mine", "text": "T"}}), EnginePolicy(), tmp_path)


def test_cells_become_json():
    cell = {
        "when": date(2031, 4, 2),
        "raw": b"\x00",
        "odd": [float("nan"), float("inf"), 1.5, True, None],
        3: (1, "x"),
        "other": Path("/x"),
    }
    assert json_value(cell) == {
        "when": "2031-04-02",
        "raw": "AA==",
        "odd": [None, None, 1.5, True, None],
        "3": [1, "x"],
        "other": "/x",
    }
