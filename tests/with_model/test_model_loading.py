"""Loading, with a tiny random model and with bad ones."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from executors.contract import EnginePolicy, ExecutorTask, JsonObject
from executors.errors import BadDataError, BadSpecError, MissingLibraryError, ModelLoadError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.model_loading import load_model
from executors.inference.on_transformers.text_generation import TextGeneration
from executors.weights_source import find_weights

pytestmark = pytest.mark.model
TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]


def spec_for(identifier: object, source: dict[str, object] | None = None, **options: object) -> InferenceSpec:
    model = {"source": {"identifier": str(identifier), **(source or {})}, "transformers": options}
    return InferenceSpec.model_validate({"model": model, "data": {"items": ["x"]}})


def policy_for(*roots: Path) -> EnginePolicy:
    return EnginePolicy(allowed_roots=roots)


def test_a_folder_loads_with_the_wanted_dtype(tiny_dir: Path):
    loaded = load_model(spec_for(tiny_dir, dtype="bf16", device_map="cpu"), policy_for(tiny_dir), {})
    renderer = loaded.renderer
    assert (loaded.device, loaded.dtype, renderer.context_tokens) == ("cpu", "bfloat16", 64)
    assert renderer.end_ids == {renderer.tokenizer.eos_token_id}
    assert loaded.pad_id == renderer.tokenizer.eos_token_id
    assert loaded.model.generation_config.temperature is None


def test_the_checkpoints_sampling_values_stay_out(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    first, second = (
        tiny.run(task_with(tiny_dir, ["a text"], max_tokens=20, seed=seed)).result["items"] for seed in (1, 2)
    )
    assert first == second


def test_a_prompt_beyond_the_context_fails_alone(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    output = tiny.run(task_with(tiny_dir, ["b" * 90, "b" * 60, ""], max_tokens=100))
    items = output.result["items"]
    assert isinstance(items, list)
    long, fitting, empty = items
    assert isinstance(long, dict)
    assert isinstance(fitting, dict)
    assert isinstance(empty, dict)
    assert (long["finish_reason"], long["output"]) == ("error", "")
    assert "90 tokens" in str(long["error"])
    assert "context of 64" in str(long["error"])
    assert "empty" in str(empty["error"])
    assert fitting["finish_reason"] == "length"
    assert "error" not in fitting
    usage = output.result["usage"]
    assert isinstance(usage, dict)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (60, 4)
    assert output.warnings == ["2 of 3 prompts could not run; their items hold an 'error'"]


def test_a_task_with_no_prompt_that_can_run_fails(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    with pytest.raises(BadDataError, match="none of the 1 prompts can run"):
        tiny.run(task_with(tiny_dir, ["b" * 90]))


def test_chat_needs_a_template(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    with pytest.raises(BadSpecError, match="no chat template"):
        tiny.run(task_with(tiny_dir, [[{"role": "user", "content": "hi"}]]))
    with pytest.raises(BadSpecError, match="no chat template"):
        tiny.run(task_with(tiny_dir, ["hi"], chat=True))


def test_a_template_error_names_the_prompt(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    assert tiny._warm is not None
    tiny._warm.loaded.renderer.tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(BadDataError, match=r"prompt 0.*no system, please"):
        tiny.run(task_with(tiny_dir, ["hi"], chat=True))


def test_weights_written_anew_are_loaded_anew(tiny_dir: Path, tmp_path: Path, task_with: TaskMaker):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dir, folder)
    executor = TextGeneration()
    executor.load(task_with(folder, ["x"]))
    before = executor._warm
    executor.run(task_with(folder, ["x"], max_tokens=1))
    assert executor._warm is before
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 32'))
    executor.run(task_with(folder, ["x"], max_tokens=1))
    assert executor._warm is not None
    assert executor._warm.loaded.renderer.context_tokens == 32


def test_a_models_own_code_does_not_run_without_the_operators_leave(tiny_dir: Path, tmp_path: Path):
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code_of_the_author.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code_of_the_author.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\n")

    with pytest.raises(ModelLoadError) as caught:
        load_model(spec_for(folder, trust_remote_code=True), policy_for(folder), {})

    assert "WORKER_ALLOW_REMOTE_CODE" in caught.value.hint
    assert not (tmp_path / "ran").exists()


def test_asking_for_remote_code_without_need_is_only_a_warning(tiny_dir: Path, task_with: TaskMaker):
    task = task_with(tiny_dir, ["x"], max_tokens=1)
    model = task.spec.model
    asking = model.model_copy(update={"source": model.source.model_copy(update={"trust_remote_code": True})})
    executor = TextGeneration()
    task = replace(task, spec=task.spec.model_copy(update={"model": asking}))
    executor.load(task)

    assert any("WORKER_ALLOW_REMOTE_CODE" in warning for warning in executor.run(task).warnings)


def test_cuda_without_a_gpu_is_a_clear_error(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadSpecError, match="device_map is 'cuda'"):
        load_model(spec_for(tiny_dir, device_map="cuda"), policy_for(tiny_dir), {})


@pytest.mark.parametrize(
    ("option", "library"),
    [
        ("load_in_8bit", "bitsandbytes"),
        ("load_in_4bit", "bitsandbytes"),
        ("use_flash_attention_2", "flash_attn"),
    ],
)
def test_an_option_without_its_library_names_it(
    option: str, library: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("executors.inference.on_transformers.model_loading.importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingLibraryError, match=f"{option}.*{library}"):
        load_model(spec_for(tiny_dir, device_map="cpu", **{option: True}), policy_for(tiny_dir), {})


def test_a_model_outside_the_roots_is_refused(tiny_dir: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tiny_dir)
    for path in (tiny_dir, tmp_path / "link"):
        with pytest.raises(BadSpecError, match="outside the folders"):
            load_model(spec_for(path), policy_for(tmp_path), {})


def test_an_unknown_hub_name_without_network(tmp_path: Path):
    with pytest.raises(ModelLoadError) as caught:
        load_model(spec_for("acme/never-heard-of"), policy_for(tmp_path), {})
    assert "acme/never-heard-of" in caught.value.message
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_broken_weights_are_a_load_error(tiny_dir: Path, tmp_path: Path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_dir, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_model(spec_for(folder), policy_for(tmp_path), {})


def test_a_tokenizer_cannot_take_in_other_files(tiny_dir: Path, tmp_path: Path):
    folder = tmp_path / "curious"
    shutil.copytree(tiny_dir, folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "vocab": "/etc/hostname"}')
    with pytest.raises(ModelLoadError, match="names a file of this host as its vocab"):
        load_model(spec_for(folder), policy_for(tmp_path), {})


# checkpoint.load


@pytest.fixture
def checkpoint_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with other weights."""
    return perturbed(tiny_dir, tmp_path / "final_model", seed=5)


