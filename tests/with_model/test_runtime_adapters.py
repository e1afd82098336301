"""LoRA adapters at run time and merged, with the same loaded model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import make_adapter

from executors.contract import ExecutorTask
from executors.errors import BadSpecError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration

pytestmark = pytest.mark.model
TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]
Answers = Callable[..., list[Any]]
PROMPTS: list[object] = ["a short text", "b", "xyz"]


@pytest.fixture(scope="module")
def adapters(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(tiny_dir, folder / f"lora-{seed}", seed=seed) for seed in range(6)]


@pytest.fixture
def answers(tiny_dir: Path, task_with: TaskMaker) -> Answers:
    def ask(executor: TextGeneration, *used: Path | dict[str, object], **options: object) -> list[Any]:
        task = task_with(tiny_dir, PROMPTS, adapters=used, **{"max_tokens": 12, "logprobs": 1, **options})
        items = executor.run(task).result["items"]
        assert isinstance(items, list)
        assert not (task.out_dir / "_lora_cache").exists()
        return items

    return ask


def texts(items: list[Any]) -> list[str]:
    return [item["output"] for item in items]


def kept(executor: TextGeneration) -> int:
    assert executor._warm is not None
    return len(executor._warm.adapters.kept)


def test_adapters_change_the_output_and_leave_the_model_as_it_was(
    tiny: TextGeneration, adapters: list[Path], answers: Answers
):
    assert tiny._warm is not None
    model = tiny._warm.loaded.model
    plain = answers(tiny)
    first, second = answers(tiny, adapters[0]), answers(tiny, adapters[1])
    assert texts(plain) != texts(first) != texts(second) != texts(plain)
    assert answers(tiny) == plain
    assert answers(tiny, adapters[0]) == first
    assert answers(tiny, adapters[1]) == second
    assert answers(tiny) == plain
    assert tiny._warm.loaded.model is model


def test_merged_is_the_same_as_at_run_time(
    tiny: TextGeneration, tiny_dir: Path, adapters: list[Path], task_with: TaskMaker, answers: Answers
):
    entries: list[dict[str, object]] = [
        {"path": adapters[0], "name": "a", "scale": 0.5},
        {"path": adapters[1], "name": "b"},
    ]
    together = answers(tiny, *entries)
    assert texts(together) != texts(answers(tiny, *entries[:1])) != texts(answers(tiny))
    merged: list[dict[str, object]] = [{**entry, "apply": "merge"} for entry in entries]
    executor = TextGeneration()
    executor.load(task_with(tiny_dir, ["x"], adapters=merged))
    found = answers(executor, *merged)
    assert texts(found) == texts(together)
    both = answers(executor, *merged, {"path": adapters[2], "name": "c"})
    assert texts(both) == texts(answers(tiny, *entries, {"path": adapters[2], "name": "c"}))
    assert answers(executor, *merged) == found


def test_scale_nought_is_the_plain_model(tiny: TextGeneration, adapters: list[Path], answers: Answers):
    assert texts(answers(tiny, {"path": adapters[0], "scale": 0})) == texts(answers(tiny))


def test_the_stalest_of_many_adapters_goes(tiny: TextGeneration, adapters: list[Path], answers: Answers):
    plain = answers(tiny)
    first = [answers(tiny, adapter) for adapter in adapters]
    assert kept(tiny) == 4
    assert [answers(tiny, adapter) for adapter in adapters] == first
    assert kept(tiny) == 4
    assert answers(tiny) == plain


def test_a_merged_adapter_written_anew_is_merged_anew(
    tiny_dir: Path, tmp_path: Path, task_with: TaskMaker, answers: Answers
):
    folder = make_adapter(tiny_dir, tmp_path / "lora", seed=8)
    entry: dict[str, object] = {"path": folder, "apply": "merge"}
    executor = TextGeneration()
    executor.load(task_with(tiny_dir, ["x"], adapters=[entry]))
    warm = executor._warm
    before = answers(executor, entry)
    assert executor._warm is warm
    make_adapter(tiny_dir, folder, seed=9)
    assert texts(answers(executor, entry)) != texts(before)
    assert executor._warm is not warm


def test_a_runtime_adapter_written_anew_is_loaded_anew(
    tiny: TextGeneration, tiny_dir: Path, tmp_path: Path, answers: Answers
):
    folder = make_adapter(tiny_dir, tmp_path / "lora", seed=8)
    before = answers(tiny, folder)
    make_adapter(tiny_dir, folder, seed=9)
    assert texts(answers(tiny, folder)) != texts(before)


@pytest.mark.parametrize("apply", ["runtime", "merge"])
def test_an_adapter_of_another_model_is_refused(  # noqa: PLR0917 - fixtures
    tiny: TextGeneration, tiny_dir: Path, tmp_path: Path, task_with: TaskMaker, answers: Answers, apply: str
):
    plain = answers(tiny)
    entry: dict[str, object] = {"path": wider_adapter(tiny_dir, tmp_path / "wide"), "apply": apply}
    executor = tiny if apply == "runtime" else TextGeneration()
    with pytest.raises(BadSpecError, match=r"spec\.model\.adapters\[0\].*\[32, 32\]"):
        executor.run(task_with(tiny_dir, ["x"], adapters=[entry]))
    assert answers(executor) == plain


def test_what_only_shows_on_loading_is_refused_and_leaves_no_trace(  # noqa: PLR0917 - fixtures
    tiny: TextGeneration,
    tiny_dir: Path,
    tmp_path: Path,
    adapters: list[Path],
    task_with: TaskMaker,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
):
    """The model's files do not tell everything: those of a hub model are not read."""
    monkeypatch.setattr("executors.inference.on_transformers.transformers_adapters._stored_tensors", lambda _: {})
    plain, good = answers(tiny), answers(tiny, adapters[0])
    wide = wider_adapter(tiny_dir, tmp_path / "wide")
    strange = make_adapter(tiny_dir, tmp_path / "strange")
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    for wrong in (wide, strange):
        for executor in (tiny, TextGeneration()):
            with pytest.raises(BadSpecError, match="adapter 'lora_0' does not fit the model"):
                executor.run(task_with(tiny_dir, ["x"], adapters=[wrong]))
            assert answers(executor) == plain
            assert answers(executor, adapters[0]) == good


