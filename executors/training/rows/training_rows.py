"""`spec.data` to the data set that a trainer gets: read, checked and written to a file of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from executors.errors import BadDataError
from executors.training.rows.preference_rows import preference_shape
from executors.training.rows.prompt_rows import prompt_shape
from executors.training.rows.raw_rows import RawRows, open_rows
from executors.training.rows.row_cells import BadRowError, Message, listed
from executors.training.rows.row_problems import RowProblems
from executors.training.rows.row_shapes import RowShape, Shaped, text_shape
from executors.training.spec.training_data_spec import PreferenceData, PromptData, TextData, TrainingData
from executors.training.training_run import TrainingRun

if TYPE_CHECKING:
    import datasets

_MOST_CHARACTERS: Final = 32 * 2**20
"""Of rows that wait in memory to be written."""
_JSONL_HINT: Final = "data.jsonl's *_field keys name what is read from each line; blank lines are skipped."


def read_rows(run: TrainingRun, scratch: Path) -> datasets.Dataset:
    """Read the rows of a run: split, then shuffled, then cut to `max_samples`. All ranks get the same.

    sft and lora_sft get the column `text`, or `messages`, or `prompt` and `completion` where
    `training.trl.completion_only_loss` is true; dpo `prompt`, `chosen`, `rejected`; reward the same, without `prompt`
    where there is none; ppo and grpo `prompt` and the other columns as text. A column holds texts or conversations.

    Args:
        run: the rank's view of the run.
        scratch: an existing folder of this rank alone, to be kept until the training ends: the rows, and what the
            trainer makes of them, lie there and not in memory.

    Raises:
        BadSpecError: a path outside the allowed roots, a folder without data files, texts where prompts with
            responses are needed.
        BadDataError: no rows, unreadable data, a missing column, a row that cannot be used.
        MissingLibraryError: `datasets` is not installed.
    """
    data = run.spec.data
    with tempfile.TemporaryDirectory(dir=scratch, prefix="opened-") as cache:
        rows = open_rows(data, run.inputs, run.policy, cache)
        order = _order(data, len(rows))
        if not order:
            raise _nothing(rows, data)
        shape = _shape(run, rows, order[0])
        written = _write(_made(rows, order, shape), shape, Path(tempfile.mkdtemp(dir=scratch, prefix="rows-")))
    if not len(written):
        raise _nothing(rows, data)
    if run.is_first:
        for note in (*_notes(run, len(written)), *shape.notes()):
            run.tell.warn(note)
    return written


def clipped_batch(run: TrainingRun, rows: datasets.Dataset) -> int:
    """The batch of one device, at most its share of the rows; a smaller one than asked for is told to the sender."""
    asked = run.job.batch_size
    batch = max(1, min(asked, len(rows) // run.world_size))
    if batch < asked and run.is_first:
        run.tell.warn(
            f"training.batch_size {asked} is more than there are rows for each device; it is lowered to {batch} "
            f"({len(rows)} rows, {run.world_size} devices)"
        )
    return batch


def describe(rows: datasets.Dataset) -> str:
    """How many rows of what, for the model card."""
    return f"{len(rows)} rows with {listed(rows.column_names)}"


def _order(data: TrainingData, size: int) -> Sequence[int]:
    if not data.shuffle:
        return range(size)[: data.max_samples]
    import numpy as np

    order: list[int] = np.random.default_rng(data.seed).permutation(size)[: data.max_samples].tolist()
    return order


def _shape(run: TrainingRun, rows: RawRows, first: int) -> RowShape:
    data = run.spec.data
    if isinstance(data, TextData):
        return text_shape(data, rows, split=run.spec.training.trl.get("completion_only_loss") is True)
    if isinstance(data, PreferenceData):
        return preference_shape(data, rows, first, needs_prompt=run.spec.kind == "dpo")
    if isinstance(data, PromptData):
        return prompt_shape(data, rows, first)
    raise TypeError(f"unknown kind of data: {type(data).__name__}")


def _made(rows: RawRows, order: Sequence[int], shape: RowShape) -> Iterator[Shaped]:
    problems = RowProblems(rows.name, hint=_JSONL_HINT if rows.name.startswith("spec.data.jsonl") else "")
    for place, row in rows.read(order, shape.wanted):
        try:
            made = shape.make(row)
        except BadRowError as error:
            problems.add(place, error)
        else:
            if made is not None:
                yield made
    problems.raise_if_any()


def _write(made: Iterator[Shaped], shape: RowShape, folder: Path) -> datasets.Dataset:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    text = datasets.Value("string")
    conversation = datasets.List({"role": text, "content": text})
    features = datasets.Features({name: conversation if talks else text for name, talks in shape.columns.items()})
    path = folder / "rows.arrow"
    with path.open("wb") as file, ArrowWriter(stream=file, features=features) as writer:
        waiting = 0
        for row in made:
            writer.write(row)
            waiting += sum(map(_characters, row.values()))
            if waiting > _MOST_CHARACTERS:
                writer.write_examples_on_file()
                waiting = 0
        writer.finalize()
    return datasets.Dataset.from_file(str(path))


def _characters(cell: str | list[Message] | None) -> int:
    if isinstance(cell, list):
        return sum(len(message["content"]) for message in cell)
    return len(cell or "")


def _nothing(rows: RawRows, data: TrainingData) -> BadDataError:
    limit = "" if data.max_samples is None else f", max_samples {data.max_samples}"
    return BadDataError(
        f"{rows.name} gives no rows to train on ({len(rows)} read{limit}); expected at least one that is not blank",
        hint="Check the file, data.split and the columns.",
    )


def _notes(run: TrainingRun, size: int) -> Iterator[str]:
    data = run.spec.data
    if data.rows != "dataset" and data.split != "train":
        yield f"data.split {data.split!r} has no effect with data.{data.sources[0]}; it picks a part of data sets"
    batch, rounds = run.job.batch_size, run.job.gradient_accumulation_steps
    step = batch * rounds * run.world_size
    if step > size and run.spec.kind in {"sft", "lora_sft", "dpo", "reward"}:
        yield (
            f"one step takes {step} rows (batch_size {batch} x gradient_accumulation_steps {rounds} x {run.world_size} "
            f"devices), but there are {size}; each epoch is one short step"
        )
