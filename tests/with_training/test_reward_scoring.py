"""Reward models: which logit counts, what is refused, and texts instead of the policy's tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_models import CONTEXT, build, make_tiny_llama, make_tiny_tokenizer, train

from executors.contract import EnginePolicy
from executors.errors import BadSpecError, ExecutorError, ModelLoadError
from executors.training.rewards.reward_scoring import TextScorer, load_scorer
from executors.training.rewards.text_rewards import RewardSum, TextBackbone, reward_module
from executors.training.spec.trainer_specs import RewardModelOptions
from executors.training.trainers.ppo_batches import PromptRows, SeededBatches
from executors.training.training_run import TrainingRun

RunMaker = Callable[..., TrainingRun]

PROMPTS = ["a long question, ", "b"]
ANSWERS = ["no", "yes and more"]


def make_bert(folder: Path, labels: dict[int, str]) -> Path:
    """Save a random classifier of another family, with words as tokens and marks around each text."""
    import tokenizers  # noqa: PLC0415 - comes with an extra
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "long", "question", "no", "yes", "and", "more", ","]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=len(labels),
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {0: "NEGATIVE", 1: "neutral", 2: "Positive"}
    return make_bert(tmp_path_factory.mktemp("models") / "sentiment", labels)


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("models") / "unnamed", {0: "LABEL_0", 1: "LABEL_1"})


@pytest.fixture(scope="module")
def one_score(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `taskType: reward` makes: a decoder with one score at a text's last token."""
    import torch
    import transformers

    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "one-score", seed=5)
    torch.manual_seed(6)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options: object) -> TextScorer:
    named = RewardModelOptions(identifier=str(folder), **options)
    return load_scorer(named, EnginePolicy(allowed_roots=(folder.parent,)))


def logits(folder: Path, text: str) -> list[float]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        found: list[float] = model(**tokenizer(text, return_tensors="pt")).logits[0].tolist()
    return found


