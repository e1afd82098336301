"""What one warm engine does: children, adapters, bad input, cancel, several tasks at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from adapter_files import make_adapter
from executor_tasks import Adapters, Json, TaskMaker, adapter
from model_files import make_tiny_model
from pydantic import ValidationError
from recording_report import RecordingReport
from same_outputs import differences
from waiting_until import wait_until

from executors.contract import TaskOutput
from executors.errors import BadDataError, BadSpecError, TaskCancelledError
from executors.inference.on_transformers.text_generation import TextGeneration
from executors.inference.on_vllm.vllm_generation import VllmGeneration

if TYPE_CHECKING:
    from executors.inference.on_vllm.vllm_link import VllmLink

pytestmark = pytest.mark.vllm

NEAR = 0.01
"""The engine computes in float32. Over 30 layers its rounding adds up to some 0.0001 in a log probability."""

PROMPTS = ["Once upon a time", "The three largest cities are", "A recipe for bread:", "1 2 3 4"]
LONG: Json = {"items": [f"Chapter {number}. Once" for number in range(24)], "max_tokens": 40}
"""Three times as many prompts as run at once here, so that some are finished long before the last has begun."""


def items(output: TaskOutput) -> list[Json]:
    found: list[Json] = output.result["items"]
    return found


def link_of(executor: VllmGeneration) -> VllmLink:
    assert executor._loaded is not None
    return executor._loaded.link


def processes() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def unfinished(executor: VllmGeneration) -> int:
    count: int = link_of(executor)._llm.get_num_unfinished_requests()
    return count


@pytest.fixture
def plain(loaded: VllmGeneration, tasks: TaskMaker) -> Callable[[], list[Json]]:
    """Runs the same task without adapters again."""
    return lambda: items(loaded.run(tasks.task(PROMPTS, max_tokens=16, logprobs=2)))


def test_children_get_what_they_would_get_alone(loaded: VllmGeneration, tasks: TaskMaker):
    children: dict[str, Json] = {
        "poet": {"items": ["Rain.", "Snow."], "system_prompt": "You are a poet."},
        "cook": {"items": ["Bread?"], "system_prompt": "You are a cook."},
        "judge": {"items": ["Is it just?"], "system_prompt": "Answer yes or no."},
    }
    common: Json = {"chat": True, "max_tokens": 32, "logprobs": 2}

    merged = loaded.run(tasks.task(["Hello!"], children=children, **common))

    assert not differences(items(merged), items(loaded.run(tasks.task(["Hello!"], **common))), near=NEAR)
    for child, fields in children.items():
        alone = loaded.run(tasks.task(**common, **fields))
        result = merged.children[child].result
        assert result is not None
        assert not differences(result["items"], items(alone), near=NEAR)
        assert merged.result["children"][child]["items"] == result["items"]
        assert str(fields["system_prompt"]) in result["items"][0]["prompt"]


def test_adapters_change_while_the_engine_stays(
    loaded: VllmGeneration, tasks: TaskMaker, adapters: Adapters, plain: Callable[[], list[Json]]
):
    link, running, before = link_of(loaded), processes(), plain()

    def with_adapters(*entries: Json) -> list[Json]:
        return items(loaded.run(tasks.task(PROMPTS, max_tokens=16, logprobs=2, adapters=[*entries])))

    first, second = adapter(adapters.first, name="one"), adapter(adapters.second, name="two")
    said = {"first": with_adapters(first), "second": with_adapters(second), "both": with_adapters(first, second)}
    texts = {name: tuple(item["output"] for item in found) for name, found in said.items()}
    assert len({*texts.values(), tuple(item["output"] for item in before)}) == 4
    assert not differences(plain(), before, near=NEAR)
    assert not differences(with_adapters(first), said["first"], near=NEAR)
    assert not differences(with_adapters(second), said["second"], near=NEAR)
    assert not differences(with_adapters(second, first), said["both"], near=NEAR)
    assert not differences(with_adapters({**first, "scale": 0}), before, near=NEAR)
    # The same adapter in half, twice.
    halves = [{**first, "scale": 0.5}, {**first, "scale": 0.5, "name": "again"}]
    assert not differences(with_adapters(*halves), said["first"], near=NEAR)

    numbers = list(loaded._adapter_numbers.values())
    assert len(numbers) == len(set(numbers)) >= 4
    assert all(number > 0 for number in numbers)
    assert link_of(loaded) is link
    assert processes() == running


def test_several_adapters_act_as_if_all_were_merged_into_the_weights(
    loaded: VllmGeneration, tasks: TaskMaker, adapters: Adapters
):
    folders = [adapters.first, adapters.second]
    fields: Json = {"items": PROMPTS, "max_tokens": 16, "logprobs": 2}
    merging = tasks.task(adapters=[adapter(folder, apply="merge") for folder in folders], **fields)
    merged = TextGeneration()
    merged.load(merging)

    ours = loaded.run(tasks.task(adapters=[adapter(folder) for folder in folders], **fields))

    assert not differences(items(ours), items(merged.run(merging)), near=NEAR)


def test_a_prompt_beyond_the_context_fails_alone(loaded: VllmGeneration, tasks: TaskMaker):
    output = loaded.run(tasks.task(["too " * 1100, "Fine", "", "long " * 1000], max_tokens=100))
    long, fine, empty, almost = items(output)
    assert "fewer than the model's context of 1024" in long["error"]
    assert (long["finish_reason"], long["output"]) == ("error", "")
    assert "empty" in empty["error"]
    assert "error" not in fine
    assert "error" not in almost
    assert almost["finish_reason"] in {"length", "stop"}
    assert any("2 of 4 prompts" in warning for warning in output.warnings)


def test_no_prompt_that_can_run_is_bad_data(loaded: VllmGeneration, tasks: TaskMaker):
    with pytest.raises(BadDataError, match="none of the 2 prompts"):
        loaded.run(tasks.task(["", "too " * 1100]))
    with pytest.raises(ValidationError, match="'items' is missing or empty"):
        tasks.task([])


@pytest.mark.parametrize(
    "guided",
    [
        {"json": {"type": "nonsense"}},
        {"json": {"$ref": "#/nowhere"}},
        {"regex": "[0-9"},
        {"grammar": "root ::= missing"},
    ],
)
def test_a_structure_that_cannot_be_built_is_the_tasks_fault(
    loaded: VllmGeneration, tasks: TaskMaker, plain: Callable[[], list[Json]], guided: Json
):
    before = plain()
    with pytest.raises(BadSpecError, match=r"spec\.inference\.guided"):
        loaded.run(tasks.task(["A number?"], guided=guided, max_tokens=8))
    assert not differences(plain(), before, near=NEAR)


def test_adapters_that_do_not_fit_are_refused_by_name(
    loaded: VllmGeneration, tasks: TaskMaker, smollm: Path, tmp_path: Path, plain: Callable[[], list[Json]]
):
    before = plain()
    tiny = make_tiny_model(tmp_path / "tiny")
    foreign = make_adapter(tiny, tmp_path / "foreign")
    large = make_adapter(smollm, tmp_path / "large", rank=32)
    damaged = make_adapter(smollm, tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for folder, words in (
        (foreign, r"'a' does not belong to the model .* The adapter was made for .*tiny"),
        (large, r"'a' has rank 32, above the limit of 16"),
        (damaged, r"'a' cannot be used: .*adapter_model\.safetensors"),
    ):
        with pytest.raises(BadSpecError, match=words):
            loaded.run(tasks.task(["x"], adapters=[adapter(folder, name="a")]))
    assert not differences(plain(), before, near=NEAR)


def test_arguments_of_the_engine(loaded: VllmGeneration, tasks: TaskMaker):
    output = loaded.run(tasks.task(["x"], max_tokens=2))
    assert "spec.model.vllm.kv_cache_memory_bytes is passed to vLLM as it is" in output.warnings
    assert "spec.model.vllm.swap_space is ignored: vLLM has no engine argument of that name" in output.warnings
    with pytest.raises(ValidationError, match="'worker_cls' could make the engine run code"):
        tasks.task(["x"], vllm={"worker_cls": "os.system"})
    with pytest.raises(ValidationError, match="the same output each time"):
        tasks.task(["x"], n=2)


def test_a_cancel_frees_the_engine_at_once(loaded: VllmGeneration, tasks: TaskMaker, plain: Callable[[], list[Json]]):
    before = plain()
    report = RecordingReport()
    long = tasks.task([f"{number}. Once" for number in range(64)], max_tokens=900, report=report)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loaded.run, long)
        assert report.begun.wait(60)
        spent = time.monotonic() - started
        tokens = report.tokens
        report.cancel()
        with pytest.raises(TaskCancelledError):
            running.result(timeout=10)
    wait_until(lambda: unfinished(loaded) == 0, "no request is left", within_sec=5)

    started = time.monotonic()
    assert not differences(plain(), before, near=NEAR)

    # The rest of the cancelled task at the speed it had, were it still running; a tenth is already far too long.
    rest_sec = (64 * 900 - tokens) / tokens * spent
    assert time.monotonic() - started < rest_sec / 10


def test_a_cut_off_run_goes_on_where_it_was(loaded: VllmGeneration, tasks: TaskMaker, tmp_path: Path):
    whole = loaded.run(tasks.task(**LONG, logprobs=2))
    report, folder = RecordingReport(), tmp_path / "cut"
    folder.mkdir()
    partial = folder / "responses.partial.jsonl"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loaded.run, tasks.task(**LONG, logprobs=2, report=report, folder=folder))
        wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 3, "some prompts are finished")
        report.cancel()
        with pytest.raises(TaskCancelledError):
            running.result(timeout=10)
    finished = partial.read_bytes().count(b"\n") - 1  # the first line says what the others belong to
    assert 3 <= finished < 24

    second = RecordingReport()
    output = loaded.run(tasks.task(**LONG, logprobs=2, resume=True, report=second, folder=folder))

    assert second.told[0] == (finished, 24)
    assert second.told[-1] == (24, 24)
    assert not differences(items(output), items(whole), near=NEAR)
    assert not [warning for warning in output.warnings if "responses.partial.jsonl" in warning]
    third = RecordingReport()
    changed = {**LONG, "max_tokens": 8}
    again = loaded.run(tasks.task(**changed, logprobs=2, resume=True, report=third, folder=folder))
    assert third.told[0] == (0, 24)
    assert any("belongs to other data, settings" in warning for warning in again.warnings)


def test_tasks_of_several_threads_run_in_the_same_steps(loaded: VllmGeneration, tasks: TaskMaker, adapters: Adapters):
    fields: list[Json] = [
        {"items": [PROMPTS[0]], "max_tokens": 200},
        {"items": [PROMPTS[1]], "max_tokens": 16},
        {"items": [PROMPTS[2]], "max_tokens": 16, "adapters": [adapter(adapters.first)]},
        {"items": [PROMPTS[3]], "max_tokens": 16, "chat": True},
    ]
    alone = [items(loaded.run(tasks.task(**each, logprobs=2))) for each in fields]
    order: list[int] = []

    def run(place: int) -> list[Json]:
        found = items(loaded.run(tasks.task(**fields[place], logprobs=2)))
        order.append(place)
        return found

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(run, 0)
        wait_until(lambda: unfinished(loaded), "the long task is in the engine")
        others = [pool.submit(run, place) for place in (1, 2, 3)]
        together = [each.result(timeout=120) for each in (first, *others)]
    assert order[-1] == 0, "the long task was first to begin, and the others did not wait for it"
    for one, twin in zip(alone, together, strict=True):
        assert not differences(one, twin, near=NEAR)
