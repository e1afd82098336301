"""`taskType: word_count` counts the words of some texts. An example of an executor in a distribution of its own."""

from __future__ import annotations

from pydantic import Field

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.task_spec import SpecSection, TaskSpec


class WordCountData(SpecSection):
    """`data`: the texts."""

    items: tuple[str, ...] = Field(min_length=1)


class WordCountSpec(TaskSpec):
    """What a task may hold beside the common part. `ignore` names words that do not count."""

    data: WordCountData
    ignore: tuple[str, ...] = ()


class WordCount(Executor[WordCountSpec]):
    """Counts words; what stands in for a model is the set of words to ignore."""

    spec_type = WordCountSpec
    exclusive = False  # needs no GPU, so it may live beside a warm model

    @classmethod
    def engine_key(cls, spec: WordCountSpec) -> str:
        """Name what `load` loads: tasks that ignore the same words share one warm engine."""
        return ",".join(sorted(spec.ignore))

    def load(self, task: ExecutorTask[WordCountSpec]) -> None:
        """Load what the key names. Heavy libraries are imported here, never at the top of the module."""
        self._ignored = {word.lower() for word in task.spec.ignore}

    def run(self, task: ExecutorTask[WordCountSpec]) -> TaskOutput:
        """Count, and tell how far we are."""
        texts = task.spec.data.items
        counts = []
        for number, text in enumerate(texts, start=1):
            task.report.raise_if_cancelled()
            counts.append(sum(word.lower() not in self._ignored for word in text.split()))
            task.report.progress(number, len(texts), unit="texts")
        (task.out_dir / "artifacts" / "counts.csv").write_text("\n".join(map(str, counts)) + "\n")
        return TaskOutput(result={"ok": True, "items": [{"words": count} for count in counts], "total": sum(counts)})
