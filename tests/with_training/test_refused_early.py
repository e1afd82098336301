"""Bad input is found before weights load, which can take minutes; none of these tests may load any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest
from training_models import RunMaker, build, make_tiny_llama
from training_tasks import training_task

from executors.errors import BadDataError, BadSpecError, ExecutorError, ModelLoadError

KINDS: Final = ("sft", "lora_sft", "dpo", "reward", "ppo", "grpo")


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import transformers

    loaded = []

    def load(*_: object, **__: object) -> NoReturn:
        loaded.append("weights")
        raise AssertionError("weights are loaded")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", load)
        yield
    assert not loaded


@pytest.fixture
def refusal(make_run: RunMaker, tiny_chat_dir: Path) -> Any:  # noqa: ANN401 - the function below
    """Build a trainer that cannot be built, and return the error."""

    def refuse(kind: str, model: Path | str = tiny_chat_dir, **changes: Any) -> ExecutorError:  # noqa: ANN401 - sections
        inputs = changes.pop("inputs", None)
        spec = training_task(kind, model, **changes)
        del spec["taskType"]
        with pytest.raises(ExecutorError) as caught:
            build(make_run(kind, inputs=inputs, **spec))
        return caught.value

    return refuse


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_trl_does_not_know(refusal: Any, kind: str):  # noqa: ANN401
    error = refusal(kind, training={"trl": {"lr_scheduler_typo": "constant"}})
    assert isinstance(error, BadSpecError)
    assert "lr_scheduler_typo" in error.message
    assert "lr_scheduler_type" in error.message + error.hint


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_the_data_does_not_have(refusal: Any, rows: Path, kind: str):  # noqa: ANN401
    error = refusal(kind, data={"dataset_name": str(rows)})
    assert isinstance(error, BadDataError)
    assert "question, answer" in error.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_without_rows(refusal: Any, rows: Path, kind: str):  # noqa: ANN401
    columns = {"prompt": "p", "text": "t", "chosen": "c", "rejected": "r"}
    rows.write_text(json.dumps(columns) + "\n")
    error = refusal(kind, data={"dataset_name": str(rows), "split": "train[:0]"})
    assert isinstance(error, BadDataError)
    assert "rows.jsonl" in error.message
    assert "no data" in error.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_nowhere(refusal: Any, tmp_path: Path, kind: str):  # noqa: ANN401
    empty = tmp_path / "empty"
    empty.mkdir()
    for model, kinds in ((tmp_path / "none", BadSpecError), (empty, BadSpecError), ("acme/unknown", ModelLoadError)):
        error = refusal(kind, model)
        assert isinstance(error, kinds)
        assert str(model) in error.message


@pytest.mark.parametrize("kind", KINDS[1:])
def test_target_modules_that_match_nothing(refusal: Any, kind: str):  # noqa: ANN401
    error = refusal(kind, lora={"target_modules": ["c_attn"]})
    assert isinstance(error, BadSpecError)
    assert "spec.lora.target_modules is ['c_attn']" in error.message
    assert "q_proj" in error.message


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_an_adapter_where_whole_weights_are_trained(refusal: Any, tmp_path: Path, kind: str):  # noqa: ANN401
    adapter = tmp_path / "final_lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    error = refusal(kind, checkpoint={"load": {"path": str(adapter)}}, inputs={"checkpoint.load": adapter})
    assert isinstance(error, BadSpecError)
    assert "spec.checkpoint.load is a LoRA adapter" in error.message
    assert "lora_sft" in error.hint


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_preference_without_a_rejected_answer(refusal: Any, rows: Path, kind: str):  # noqa: ANN401
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    for bad in ({"rejected": None}, {"rejected": " "}):
        rows.write_text("".join(json.dumps(row) + "\n" for row in (good, good | bad)))
        error = refusal(kind, data={"dataset_name": str(rows)})
        assert isinstance(error, BadDataError)
        assert "row 1 'rejected'" in error.message


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_rewards_that_cannot_be_had(refusal: Any, tiny_chat_dir: Path, tmp_path: Path, kind: str):  # noqa: ANN401
    no_classifier = refusal(kind, reward_functions=None, reward_model={"identifier": str(tiny_chat_dir)})
    assert isinstance(no_classifier, ModelLoadError)
    assert "is no classifier: its configuration names LlamaForCausalLM" in no_classifier.message
    nowhere = refusal(kind, reward_functions=None, reward_model={"identifier": str(tmp_path / "none")})
    assert isinstance(nowhere, BadSpecError)
    assert "spec.reward_model.identifier" in nowhere.message
    unknown = refusal(kind, reward_functions=["kindness"])
    assert isinstance(unknown, BadSpecError)
    assert "spec.reward_functions[0].name is 'kindness'; expected one of length, contains" in unknown.message


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_conversations_for_a_model_without_a_chat_template(refusal: Any, tmp_path: Path, kind: str):  # noqa: ANN401
    bare = make_tiny_llama(tmp_path / "bare", chat=False, hidden=8)
    asked, told, other = (
        [{"role": role, "content": text}] for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
    )
    pairs = {"preferences": [{"prompt": asked, "chosen": told, "rejected": other}]}
    data = {"sft": {"messages": [asked + told]}, "dpo": pairs, "reward": pairs}.get(kind, {"prompts": [asked] * 4})
    error = refusal(kind, bare, data=data)
    assert isinstance(error, BadSpecError)
    assert "no chat template" in error.message