def perturbed(model_dir: Path, folder: Path, seed: int) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_dir, folder)
    torch.manual_seed(seed)
    weights = {name: torch.randn_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_tokenizer(folder: Path) -> Path:
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


def answers(task: ExecutorTask[InferenceSpec], executor: TextGeneration | None = None) -> JsonObject:
    if executor is None:
        executor = TextGeneration()
        executor.load(task)
    return executor.run(task).result


@pytest.fixture
def checkpoint_task(task_with: TaskMaker, tiny_dir: Path) -> TaskMaker:
    """A task for the tiny model with a checkpoint that the daemon has found in `found`."""

    def make(found: Path, model: Path | str = tiny_dir, **sections: object) -> ExecutorTask[InferenceSpec]:
        load = {"checkpoint": {"load": {"url": "http://orch.example/final_model.tar.gz"}}}
        task = task_with(model, ["a text"], max_tokens=12, roots=(tiny_dir,), sections={**load, **sections})
        return replace(task, inputs={"checkpoint.load": found})

    return make


def test_a_checkpoints_weights_are_used(
    checkpoint_dir: Path, tiny_dir: Path, task_with: TaskMaker, checkpoint_task: TaskMaker
):
    result = answers(checkpoint_task(checkpoint_dir))
    assert result["items"] == answers(task_with(checkpoint_dir, ["a text"], max_tokens=12))["items"]
    assert result["items"] != answers(task_with(tiny_dir, ["a text"], max_tokens=12))["items"]
    assert result["model"] == str(tiny_dir)


def test_a_checkpoint_without_a_base_model(checkpoint_dir: Path, task_with: TaskMaker, checkpoint_task: TaskMaker):
    result = answers(checkpoint_task(checkpoint_dir, ""))
    assert result["items"] == answers(task_with(checkpoint_dir, ["a text"], max_tokens=12))["items"]
    assert result["model"] == "final_model.tar.gz"


def test_a_checkpoint_without_tokenizer_takes_the_base_models(checkpoint_dir: Path, checkpoint_task: TaskMaker):
    whole = answers(checkpoint_task(checkpoint_dir))
    bare = without_tokenizer(checkpoint_dir)
    assert answers(checkpoint_task(bare))["items"] == whole["items"]
    with pytest.raises(BadSpecError, match=r"has no tokenizer files; expected spec\.model\.source\.identifier"):
        answers(checkpoint_task(bare, ""))


def test_a_lone_weights_file_takes_the_rest_from_the_base_model(
    checkpoint_dir: Path, tmp_path: Path, checkpoint_task: TaskMaker
):
    whole = answers(checkpoint_task(checkpoint_dir))
    (tmp_path / "entry").mkdir()
    file = shutil.copy(checkpoint_dir / "model.safetensors", tmp_path / "entry" / "model.safetensors")
    for found in (Path(file), Path(file).parent):
        assert answers(checkpoint_task(found))["items"] == whole["items"]
    with pytest.raises(BadSpecError, match=r"'model\.safetensors' alone.*expected spec\.model\.source\.identifier"):
        answers(checkpoint_task(Path(file), ""))


def test_weights_that_lack_something_are_refused(checkpoint_dir: Path, checkpoint_task: TaskMaker):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint_dir / "model.safetensors", metadata={"format": "pt"})
    for found in (checkpoint_dir, checkpoint_dir / "model.safetensors"):
        with pytest.raises(ModelLoadError, match=r"lacks 1 of the model's weights.*layers\.1\.mlp\.up_proj"):
            answers(checkpoint_task(found))


