"""Depth of JSON lines, without a parser."""

import json
from pathlib import Path

import pytest

from executors.json_nesting import DEEPEST, find_deep_line

BRACKETS = "[{" * DEEPEST


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"text": BRACKETS}),
        json.dumps({"text": f'a "quoted" \\ {BRACKETS}', "more\\": BRACKETS}),
        json.dumps([{"a": [1]}] * DEEPEST),
        "[" * DEEPEST + "]" * DEEPEST,
        '"' + BRACKETS + '"',
    ],
)
def test_many_brackets_are_no_depth(line: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n" * 3)
    assert find_deep_line(path) is None


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a\\"b": "]]}}", "c":'])
def test_the_first_deep_line_is_found(opening: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": [1]}\n\n' + opening * (DEEPEST + 1) + "\n" + "[" * 5000)
    assert find_deep_line(path) == 3
