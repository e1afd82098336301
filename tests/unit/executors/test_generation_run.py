"""A generation from spec to result, with an engine that only says how it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from executor_tasks import Json, TaskMaker
from recording_report import RecordingReport

from executors.contract import ExecutorTask, TaskOutput
from executors.errors import BadDataError, TaskCancelledError
from executors.inference.generation_pace import Pace
from executors.inference.generation_results import EngineFacts, Sample
from executors.inference.generation_run import Deliver, PromptRow, Task, run_generation
from executors.inference.inference_spec import InferenceSpec
from executors.inference.prompt_rendering import PromptRenderer


class Tokenizer:
    """One token for each character."""

    chat_template = "given"

    def __init__(self, template: Callable[[Any], str] = str) -> None:
        self._template = template
        self.seen = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        self.seen += 1
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: object, **_: object) -> str:
        return self._template(messages)


class Engine:
    """Answers with the task's temperature, but not to the prompts in `broken`."""

    facts = EngineFacts("none", "m", "cpu", "none")

    def __init__(self, tokenizer: Tokenizer | None = None, *, identity: str = "", broken: Sequence[str] = ()) -> None:
        self.renderer = PromptRenderer(cast("Any", tokenizer or Tokenizer()), frozenset(), None)
        self.identity = identity
        self.broken = broken
        self.ran: list[str] = []

    def generate(self, rows: Sequence[PromptRow], task: Task, pace: Pace, deliver: Deliver) -> None:
        del pace
        for row in rows:
            text = "".join(map(chr, row.ids))
            self.ran.append(text)
            sample = Sample(text=str(task.spec.inference.temperature), finish_reason="stop", tokens=1)
            deliver(row, "no luck" if text in self.broken else (sample,))


@pytest.fixture
def tasks(tmp_path: Path) -> TaskMaker:
    return TaskMaker(tmp_path, Path("acme/good"))


def merged(tasks: TaskMaker, child: Json, engine: Engine | None = None) -> TaskOutput:
    return run_generation(tasks.task(["a"], children={"kid": child, "other": {"items": ["c"]}}), engine or Engine())


@pytest.mark.parametrize(
    ("child", "told"),
    [
        ({"temperature": 0.9}, "spec.inference.temperature of this merged task is 0.9, but 0.0 in that of the task"),
        ({"max_tokens": 3}, "spec.inference.max_tokens of this merged task is 3, but 512 in"),
        ({"n_beams": {"a": 1}}, 'spec.inference.n_beams of this merged task is {"a": 1}, but null in'),
        ({"model": "acme/bad"}, 'spec.model.source.identifier of this merged task is "acme/bad", but "acme/good" in'),
        ({"api_token": "abc"}, "spec.inference.api_token of this merged task is ***, but *** in"),
        ({"adapters": [{"path": "/a"}]}, "spec.model.adapters of this merged task is [{"),
        ({"checkpoint": {"load": {"path": "/a"}}}, "spec.checkpoint.load of this merged task differs from that of"),
    ],
)
def test_a_child_that_asks_for_something_else_fails_alone(tasks: TaskMaker, child: Json, told: str):
    output = merged(tasks, {"items": ["b"], **child})
    failure = output.children["kid"].failure
    assert failure is not None
    assert failure.reason == "bad_spec"
    assert failure.message.startswith(told)
    assert output.children["other"].result is not None
    assert output.result["ok"] is True


def test_what_a_child_may_have_of_its_own(tasks: TaskMaker):
    child = {"items": ["b"], "shard": {"total": 2}, "system_prompt": "S", "resume": True, "chat": True}
    assert merged(tasks, child).children["kid"].failure is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            lambda messages: "".join(messages[0]["tool_calls"]),
            "prompt 0 does not fit the model's chat template: TypeError",
        ),
        (lambda _: "\ud800", "prompt 0 holds half a character (a lone surrogate): "),
    ],
)
def test_a_conversation_that_breaks_the_template_fails_its_child_alone(
    tasks: TaskMaker, template: Callable[[Any], str], told: str
):
    message = {"role": "user", "content": "x", "tool_calls": 5}
    engine = Engine(Tokenizer(template))
    output = merged(tasks, {"items": [[message]]}, engine)
    failure = output.children["kid"].failure
    assert failure is not None
    assert failure.reason == "bad_data"
    assert failure.message.startswith(told)
    assert output.children["other"].result is not None
    with pytest.raises(BadDataError, match="prompt 0"):
        run_generation(tasks.task([[message]]), engine)


