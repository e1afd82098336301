"""`n`, seeds and `logprobs`, against what the bare model says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executors.contract import ExecutorTask, TaskOutput
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration

pytestmark = pytest.mark.model
TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]
PROMPTS: list[object] = ["a short text", "b", "text a text", "xyz"]
SAMPLED = {"temperature": 1.2, "max_tokens": 6, "top_k": 0}


def items_of(output: TaskOutput) -> list[dict[str, Any]]:
    items = output.result["items"]
    assert isinstance(items, list)
    return items


def all_outputs(output: TaskOutput) -> list[list[str]]:
    return [[sample["output"] for sample in item.get("outputs", [item])] for item in items_of(output)]


def test_each_prompt_gets_n_outputs_with_draws_of_their_own(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker, make_report: Callable[..., Any]
):
    report = make_report()
    output = tiny.run(task_with(tiny_dir, PROMPTS, n=3, seed=1, batch_size=5, report=report, **SAMPLED))
    assert [len(samples) for samples in all_outputs(output)] == [3, 3, 3, 3]
    assert all(len(set(samples)) == 3 for samples in all_outputs(output))
    assert [item["output"] for item in items_of(output)] == [samples[0] for samples in all_outputs(output)]
    usage = output.result["usage"]
    assert isinstance(usage, dict)
    assert usage["num_requests"] == 4
    assert usage["completion_tokens"] == 4 * 3 * 6
    assert report.told[-1] == (4, 4)


def test_what_a_seed_gives_does_not_depend_on_what_runs_beside_it(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker
):
    together, by_two, few = (
        all_outputs(tiny.run(task_with(tiny_dir, prompts, n=2, seed=7, batch_size=size, **SAMPLED)))
        for prompts, size in ((PROMPTS, 8), (PROMPTS, 3), (PROMPTS[:2], 1))
    )
    assert together == by_two
    assert together[:2] == few
    assert together != all_outputs(tiny.run(task_with(tiny_dir, PROMPTS, n=2, seed=8, **SAMPLED)))


def test_draws_follow_the_models_distribution(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    import torch

    options = {"n": 64, "seed": 3, "max_tokens": 1, "temperature": 0.5, "top_k": 4, "top_p": 1.0, "logprobs": 0}
    prompts: list[object] = ["a short text"] * 12
    output = tiny.run(task_with(tiny_dir, prompts, **options))
    ids = [sample["logprobs"][0]["id"] for item in items_of(output) for sample in item["outputs"]]
    logits = torch.cat([next(raw_logits(tiny, "a short text", []))])
    best = logits.topk(4)
    expected = (best.values / 0.5).softmax(-1).tolist()
    counted = [ids.count(token) / len(ids) for token in best.indices.tolist()]
    assert sum(counted) == pytest.approx(1)
    assert counted == pytest.approx(expected, abs=0.06)  # 768 draws: three standard deviations


def raw_logits(executor: TextGeneration, prompt: str, generated: list[int]) -> Iterator[Any]:
    """The bare model's scores at the place of each generated token, and at one more."""
    import torch

    assert executor._warm is not None
    loaded = executor._warm.loaded
    ids = [*loaded.renderer.tokenizer(prompt)["input_ids"], *generated]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids])).logits[0]
    yield from logits[len(ids) - len(generated) - 1 :].float()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 2, "n": 2, "top_k": 3},
        {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0, "guided": {"regex": "[0-9]{4}"}},
    ],
    ids=["greedy", "sampled", "penalised", "guided"],
)
@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_those_of_the_bare_model(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker, options: dict[str, Any], top: int
):
    assert tiny._warm is not None
    tokenizer = tiny._warm.loaded.renderer.tokenizer
    output = tiny.run(task_with(tiny_dir, PROMPTS, max_tokens=5, logprobs=top, **options))
    for prompt, item in zip(PROMPTS, items_of(output), strict=True):
        for sample in item.get("outputs", [item]):
            tokens = [entry["id"] for entry in sample["logprobs"]]
            assert tokenizer.decode(tokens, skip_special_tokens=True) == sample["output"]
            for entry, logits in zip(sample["logprobs"], raw_logits(tiny, str(prompt), tokens), strict=False):
                expected = logits.log_softmax(-1)
                assert entry["logprob"] == pytest.approx(float(expected[entry["id"]]), abs=1e-4)
                assert entry["token"] == tokenizer.decode([entry["id"]])
                best = expected.topk(top)
                assert [each["id"] for each in entry["top"]] == best.indices.tolist()
                assert [each["logprob"] for each in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_end_token_has_a_log_probability_too(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    prompt = "What is the capital of France?"
    output = smollm.run(task_with(smollm_dir, [prompt], chat=True, max_tokens=24, logprobs=1))
    (item,) = items_of(output)
    usage = output.result["usage"]
    assert isinstance(usage, dict)
    assert len(item["logprobs"]) == usage["completion_tokens"]
    assert item["logprobs"][-1]["token"] == "<|im_end|>"
    assert item["output"] == "".join(entry["token"] for entry in item["logprobs"][:-1])
    assert all(entry["top"][0]["id"] == entry["id"] for entry in item["logprobs"])


def test_without_the_option_there_are_no_logprobs(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    (item,) = items_of(tiny.run(task_with(tiny_dir, ["a"], max_tokens=2)))
    assert not {"logprobs", "outputs"} & item.keys()