def wider_adapter(tiny_dir: Path, folder: Path) -> Path:
    """An adapter for a model like the tiny one, but with twice the width."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(tiny_dir)
    config.hidden_size *= 2
    base = folder.with_name("wide-base")
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    return make_adapter(base, folder)


@pytest.mark.parametrize(
    "extra",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}],
    ids=str,
)
def test_adapters_with_more_than_a_and_b_leave_the_model_as_it_was_too(
    tiny: TextGeneration, tiny_dir: Path, tmp_path: Path, answers: Answers, extra: dict[str, object]
):
    plain = answers(tiny)
    adapter = make_adapter(tiny_dir, tmp_path / "lora", **extra)
    adapted = answers(tiny, adapter)
    assert texts(adapted) != texts(plain)
    assert answers(tiny) == plain
    assert answers(tiny, adapter) == adapted


def test_merging_into_quantised_weights_is_refused(tiny_dir: Path, adapters: list[Path], task_with: TaskMaker):
    entry: dict[str, object] = {"path": adapters[0], "apply": "merge"}
    task = task_with(tiny_dir, ["x"], adapters=[entry])
    model = task.spec.model
    quantised = model.transformers.model_copy(update={"load_in_4bit": True})
    spec = task.spec.model_copy(update={"model": model.model_copy(update={"transformers": quantised})})
    executor = TextGeneration()
    with pytest.raises(BadSpecError, match=r"cannot be merged into weights with .*load_in_4bit"):
        executor.load(ExecutorTask("x", spec, (), task.out_dir, task.policy, task.report, inputs=task.inputs))


def test_a_child_with_the_same_adapters_is_answered_with_them(
    tiny: TextGeneration, tiny_dir: Path, adapters: list[Path], task_with: TaskMaker, answers: Answers
):
    children: dict[str, dict[str, object]] = {"kid": {"items": PROMPTS}}
    task = task_with(tiny_dir, ["a"], adapters=[adapters[0]], children=children, max_tokens=12, logprobs=1)
    kid = tiny.run(task).children["kid"].result
    assert kid is not None
    assert texts(list(kid["items"])) == texts(answers(tiny, adapters[0]))


def test_an_adapter_of_another_kind_is_skipped_with_a_warning(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker, tmp_path: Path
):
    output = tiny.run(task_with(tiny_dir, ["x"], adapters=[{"type": "ia3", "path": tmp_path}], max_tokens=1))
    assert any("model.adapters[0] is of type 'ia3'" in text for text in output.warnings)


def test_adapters_on_a_gguf_model(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker, tmp_path: Path):
    """GGUF is unpacked on loading, so that adapters work as on ordinary weights."""

    def ask(executor: TextGeneration, *used: dict[str, object]) -> str:
        items = executor.run(task_with(smollm_dir, ["Once upon a time"], adapters=used, max_tokens=8)).result["items"]
        assert isinstance(items, list)
        return texts(items)[0]

    assert smollm._warm is not None
    folder = handmade_adapter(smollm._warm.loaded.model, tmp_path / "lora")
    plain = ask(smollm)
    adapted = ask(smollm, {"path": folder})
    assert adapted != plain
    assert ask(smollm) == plain
    merged: dict[str, object] = {"path": folder, "apply": "merge"}
    executor = TextGeneration()
    executor.load(task_with(smollm_dir, ["x"], adapters=[merged]))
    assert ask(executor, merged) == adapted


def handmade_adapter(model: Any, folder: Path) -> Path:  # noqa: ANN401 - a model of Transformers
    """An adapter for the first layer of a loaded model."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weight = model.model.layers[0].mlp.down_proj.weight
    generator = torch.Generator().manual_seed(1)
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(4, weight.shape[1], generator=generator) * 0.3,
        f"{prefix}.lora_B.weight": torch.randn(weight.shape[0], 4, generator=generator) * 0.3,
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return folder