def test_a_lack_of_memory_in_a_template_is_not_the_data(tasks: TaskMaker):
    def template(_: object) -> str:
        raise MemoryError

    with pytest.raises(MemoryError):
        run_generation(tasks.task([[{"role": "user", "content": "x"}]]), Engine(Tokenizer(template)))


@pytest.mark.parametrize("of_child", [False, True])
def test_a_cancel_is_heard_while_many_prompts_are_prepared(tasks: TaskMaker, *, of_child: bool):
    report = RecordingReport()
    tokenizer = Tokenizer()

    class Cancelling(Tokenizer):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            if tokenizer.seen == 100:
                report.cancel()
            return tokenizer(text)

    many: Json = {"items": ["b"] * 1000}
    task = tasks.task(["a"], children={"kid": many}, report=report) if of_child else tasks.task(**many, report=report)
    engine = Engine(Cancelling())
    with pytest.raises(TaskCancelledError):
        run_generation(task, engine)
    assert tokenizer.seen == 101
    assert engine.ran == []


def test_long_preparations_are_reported(tasks: TaskMaker, monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    class Slow(Tokenizer):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            nonlocal now
            now += 1 / 64
            return super().__call__(text)

    monkeypatch.setattr("executors.inference.prompt_rendering.time.monotonic", lambda: now)
    task = tasks.task(["a"] * 1000)
    run_generation(task, Engine(Slow()))
    told = cast("RecordingReport", task.report).told
    assert told.count((0, 1000)) == 7 + 1, "seven times in 15 seconds, and once when all are prepared"


def resumed(task: ExecutorTask[InferenceSpec], engine: Engine, **changes: Any) -> list[str]:  # noqa: ANN401 - fields
    """Run a task again, with changes to its spec; returns which prompts ran."""
    spec = InferenceSpec.model_validate(changes | {"data": {"items": ["a", "b"]}})
    engine.ran.clear()
    run_generation(replace(task, spec=spec), engine)
    return engine.ran


def test_what_has_failed_is_tried_again(tasks: TaskMaker):
    task = tasks.task(["a", "b"], resume=True)
    run_generation(task, Engine(broken=["a"]))
    engine = Engine()
    output = run_generation(task, engine)
    assert engine.ran == ["a"]
    items = cast("list[Json]", output.result["items"])
    assert [(item["output"], item.get("error")) for item in items] == [("0.0", None)] * 2


def test_another_revision_or_way_of_loading_is_another_run(tasks: TaskMaker):
    task, engine = tasks.task(["a", "b"]), Engine()
    inference = {"temperature": 0, "resume": True}
    sources: list[Json] = [
        {"model": {"source": {"identifier": "acme/good", "revision": "v1"}}},
        {"model": {"source": {"identifier": "acme/good", "revision": "v2"}}},
        {"model": {"source": {"identifier": "acme/good"}, "transformers": {"load_in_4bit": True}}},
        {"model": {"source": {"identifier": "acme/good"}, "vllm": {"quantization": "fp8"}}},
        {"checkpoint": {"load": {"path": "/a"}}},
        {"checkpoint": {"load": {"path": "/b"}}},
    ]
    for source in sources:
        assert resumed(task, engine, inference=inference, **source) == ["a", "b"], source
        assert resumed(task, engine, inference=inference, **source) == [], source


def test_another_token_for_the_download_is_the_same_run(tasks: TaskMaker):
    task, engine = tasks.task(["a", "b"]), Engine()
    for token, expected in (("one", ["a", "b"]), ("two", [])):
        entry = {"url": "https://host.example/a.tar", "headers": {"Authorization": token}}
        model = {"source": {"identifier": "acme/good"}, "adapters": [entry]}
        assert resumed(task, engine, inference={"resume": True}, model=model) == expected
