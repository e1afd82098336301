"""Supervised fine-tuning of whole weights: what it learns, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from training_models import CONTEXT, RunMaker, answer, build, load_saved, stop_after, train

from executors.errors import BadDataError, BadSpecError, ModelLoadError
from executors.safetensors_headers import read_headers
from executors.training.trainers.base_models import load_causal_lm, load_classifier, load_tokenizer
from executors.training.training_job import ResumePoint

SENTENCES = [
    "What is snow? Frozen water.",
    "Who wrote it? Nobody knows.",
    "When is noon? At twelve.",
    "Why is it so? Ask the sea.",
]
LEARNING = {"max_steps": 40, "batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "no"}
CONVERSATIONS = [
    [{"role": "user", "content": "What is snow?"}, {"role": "assistant", "content": "Frozen water."}],
    [{"role": "user", "content": "When is noon?"}, {"role": "assistant", "content": "At twelve."}],
]


def test_it_learns_and_the_saved_model_answers(make_run: RunMaker):
    done = train(make_run("sft", data={"prompts": SENTENCES}, training=LEARNING))
    assert done.steps == 40
    assert done.losses[0] > 3
    assert done.losses[-1] < 0.1
    assert done.folder is not None
    assert done.folder.name == "final_model"
    model, tokenizer = load_saved(done.folder)
    assert answer(model, tokenizer, "What is snow?") == " Frozen water."
    assert answer(model, tokenizer, "When is noon?") == " At twelve."
    assert tokenizer.chat_template is not None


def test_16_bit_training_keeps_32_bit_weights(make_run: RunMaker):
    from safetensors.torch import load_file

    done = train(make_run("sft", data={"prompts": SENTENCES}, training={**LEARNING, "max_steps": 20, "bf16": True}))
    assert done.losses[-1] < 1
    assert done.folder is not None
    assert {str(weight.dtype) for weight in load_file(done.folder / "model.safetensors").values()} == {"torch.float32"}


def test_two_runs_with_one_seed_are_equal(make_run: RunMaker):
    options = {**LEARNING, "max_steps": 3, "save_model": False}
    first, second = (train(make_run("sft", data={"prompts": SENTENCES}, training=options)) for _ in range(2))
    assert first.losses == second.losses
    assert first.folder is None


def test_conversations_are_learnt_with_the_chat_template(make_run: RunMaker):
    done = train(make_run("sft", data={"messages": CONVERSATIONS}, training=LEARNING))
    assert done.folder is not None
    model, tokenizer = load_saved(done.folder)
    asked = tokenizer.apply_chat_template(CONVERSATIONS[0][:1], tokenize=False, add_generation_prompt=True)
    assert answer(model, tokenizer, asked) == "Frozen water."


def test_only_the_assistants_words_can_count(make_run: RunMaker):
    run = make_run("sft", data={"messages": CONVERSATIONS}, training={**LEARNING, "trl": {"assistant_only_loss": True}})
    built = build(run)
    labels = built.trainer.train_dataset[0]["labels"]
    kept = built.tokenizer.decode([label for label in labels if label != -100])
    assert kept == "Frozen water.<end>"


def test_conversations_need_a_chat_template(make_run: RunMaker, tiny_base_dir: Path):
    run = make_run("sft", model=tiny_base_dir, data={"messages": CONVERSATIONS}, training=LEARNING)
    with pytest.raises(BadSpecError, match="no chat template"):
        build(run)


def test_assistant_only_loss_needs_a_template_that_marks_the_words(
    make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path
):
    folder = tmp_path / "unmarked"
    shutil.copytree(tiny_chat_dir, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    run = make_run(
        "sft", model=folder, data={"messages": CONVERSATIONS}, training={"trl": {"assistant_only_loss": True}}
    )
    with pytest.raises(BadSpecError, match=r"does not mark the assistant's words with {% generation %}"):
        build(run)


def test_a_conversation_that_the_template_refuses_is_named(
    make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "strict"
    shutil.copytree(tiny_chat_dir, folder)
    strict = (
        "{% if messages|length != 2 %}{{ raise_exception('two turns only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    (folder / "chat_template.jinja").write_text(strict)
    talks = [*CONVERSATIONS, CONVERSATIONS[0][:1]]
    run = make_run("sft", model=folder, data={"messages": talks})
    with pytest.raises(BadDataError, match=r"row 2: .* refuses the conversation \(roles: user\): two turns only"):
        build(run)
    monkeypatch.setattr("executors.training.trainers.sft_training.LOOKED_AT_FIRST", 1)
    with pytest.raises(BadDataError, match="row 2: "):
        build(run)


def test_each_conversation_needs_words_that_count(make_run: RunMaker):
    talks = [*CONVERSATIONS, CONVERSATIONS[0][:1]]
    run = make_run("sft", data={"messages": talks}, training={"trl": {"assistant_only_loss": True}})
    with pytest.raises(BadDataError, match="row 2 has no message of the assistant"):
        build(run)


def test_assistant_only_loss_needs_conversations(make_run: RunMaker):
    run = make_run("sft", data={"prompts": SENTENCES}, training={"trl": {"assistant_only_loss": True}})
    with pytest.raises(BadSpecError, match="assistant_only_loss is true, but the data are plain texts"):
        build(run)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_run: RunMaker, tmp_path: Path):
    from safetensors.torch import load_file

    options = {**LEARNING, "max_steps": 9, "batch_size": 1, "save_strategy": "steps", "save_steps": 4}
    sections = {"data": {"prompts": SENTENCES}, "training": options}
    whole = train(make_run("sft", **sections))
    out_dir = tmp_path / "interrupted"
    train(make_run("sft", out_dir, **sections), stop_after(6))
    point = ResumePoint(path=out_dir / "checkpoints" / "checkpoint-4", step=4)
    resumed = train(make_run("sft", out_dir, resume=point, **sections))
    assert resumed.steps == whole.steps == 9
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)
    assert whole.folder is not None
    assert resumed.folder is not None
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole.folder, resumed.folder))
    assert all(abs(found[name] - expected[name]).max() < 1e-5 for name in expected)


def test_packed_texts_do_not_see_each_other(make_run: RunMaker):
    """What a packed batch costs is what its texts cost one by one."""
    import torch

    built = build(make_run("sft", data={"prompts": SENTENCES}, training={**LEARNING, "packing": True}))
    trainer = built.trainer
    assert len(trainer.train_dataset) == 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        packed = trainer.model(**batch).loss.item()
        costs, counted = 0.0, 0
        for sentence in SENTENCES:
            ids = torch.tensor([built.tokenizer(sentence + "<end>")["input_ids"]])
            costs += trainer.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            counted += ids.shape[1] - 1
    assert packed == pytest.approx(costs / counted, rel=1e-4)


def test_packing_learns(make_run: RunMaker):
    done = train(make_run("sft", data={"prompts": SENTENCES}, training={**LEARNING, "packing": True, "batch_size": 1}))
    assert done.losses[-1] < 0.1


def test_packing_is_refused_where_texts_would_mix(make_run: RunMaker, tmp_path: Path):
    import transformers

    folder = tmp_path / "bloom"
    shutil.copytree(make_run("sft", data={"prompts": ["x"]}).spec.model.source.identifier, folder)
    (folder / "model.safetensors").unlink()
    transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    run = make_run("sft", model=folder, data={"prompts": SENTENCES}, training={"packing": True})
    with pytest.raises(
        BadSpecError, match=r"packing is true, but the model .*bloom.* does not keep packed texts apart"
    ):
        build(run)


def test_examples_are_cut_at_the_context(make_run: RunMaker):
    run = make_run("sft", data={"prompts": ["a" * 400]}, training={**LEARNING, "max_seq_length": 1000})
    built = build(run)
    assert len(built.trainer.train_dataset[0]["input_ids"]) == CONTEXT
    assert any("max_seq_length is 1000, above the model's context of 256" in text for text in run.tell.warnings)
    assert any("1 of 1 examples reach the limit of 256 tokens" in text for text in run.tell.warnings)
    unsaid = make_run("sft", data={"prompts": ["a" * 400]}, training=LEARNING)
    assert build(unsaid).trainer.args.max_length == CONTEXT
    assert not any("max_seq_length is" in text for text in unsaid.tell.warnings)


def test_nothing_to_learn_from_is_an_error(make_run: RunMaker, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"q": "a" * 50, "a": "b"}))
    run = make_run(
        "sft",
        data={"dataset_name": str(rows), "prompt_column": "q", "response_column": "a"},
        training={"max_seq_length": 10, "trl": {"completion_only_loss": True}},
    )
    with pytest.raises(BadDataError, match="first 10 tokens"):
        build(run)


# what is loaded


def test_weights_that_lack_something_are_refused(make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path):
    folder = copy_with(tiny_chat_dir, tmp_path / "part", drop="model.layers.1.mlp.up_proj.weight")
    run = make_run("sft", model=folder, data={"prompts": SENTENCES})
    with pytest.raises(ModelLoadError, match=r"lacks 1 of the model's weights: model\.layers\.1\.mlp\.up_proj"):
        load_causal_lm(run, load_tokenizer(run))


def copy_with(source: Path, folder: Path, *, drop: str) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[drop]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_classifier_has_a_new_head_that_the_seed_decides(make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path):
    run = make_run("sft", data={"prompts": SENTENCES})
    tokenizer = load_tokenizer(run)
    first, second = (load_classifier(run, tokenizer).score.weight for _ in range(2))
    assert first.shape[0] == 1
    assert first.equal(second)
    folder = copy_with(tiny_chat_dir, tmp_path / "part", drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelLoadError, match="lacks 1"):
        load_classifier(make_run("sft", model=folder, data={"prompts": SENTENCES}), tokenizer)


def test_a_checkpoint_brings_weights_and_tokenizer(
    make_run: RunMaker, tiny_chat_dir: Path, tiny_base_dir: Path, tmp_path: Path
):
    import transformers

    trained = tmp_path / "final_model"
    shutil.copytree(tiny_chat_dir, trained)
    sections = {"data": {"prompts": SENTENCES}, "checkpoint": {"load": {"path": str(trained)}}}
    run = make_run("sft", model=tiny_base_dir, inputs={"checkpoint.load": trained}, **sections)
    tokenizer = load_tokenizer(run)
    assert tokenizer.chat_template is not None
    lone = tmp_path / "model.safetensors"
    shutil.copy(trained / "model.safetensors", lone)
    with_file = make_run("sft", model=tiny_base_dir, inputs={"checkpoint.load": lone}, **sections)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir).state_dict()
    for each in (run, with_file):
        found = load_causal_lm(each, tokenizer).state_dict()
        assert all(found[name].equal(expected[name]) for name in expected)


def test_gguf_is_refused(make_run: RunMaker, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    run = make_run("sft", model=tmp_path / "m.gguf", data={"prompts": SENTENCES})
    with pytest.raises(BadSpecError, match=r"GGUF file 'm\.gguf'; quantised weights cannot be trained"):
        load_tokenizer(run)


def test_quantised_weights_are_refused(make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path):
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_chat_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    run = make_run("sft", model=folder, data={"prompts": SENTENCES})
    with pytest.raises(BadSpecError, match="has quantised weights"):
        load_causal_lm(run, load_tokenizer(run))


def test_an_unknown_model_names_the_way_out(make_run: RunMaker):
    run = make_run("sft", model="acme/never-heard-of", data={"prompts": SENTENCES})
    with pytest.raises(ModelLoadError, match="acme/never-heard-of") as caught:
        load_tokenizer(run)
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path
):
    import transformers

    folder = tmp_path / "grown"
    shutil.copytree(tiny_chat_dir, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(5)])
    tokenizer.save_pretrained(folder)
    run = make_run("sft", model=folder, data={"prompts": SENTENCES})
    with pytest.raises(ModelLoadError, match="knows 263 tokens, and its weights have embeddings for 258"):
        load_causal_lm(run, load_tokenizer(run))


def test_a_missing_pad_token_is_found(make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path):
    folder = tmp_path / "padless"
    shutil.copytree(tiny_chat_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(make_run("sft", model=folder, data={"prompts": SENTENCES})).pad_token == "<pad>"


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_a_tokenizer_cannot_take_in_other_files(make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path, key: str):
    """Else their lines would be tokens, and lie in the final model's tokenizer.json."""
    private = tmp_path / "private.txt"
    private.write_text("password\n")
    model = shutil.copytree(tiny_chat_dir, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", key: str(private)}))
    with pytest.raises(ModelLoadError, match=f"names a file of this host as its {key}"):
        load_tokenizer(make_run("sft", model=model, data={"prompts": ["a"]}))


def test_an_index_cannot_take_in_weights_from_elsewhere(make_run: RunMaker, tiny_chat_dir: Path, tmp_path: Path):
    model = shutil.copytree(tiny_chat_dir, tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "private.safetensors")
    index = {"weight_map": dict.fromkeys(read_headers(tiny_chat_dir), "../private.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    run = make_run("sft", model=model, data={"prompts": ["a"]})
    with pytest.raises(ModelLoadError, match="expected one in the same folder"):
        load_causal_lm(run, load_tokenizer(run))
