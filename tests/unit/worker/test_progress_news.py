"""What is said of a task's progress, and how often."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from executors.child_messages import Progress
from orchestrator_client.messages import TaskEvent
from worker import progress_news
from worker.progress_news import ByteNews, ProgressNews


class Publisher:
    """Keeps what it is told to say."""

    def __init__(self) -> None:
        self.said: list[tuple[TaskEvent, Mapping[str, str]]] = []

    def task_progress(self, event: TaskEvent, fields: Mapping[str, str]) -> None:
        self.said.append((event, fields))

    @property
    def done(self) -> list[float]:
        return [event.payload["done"] for event, _ in self.said]  # type: ignore[misc]  # a number, as it was given


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_news, "time", made)
    return made


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


@pytest.fixture
def news(publisher: Publisher) -> ProgressNews:
    return ProgressNews("w-1", publisher)  # type: ignore[arg-type]  # all that is used of it


def progress(done: float, task_id: str = "t1", total: float | None = 10) -> Progress:
    return Progress(task_id=task_id, done=done, total=total)


def test_news_that_come_too_fast_are_dropped_but_the_last(clock: Clock, news: ProgressNews, publisher: Publisher):
    for done in (1, 2, 10, 10):
        news.tell("echo", progress(done))
    clock.now += 0.3
    news.tell("echo", progress(10))

    assert publisher.done == [1, 10, 10]


def test_tasks_do_not_silence_each_other(clock: Clock, news: ProgressNews, publisher: Publisher):
    del clock
    news.tell("echo", progress(1))
    news.tell("echo", progress(2, task_id="t2"))
    news.forget("t1")
    news.tell("echo", progress(3))

    assert publisher.done == [1, 2, 3]


def test_a_long_transfer_tells_bytes_and_an_estimate(clock: Clock, news: ProgressNews, publisher: Publisher):
    transfer = ByteNews(news, "t1", "sft", "uploading final_model.tar.gz")
    transfer.tell(10, 1000)
    clock.now += 2
    transfer.tell(250, 1000)

    [(event, fields)] = publisher.said
    assert event.payload["unit"] == "bytes"
    assert event.payload["metrics"] == {"eta_sec": 6.0, "bytes_per_sec": 125.0}
    assert fields["progress_message"] == "uploading final_model.tar.gz: 25%, 6 s left"
    assert (fields["progress_done"], fields["progress_total"]) == ("250", "1000")


def test_a_short_transfer_says_nothing(clock: Clock, news: ProgressNews, publisher: Publisher):
    transfer = ByteNews(news, "t1", "sft", "archiving final_model")
    clock.now += 0.9
    transfer.tell(1000, 1000)

    assert publisher.said == []


def test_a_transfer_of_unknown_length_tells_bytes_alone(clock: Clock, news: ProgressNews, publisher: Publisher):
    transfer = ByteNews(news, "t1", "sft", "fetching")
    clock.now += 5
    transfer.tell(7, None)

    assert publisher.said[0][0].payload["message"] == "fetching"
    assert publisher.said[0][1]["progress_total"] == ""