def test_a_new_checkpoint_is_loaded_anew(
    checkpoint_dir: Path, tiny_dir: Path, tmp_path: Path, checkpoint_task: TaskMaker
):
    """The same URL, so the same engine; what lies there has changed, so the cache has another folder for it."""
    executor = TextGeneration()
    first = checkpoint_task(checkpoint_dir)
    executor.load(first)
    warm = executor._warm
    before = answers(first, executor)
    assert executor._warm is warm
    second = checkpoint_task(perturbed(tiny_dir, tmp_path / "changed", seed=6))
    assert TextGeneration.engine_key(first.spec) == TextGeneration.engine_key(second.spec)
    assert answers(second, executor)["items"] != before["items"]
    assert answers(first, executor)["items"] == before["items"]


def test_an_adapter_is_no_checkpoint_yet(tmp_path: Path, checkpoint_task: TaskMaker):
    (tmp_path / "final_lora").mkdir()
    (tmp_path / "final_lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(BadSpecError, match=r"checkpoint\.load is a LoRA adapter \('final_lora'"):
        answers(checkpoint_task(tmp_path / "final_lora"))


def test_what_is_no_model_is_refused(tmp_path: Path, checkpoint_task: TaskMaker):
    folder = tmp_path / "things"
    folder.mkdir()
    (folder / "final_model.pt").write_bytes(b"x")
    for found in (folder, folder / "final_model.pt"):
        with pytest.raises(BadSpecError, match=r"holds final_model\.pt; expected a folder with config\.json"):
            answers(checkpoint_task(found))
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(BadSpecError, match=r"holds a\.gguf, b\.gguf"):
        answers(checkpoint_task(folder))
    with pytest.raises(ModelLoadError, match="has vanished"):
        answers(checkpoint_task(tmp_path / "nothing"))


def test_a_lone_gguf_file_needs_no_base_model(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"x")
    spec = InferenceSpec.model_validate({"checkpoint": {"load": {"taskId": "a"}}, "data": {"items": ["x"]}})
    found = find_weights(spec, policy_for(tmp_path), {"checkpoint.load": tmp_path / "m.gguf"})
    assert (found.location, found.gguf_file, found.base) == (str(tmp_path), "m.gguf", None)


def test_the_base_model_is_never_a_substitute(tiny_dir: Path, checkpoint_task: TaskMaker):
    task = replace(checkpoint_task(tiny_dir), inputs={})
    with pytest.raises(RuntimeError, match="no files for it"):
        answers(task)


def test_a_merged_task_with_another_checkpoint_gets_no_answer_from_this_one(
    checkpoint_dir: Path, task_with: TaskMaker, checkpoint_task: TaskMaker
):
    sections = {"checkpoint": {"load": {"url": "http://orch.example/another.tar.gz"}}}
    (other,) = task_with("x/y", ["a"], sections=sections, children={"other": {"items": ["a"]}}).children
    parent = checkpoint_task(checkpoint_dir)
    same = replace(other, task_id="same", spec=parent.spec)
    executor = TextGeneration()
    task = replace(parent, children=(other, same))
    executor.load(task)
    children = executor.run(task).children
    assert children["other"].failure is not None
    assert "checkpoint.load of this merged task differs" in children["other"].failure.message
    assert children["same"].result is not None


def test_how_a_gguf_file_is_found(tmp_path: Path):
    folder = tmp_path / "quantised"
    folder.mkdir()
    with pytest.raises(BadSpecError, match="neither"):
        find_weights(spec_for(folder), policy_for(tmp_path), {})
    (folder / "a.gguf").write_bytes(b"a")
    found = find_weights(spec_for(folder), policy_for(tmp_path), {})
    assert (found.location, found.gguf_file) == (str(folder), "a.gguf")
    assert find_weights(spec_for(folder / "a.gguf"), policy_for(tmp_path), {}) == found
    (folder / "b.gguf").write_bytes(b"b")
    with pytest.raises(BadSpecError, match=r"a\.gguf, b\.gguf"):
        find_weights(spec_for(folder), policy_for(tmp_path), {})
    chosen = find_weights(spec_for(folder, {"gguf_file": "b.gguf"}), policy_for(tmp_path), {})
    assert chosen.gguf_file == "b.gguf"
    with pytest.raises(BadSpecError, match="outside the folders"):
        find_weights(spec_for(folder, {"gguf_file": "../../x.gguf"}), policy_for(tmp_path), {})
    (folder / "notes.txt").write_text("x")
    with pytest.raises(BadSpecError, match=r"expected a folder with a model, or a \.gguf file"):
        find_weights(spec_for(folder / "notes.txt"), policy_for(tmp_path), {})
