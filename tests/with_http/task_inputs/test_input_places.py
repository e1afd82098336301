"""Inputs on the disk: where they are looked for, in which order, and what may be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from input_world import NAME, World, adapter, archive, checkpoint, jsonl, marker_of, model_folder, put

from executors.input_spec import InputRequest

# Where things are looked for, and in which order.


async def test_path_then_task_then_url(world: World):
    path = model_folder(world.results / "elsewhere" / "model", "path")
    of_task = model_folder(world.results / "77aa" / "final_model", "task")
    keys = {"path": str(path), "taskId": "77aa", "url": put(world, archive("url"))}
    assert await world.checkpoint(**keys) == path
    remove(path)
    assert await world.checkpoint(**keys) == of_task
    remove(of_task)
    assert world.statuses == []
    assert marker_of(await world.checkpoint(**keys)) == "url"
    assert world.statuses == [200]


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


async def test_all_failing_lists_all(world: World):
    (world.results / "77aa").mkdir()
    failure = await world.failure(
        checkpoint(path="/data/w/77aa/final_lora", taskId="77aa", url=world.orch.file_url("77aa", "x.tar.gz"))
    )
    assert (failure.reason, failure.retryable) == ("input_failed", True)
    assert failure.message.startswith(
        "checkpoint.load cannot be had: path '/data/w/77aa/final_lora' lies outside the folders this worker may read"
    )
    assert "; taskId '77aa' has nothing with config.json" in failure.message
    assert "final_model, final_model.bin, final_model.safetensors, final_model.pt, final_lora" in failure.message
    assert f"GET {world.orch.file_url('77aa', 'x.tar.gz')}" in failure.message
    assert "404" in failure.message
    assert "WORKER_ALLOWED_ROOTS" in failure.hint


@pytest.mark.parametrize(
    "place", ["final_model", "final_lora", "checkpoints/final_model", "checkpoints/final_lora", "."]
)
async def test_places_in_a_tasks_folder(world: World, place: str):
    folder = world.results / "77aa" / place
    made = model_folder(folder / "x").parent if place == "." else model_folder(folder)
    for file in (folder / "x").glob("*"):
        file.rename(folder / file.name)
    assert await world.checkpoint(taskId="77aa") == made.resolve()


@pytest.mark.parametrize("name", ["final_model.bin", "final_model.safetensors", "final_model.pt"])
async def test_a_lone_weights_file_in_a_tasks_folder(world: World, name: str):
    (world.results / "77aa").mkdir()
    (world.results / "77aa" / name).write_bytes(b"weights")
    assert await world.checkpoint(taskId="77aa") == world.results / "77aa" / name


async def test_an_empty_folder_does_not_count(world: World):
    (world.results / "77aa" / "final_model").mkdir(parents=True)
    made = model_folder(world.results / "77aa" / "checkpoints" / "final_model")
    assert await world.checkpoint(taskId="77aa") == made


async def test_an_adapter_is_found_level_by_level(world: World):
    for place in ("a/deep/er", "b/first", "b/second"):
        folder = world.results / "77aa" / "final_lora" / place
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    found = await world.fetch(adapter(taskId="77aa"))
    assert found == {"model.adapters[0]": world.results / "77aa" / "final_lora" / "b" / "first"}


async def test_relative_jsonl_paths(world: World):
    places = [world.results / "t1" / "in" / "x.jsonl", world.results / "t1" / "x.jsonl", world.results / "x.jsonl"]
    request = jsonl(path="in/x.jsonl")
    out_dir = world.results / "t1"
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    assert await world.fetch(request) == {"data.jsonl": places[0]}
    places[0].unlink()
    assert await world.fetch(request) == {"data.jsonl": places[2]}, "the parent of the task's folder"
    places[2].unlink()
    assert "does not exist here" in (await world.failure(request)).message
    assert out_dir.exists()


async def test_jsonl_of_a_task_by_its_name(world: World):
    file = world.results / "77aa" / "artifacts" / "rows.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert await world.fetch(jsonl(taskId="77aa", filename="rows.jsonl")) == {"data.jsonl": file}
    assert await world.fetch(jsonl(taskId="77aa", path="/gone/rows.jsonl")) == {"data.jsonl": file}


# What may be read.


@pytest.mark.parametrize("hidden", [".worker", ".cache"])
async def test_the_daemons_own_folders_are_not_readable(world: World, hidden: str):
    model_folder(world.results / hidden / "w" / "model")
    (world.results / "link").symlink_to(world.results / hidden)
    for path in (
        f"{hidden}/w/model",
        str(world.results / hidden / "w" / "model"),
        "link/w/model",
        f"x/../{hidden}/w/model",
    ):
        assert "lies outside the folders" in (await world.failure(checkpoint(path=path))).message
    (world.results / hidden / "w" / "x.jsonl").write_text("{}")
    assert "lies outside the folders" in (await world.failure(jsonl(path=f"../{hidden}/w/x.jsonl"))).message


async def test_links_and_dots_do_not_lead_out(world: World, tmp_path: Path):
    outside = model_folder(tmp_path / "outside")
    (world.results / "77aa").mkdir()
    (world.results / "77aa" / "final_model").symlink_to(outside)
    for keys in ({"path": "77aa/final_model"}, {"path": "../outside"}, {"taskId": "77aa"}, {"path": str(outside)}):
        assert "lies outside the folders" in (await world.failure(checkpoint(**keys))).message
    allowing = world.again(worker_allowed_roots=(outside,))
    assert await allowing.checkpoint(taskId="77aa") == outside
    await allowing.aclose()


@pytest.mark.parametrize("task_id", ["../x", ".worker", "a/b", "", "."])
async def test_a_hostile_task_id_is_refused_here_too(world: World, task_id: str):
    """Executors of other distributions may make requests by themselves."""
    failure = await world.failure(InputRequest(name=NAME, kind="checkpoint", task_id=task_id, paths=("\0",)))
    assert failure.reason == "input_failed"
    assert not failure.retryable


@pytest.mark.parametrize("path", ["x\0y", "a" * 5000, "\ud83d"])
async def test_odd_paths_are_a_clear_failure(world: World, path: str):
    request = InputRequest(name=NAME, kind="checkpoint", paths=(path,))
    assert (await world.failure(request)).message.startswith("checkpoint.load cannot be had: path ")


@pytest.mark.parametrize("path", ["a" * 5_000_000, "/" + "a" * 5_000_000, "a/" * 1_000_000, "\0" * 1_000_000])
async def test_long_paths_make_no_long_errors(world: World, path: str):
    for kind in ("checkpoint", "file"):
        request = InputRequest(
            name=NAME, kind=kind, paths=(path,), task_id="77aa", filename=path, url=f"http://127.0.0.1:1/{path}"
        )
        assert len((await world.failure(request)).message) < 3000


async def test_only_ordinary_files_of_the_right_kind(world: World):
    (world.results / "77aa").mkdir()
    (world.results / "77aa" / "notes.txt").write_text("x")
    for keys, part in (
        ({"path": "77aa"}, "holds notes.txt; expected config.json"),
        ({"path": "77aa/notes.txt"}, "neither an archive nor a weights file"),
    ):
        assert part in (await world.failure(checkpoint(**keys))).message
    assert "is a folder; expected a file" in (await world.failure(jsonl(path="77aa"))).message
    assert "single file" in (await world.failure(adapter(path="77aa/notes.txt"))).message
    assert "neither a folder nor an ordinary file" in (await world.failure(jsonl(path=str(fifo(world))))).message


def fifo(world: World) -> Path:
    place = world.results / "77aa" / "pipe"
    os.mkfifo(place)
    return place