def test_one_score_with_an_end_token_behind_the_text(one_score: Path):
    scores = load(one_score, scale=-2.0).score(PROMPTS, ANSWERS)
    texts = [prompt + answer + "<end>" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert scores == pytest.approx([-2 * logits(one_score, text)[0] for text in texts], abs=1e-4)


def test_conversations_go_through_the_classifiers_own_template(one_score: Path, sentiment: Path):
    talk = [{"role": "user", "content": "a"}]
    tokenizer = make_tiny_tokenizer()
    text = tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": "no"}], tokenize=False)
    assert load(one_score).score([talk], ["no"]) == pytest.approx([logits(one_score, text)[0]], abs=1e-4)
    assert load(sentiment).score([talk], ["no"]) == pytest.approx([logits(sentiment, "a no")[2]], abs=1e-4)


def test_the_logit_of_a_label(sentiment: Path):
    expected = [logits(sentiment, prompt + answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert load(sentiment).score(PROMPTS, ANSWERS) == pytest.approx([found[2] for found in expected], abs=1e-4)
    for label in ("Neutral", 1, "1"):
        scores = load(sentiment, positive_label=label).score(PROMPTS, ANSWERS)
        assert scores == pytest.approx([found[1] for found in expected], abs=1e-4)
    scores = load(sentiment, type="sentiment", scale=0.5).score(PROMPTS, ANSWERS)
    assert scores == pytest.approx([(found[2] - found[0]) / 2 for found in expected], abs=1e-4)


def test_a_tokenizer_cannot_take_in_other_files(one_score: Path, tmp_path: Path):
    model = shutil.copytree(one_score, tmp_path / "model")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "vocab": "/etc/hostname"}')
    with pytest.raises(ModelLoadError, match="names a file of this host as its vocab"):
        load(model)


def test_labels_that_do_not_tell_are_listed(unnamed: Path, one_score: Path):
    with pytest.raises(BadSpecError, match=r"positive_label is missing.*0: LABEL_0, 1: LABEL_1"):
        load(unnamed, type="sentiment")
    with pytest.raises(BadSpecError, match=r"positive_label is 'good'.*0: LABEL_0, 1: LABEL_1"):
        load(unnamed, positive_label="good")
    with pytest.raises(BadSpecError, match="both mean 'LABEL_1'"):
        load(unnamed, type="sentiment", positive_label=1, negative_label="label_1")
    with pytest.raises(BadSpecError, match="has one label"):
        load(one_score, type="sentiment")
    scorer = load(unnamed, type="sentiment", positive_label=1, negative_label=0)
    assert (scorer.positive, scorer.negative) == (1, 0)


def test_long_texts_lose_their_beginning(sentiment: Path):
    scorer = load(sentiment, max_length=5)
    expected = logits(sentiment, "question, no")[2]
    assert scorer.score(["a b a b a long question, "], ["no"]) == pytest.approx([expected], abs=1e-4)
    assert load(sentiment).max_length == 32, "the model's context"
    assert scorer.score([], []) == []


@pytest.mark.parametrize("files", ["no_head", "language_model", "missing"])
def test_what_is_no_classifier_is_refused_before_the_policy_loads(
    files: str, make_run: RunMaker, tmp_path: Path, one_score: Path
):
    import transformers
    from safetensors.torch import load_file, save_file

    policy = make_tiny_llama(tmp_path / "policy")
    (policy / "model.safetensors").unlink()
    reward_model = tmp_path / "reward"
    if files == "language_model":
        make_tiny_llama(reward_model)
    elif files == "no_head":
        transformers.AutoModelForSequenceClassification.from_pretrained(one_score).save_pretrained(reward_model)
        make_tiny_tokenizer().save_pretrained(reward_model)
        weights = load_file(reward_model / "model.safetensors")
        del weights["score.weight"]
        save_file(weights, reward_model / "model.safetensors", metadata={"format": "pt"})
    run = make_run("ppo", model=policy, data={"prompts": PROMPTS}, reward_model={"identifier": str(reward_model)})
    kind: type[ExecutorError] = BadSpecError if files == "missing" else ModelLoadError
    told = "does not exist" if files == "missing" else "is no classifier"
    with pytest.raises(kind, match=told) as caught:
        build(run)
    assert "reward_model" in caught.value.message


def test_ppo_with_a_reward_model_of_another_tokenizer(make_run: RunMaker, sentiment: Path, tmp_path: Path):
    copied = shutil.copytree(sentiment, tmp_path / "sentiment")
    run = make_run(
        "ppo",
        data={"prompts": PROMPTS * 4},
        training={"batch_size": 4, "max_steps": 2},
        generation={"max_new_tokens": 6},
        reward_model={"identifier": str(copied), "type": "sentiment"},
        reward_functions=[{"name": "length", "target": 6, "weight": 0.5}],
    )
    trained = train(run)
    assert trained.steps == 2
    assert any("the reward model runs on cpu" in line for line in trained.run.tell.logged)


def test_answers_are_judged_as_texts_in_the_order_of_their_rows():
    import torch
    from trl.experimental.utils import get_reward

    class Seen:
        weight = 3.0

        def __init__(self) -> None:
            self.calls: list[Any] = []

        def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[object]]) -> list[float]:
            self.calls.append((prompts, completions, columns))
            return [float(len(text)) for text in completions]

    seen = Seen()
    tokenizer = make_tiny_tokenizer()
    prompts = ["one", "two more", "three"]
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    batches = SeededBatches(
        PromptRows(prompts, tokens, {"answer": [1, 2, 3]}), size=3, seed=0, pad_id=tokenizer.pad_token_id
    )
    queries = next(iter(batches))["input_ids"]
    places = batches.places(0)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    answers = torch.tensor(
        [[*tokenizer("xy")["input_ids"], end, pad], [end, pad, pad, pad], tokenizer("wxyz")["input_ids"]]
    )
    module = reward_module(TextBackbone(batches, tokenizer, frozenset({end}), RewardSum([seen])))
    whole = torch.cat((queries, answers), 1)
    scores = torch.cat([get_reward(module, part, pad, batches.width)[1] for part in (whole[:2], whole[2:])])
    assert scores.tolist() == [6.0, 0.0, 12.0]
    named = [prompts[place] for place in places]
    assert seen.calls == [
        (named[:2], ["xy", ""], {"answer": [place + 1 for place in places[:2]]}),
        (named[2:], ["wxyz"], {"answer": [places[2] + 1]}),
    ]
    assert batches.width + 4 < CONTEXT
