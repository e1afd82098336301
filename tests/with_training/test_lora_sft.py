"""LoRA adapters: what they learn, that the base model stays as it is, and how one is trained further."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_models import RunMaker, Trained, answer, build, make_tiny_llama, stop_after, train

from executors.errors import BadSpecError, ModelLoadError
from executors.training.trainers.base_models import load_causal_lm, load_classifier, load_tokenizer, lora_config
from executors.training.training_job import ResumePoint

SENTENCES = [
    "What is snow? Frozen water.",
    "Who wrote it? Nobody knows.",
    "When is noon? At twelve.",
    "Why is it so? Ask the sea.",
]
DATA = {"prompts": SENTENCES}
LEARNING = {"max_steps": 60, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
LORA = {"r": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "dropout": 0}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def with_adapter(base: Path, folder: Path) -> tuple[Any, Any]:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_it_learns_and_the_base_stays_as_it_is(make_run: RunMaker, tiny_chat_dir: Path):
    import transformers

    before = digests(tiny_chat_dir)
    done = train(make_run("lora_sft", data=DATA, training=LEARNING, lora=LORA))
    assert done.losses[0] > 3
    assert done.losses[-1] < 0.1
    assert done.folder is not None
    assert done.folder.name == "final_lora"
    assert (done.folder / "adapter_model.safetensors").is_file()
    assert not (done.folder / "model.safetensors").exists()
    assert digests(tiny_chat_dir) == before
    trained = done.built.trainer.model
    model, tokenizer = with_adapter(tiny_chat_dir, done.folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir)
    assert answer(model, tokenizer, "What is snow?") == " Frozen water."
    untrained = answer(base, tokenizer, "What is snow?")
    for each in (model, trained):
        with each.disable_adapter():
            assert answer(each.eval(), tokenizer, "What is snow?") == untrained
    assert untrained != " Frozen water."


def test_gradient_checkpointing_changes_no_loss(make_run: RunMaker):
    options = {**LEARNING, "max_steps": 3}
    with_it, without = (
        train(make_run("lora_sft", data=DATA, training={**options, "gradient_checkpointing": wanted}, lora=LORA))
        for wanted in (True, False)
    )
    assert with_it.losses == pytest.approx(without.losses, rel=1e-4)
    assert with_it.losses[-1] < with_it.losses[0]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_run: RunMaker, tmp_path: Path):
    options = {**LEARNING, "max_steps": 9, "batch_size": 1, "save_strategy": "steps", "save_steps": 4}
    sections = {"data": DATA, "training": options, "lora": {**LORA, "dropout": 0.05}}
    whole = train(make_run("lora_sft", **sections))
    out_dir = tmp_path / "interrupted"
    train(make_run("lora_sft", out_dir, **sections), stop_after(6))
    point = ResumePoint(path=out_dir / "checkpoints" / "checkpoint-4", step=4)
    resumed = train(make_run("lora_sft", out_dir, resume=point, **sections))
    assert resumed.steps == whole.steps == 9
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)


# an adapter that is trained further


@pytest.fixture
def half_trained(make_run: RunMaker) -> Trained:
    return train(make_run("lora_sft", data=DATA, training={**LEARNING, "max_steps": 25}, lora=LORA))


def test_an_adapter_is_trained_further(make_run: RunMaker, half_trained: Trained):
    assert half_trained.folder is not None
    run = make_run(
        "lora_sft",
        data=DATA,
        training={**LEARNING, "max_steps": 25},
        lora={"r": 2},
        checkpoint={"load": {"path": str(half_trained.folder)}},
        inputs={"checkpoint.load": half_trained.folder},
    )
    done = train(run)
    assert done.losses[0] == pytest.approx(half_trained.losses[-1], rel=0.5)
    assert done.losses[-1] < half_trained.losses[-1]
    assert done.folder is not None
    assert json.loads((done.folder / "adapter_config.json").read_text())["r"] == 16
    assert any("spec.lora is ignored: spec.checkpoint.load is an adapter" in text for text in done.warnings)


def test_resume_from_path_may_be_an_adapter_too(make_run: RunMaker, half_trained: Trained):
    run = make_run(
        "lora_sft", data=DATA, training={**LEARNING, "max_steps": 1, "resume_from_path": str(half_trained.folder)}
    )
    done = train(run)
    assert done.losses[0] == pytest.approx(half_trained.losses[-1], rel=0.5)
    assert done.warnings == []


def test_code_of_an_adapters_tokenizer_is_not_run(make_run: RunMaker, half_trained: Trained, tmp_path: Path):
    assert half_trained.folder is not None
    adapter = shutil.copytree(half_trained.folder, tmp_path / "adapter")
    file = adapter / "tokenizer_config.json"
    own_code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own_code}))
    (adapter / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    model = {"source": {"identifier": str(half_trained.run.spec.model.source.identifier), "trust_remote_code": True}}
    run = make_run("lora_sft", model=model, data=DATA, training={"resume_from_path": str(adapter)})
    with pytest.raises(ModelLoadError, match="custom code"):
        load_tokenizer(run)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_for_whole_weights_is_refused(make_run: RunMaker, half_trained: Trained):
    assert half_trained.folder is not None
    run = make_run(
        "sft",
        data=DATA,
        checkpoint={"load": {"path": str(half_trained.folder)}},
        inputs={"checkpoint.load": half_trained.folder},
    )
    with pytest.raises(BadSpecError, match=r"spec\.checkpoint\.load is a LoRA adapter") as caught:
        load_tokenizer(run)
    assert "lora_sft" in caught.value.hint


def test_an_adapter_without_its_base_model_is_refused(make_run: RunMaker, half_trained: Trained):
    assert half_trained.folder is not None
    run = make_run(
        "lora_sft",
        model={},
        data=DATA,
        checkpoint={"load": {"path": str(half_trained.folder)}},
        inputs={"checkpoint.load": half_trained.folder},
    )
    with pytest.raises(BadSpecError, match=r"expected its base model in spec\.model\.source\.identifier"):
        load_tokenizer(run)


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(
    make_run: RunMaker, half_trained: Trained, tmp_path: Path
):
    assert half_trained.folder is not None
    other = make_tiny_llama(tmp_path / "other", hidden=32)
    sections = {"data": DATA, "checkpoint": {"load": {"path": "anywhere"}}}
    run = make_run("lora_sft", model=other, inputs={"checkpoint.load": half_trained.folder}, **sections)
    with pytest.raises(BadSpecError, match=r"^spec\.checkpoint\.load does not belong to the model"):
        load_causal_lm(run, load_tokenizer(run))
    damaged = tmp_path / "damaged"
    shutil.copytree(half_trained.folder, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    run = make_run("lora_sft", inputs={"checkpoint.load": damaged}, **sections)
    with pytest.raises((BadSpecError, ModelLoadError), match=r"spec\.checkpoint\.load"):
        load_causal_lm(run, load_tokenizer(run))


# target modules


def test_target_modules_that_match_nothing_are_refused(make_run: RunMaker):
    run = make_run("lora_sft", data=DATA, lora={"target_modules": ["query_key_value", "c_attn"]})
    with pytest.raises(BadSpecError, match=r"no module of the model .* has one of these names") as caught:
        build(run)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in caught.value.message


def test_target_modules_of_which_some_match(make_run: RunMaker):
    run = make_run("lora_sft", data=DATA, lora={"target_modules": ["q_proj", "c_attn"]})
    built = build(run)
    assert built.trainer.model.peft_config["default"].target_modules == {"q_proj"}
    (warning,) = [text for text in run.tell.warnings if "target_modules" in text]
    assert "no module of the model has the name 'c_attn'" in warning


def test_a_target_that_is_no_linear_module_is_refused(make_run: RunMaker):
    run = make_run("lora_sft", data=DATA, lora={"target_modules": ["mlp"]})
    with pytest.raises(BadSpecError, match=r"'mlp', which in the model .* is a LlamaMLP"):
        build(run)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # the adapter has them twice, which is no fault
@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["all-linear"]])
def test_all_that_is_linear_may_be_a_target(make_run: RunMaker, targets: list[str]):
    done = train(
        make_run("lora_sft", data=DATA, training={**LEARNING, "max_steps": 2}, lora={"target_modules": targets})
    )
    assert done.steps == 2
    config = done.built.trainer.model.peft_config["default"]
    assert ("lm_head" in config.target_modules) == ("lm_head" in targets)


def test_a_classifiers_adapter_is_one_for_a_classifier(make_run: RunMaker):
    run = make_run("lora_sft", data=DATA)
    assert lora_config(run, load_classifier(run, load_tokenizer(run))).task_type == "SEQ_CLS"
    assert lora_config(make_run("sft", data=DATA), None) is None


def test_four_bits_need_a_gpu(make_run: RunMaker):
    run = make_run("lora_sft", data=DATA, lora={"load_in_4bit": True})
    with pytest.raises(BadSpecError, match=r"load_in_4bit"):
        build(run)
