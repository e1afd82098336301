"""Loading, with a tiny random model and with bad ones."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from executors.contract import EnginePolicy, ExecutorTask
from executors.errors import BadDataError, BadSpecError, MissingLibraryError, ModelLoadError
from executors.inference_spec import InferenceSpec
from executors.model_loading import find_weights, load_model
from executors.text_generation import TextGeneration

pytestmark = pytest.mark.model
TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]


def spec_for(identifier: object, source: dict[str, object] | None = None, **options: object) -> InferenceSpec:
    model = {"source": {"identifier": str(identifier), **(source or {})}, "transformers": options}
    return InferenceSpec.model_validate({"model": model, "data": {"items": ["x"]}})


def policy_for(*roots: Path) -> EnginePolicy:
    return EnginePolicy(allowed_roots=roots)


def test_a_folder_loads_with_the_wanted_dtype(tiny_dir: Path):
    loaded = load_model(spec_for(tiny_dir, dtype="bf16", device_map="cpu"), policy_for(tiny_dir))
    assert (loaded.device, loaded.dtype, loaded.context_tokens) == ("cpu", "bfloat16", 64)
    assert loaded.end_ids == {loaded.tokenizer.eos_token_id}
    assert loaded.pad_id == loaded.tokenizer.eos_token_id
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
    assert tiny._loaded is not None
    tiny._loaded.tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(BadDataError, match=r"prompt 0.*no system, please"):
        tiny.run(task_with(tiny_dir, ["hi"], chat=True))


def test_weights_written_anew_are_loaded_anew(tiny_dir: Path, tmp_path: Path, task_with: TaskMaker):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dir, folder)
    executor = TextGeneration()
    executor.load(task_with(folder, ["x"]))
    before = executor._loaded
    executor.run(task_with(folder, ["x"], max_tokens=1))
    assert executor._loaded is before
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 32'))
    executor.run(task_with(folder, ["x"], max_tokens=1))
    assert executor._loaded is not None
    assert executor._loaded.context_tokens == 32


def test_a_models_own_code_does_not_run_without_the_operators_leave(tiny_dir: Path, tmp_path: Path):
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code_of_the_author.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code_of_the_author.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\n")

    with pytest.raises(ModelLoadError) as caught:
        load_model(spec_for(folder, trust_remote_code=True), policy_for(folder))

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
        load_model(spec_for(tiny_dir, device_map="cuda"), policy_for(tiny_dir))


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
    monkeypatch.setattr("executors.model_loading.importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingLibraryError, match=f"{option}.*{library}"):
        load_model(spec_for(tiny_dir, device_map="cpu", **{option: True}), policy_for(tiny_dir))


def test_a_model_outside_the_roots_is_refused(tiny_dir: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tiny_dir)
    for path in (tiny_dir, tmp_path / "link"):
        with pytest.raises(BadSpecError, match="outside the folders"):
            load_model(spec_for(path), policy_for(tmp_path))


def test_an_unknown_hub_name_without_network(tmp_path: Path):
    with pytest.raises(ModelLoadError) as caught:
        load_model(spec_for("acme/never-heard-of"), policy_for(tmp_path))
    assert "acme/never-heard-of" in caught.value.message
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_broken_weights_are_a_load_error(tiny_dir: Path, tmp_path: Path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_dir, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_model(spec_for(folder), policy_for(tmp_path))


def test_how_a_gguf_file_is_found(tmp_path: Path):
    folder = tmp_path / "quantised"
    folder.mkdir()
    with pytest.raises(BadSpecError, match="neither"):
        find_weights(spec_for(folder), policy_for(tmp_path))
    (folder / "a.gguf").write_bytes(b"a")
    found = find_weights(spec_for(folder), policy_for(tmp_path))
    assert (found.location, found.gguf_file) == (str(folder), "a.gguf")
    assert find_weights(spec_for(folder / "a.gguf"), policy_for(tmp_path)) == found
    (folder / "b.gguf").write_bytes(b"b")
    with pytest.raises(BadSpecError, match=r"a\.gguf, b\.gguf"):
        find_weights(spec_for(folder), policy_for(tmp_path))
    chosen = find_weights(spec_for(folder, {"gguf_file": "b.gguf"}), policy_for(tmp_path))
    assert chosen.gguf_file == "b.gguf"
    with pytest.raises(BadSpecError, match="outside the folders"):
        find_weights(spec_for(folder, {"gguf_file": "../../x.gguf"}), policy_for(tmp_path))
    (folder / "notes.txt").write_text("x")
    with pytest.raises(BadSpecError, match=r"expected a folder with a model, or a \.gguf file"):
        find_weights(spec_for(folder / "notes.txt"), policy_for(tmp_path))
