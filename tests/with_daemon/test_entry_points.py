"""The example executor of docs/adding-an-executor.md, found through its entry point."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from daemon_process import REPO, SUBJECTS
from daemon_world import World

EXAMPLE = REPO / "examples" / "word-count-executor"


@pytest.fixture
def example_path(tmp_path: Path) -> str:
    """What an installation would make of the example: its module and its metadata on the path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(tmp_path), str(EXAMPLE), str(SUBJECTS)])


def word_count(items: object, **fields: object) -> dict[str, object]:
    return {"taskType": "word_count", "data": {"items": items}, **fields}


def test_the_example_executor_runs_through_its_entry_point(world: World, example_path: str):
    world.start(PYTHONPATH=example_path)
    end = world.run(word_count(["the cat sat", "a dog"], ignore=["the", "A"]))
    assert end.ok
    assert end.result["items"] == [{"words": 2}, {"words": 1}]
    assert end.result["total"] == 3
    assert (end.folder / "artifacts" / "counts.csv").read_text() == "2\n1\n"
    assert world.run(word_count(["one"], ignore=["a", "the"])).result["timings"]["engine"] == "cold"
    assert world.run(word_count(["two"], ignore=["the", "a"])).result["timings"]["engine"] == "warm"


def test_the_example_executor_refuses_bad_input(world: World, example_path: str):
    world.start(PYTHONPATH=example_path)
    end = world.run(word_count([]))
    assert (end.ok, end.reason) == (False, "bad_spec")
    assert "spec.data.items is []" in end.error
    warned = world.run(word_count(["x"], ignores=["y"]))
    assert warned.result["warnings"] == ["unknown key 'spec.ignores' is ignored; did you mean 'spec.ignore'?"]


def test_without_its_distribution_the_kind_is_unknown(world: World):
    world.start()
    assert world.run(word_count(["x"])).reason == "unknown_task_type"
