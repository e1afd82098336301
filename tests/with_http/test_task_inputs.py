"""Inputs of tasks: found on the disk, fetched from a real HTTP server, unpacked for real, kept in the cache."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import structlog
from http_orchestrator import HttpOrchestrator
from pydantic import SecretStr
from waiting_until import wait_until

from executors.catalog import CatalogEntry
from executors.child_messages import ChildTask, RunTask
from executors.contract import Failure
from executors.input_spec import AdapterEntry, CheckpointLoad, InputRequest, JsonlSource
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy
from worker.input_cache import InputCache
from worker.settings import Settings
from worker.task_inputs import InputProgress, TaskInputs
from worker.task_preparation import Folder, PreparedTask, RejectedError

NAME = "checkpoint.load"
TOKEN = "token-of-the-orchestrator"


class World:
    """One worker's inputs beside a server. `again()` is the same worker, or another one, on the same disk."""

    def __init__(self, results: Path, orch: HttpOrchestrator, **changes: object) -> None:
        self.results = results
        self.orch = orch
        self.settings = Settings(
            redis_url=SecretStr("redis://127.0.0.1:1"),
            results_dir=results,
            orchestrator_base_url=orch.base_url,
            orchestrator_token=SecretStr(TOKEN),
            hf_home=results.parent / "hub",
            **changes,
        )
        policy = HttpPolicy(
            base_url=orch.base_url,
            token=self.settings.orchestrator_token,
            allowed_hosts=self.settings.worker_allowed_hosts,
        )
        self.link = HttpLink(policy)
        self.cache = InputCache(self.settings.input_cache, self.settings.worker_cache_max_bytes)
        self.inputs = TaskInputs(self.link, self.cache, self.settings)
        self.heard: list[InputProgress] = []

    async def aclose(self) -> None:
        await self.inputs.close()
        await self.link.aclose()

    def again(self, **changes: object) -> World:
        return World(self.results, self.orch, **changes)

    async def fetch(self, *requests: InputRequest, task_id: str = "t1") -> dict[str, Path]:
        order = await self.inputs.fetch(self.task(*requests, task_id=task_id), self.heard.append)
        return order.inputs

    async def checkpoint(self, task_id: str = "t1", **keys: object) -> Path:
        return (await self.fetch(checkpoint(**keys), task_id=task_id))[NAME]

    async def failure(self, *requests: InputRequest) -> Failure:
        with pytest.raises(RejectedError) as caught:
            await self.fetch(*requests)
        return caught.value.failure

    def task(
        self, *requests: InputRequest, task_id: str = "t1", children: dict[str, InputRequest] | None = None
    ) -> PreparedTask:
        given = children or {}
        out_dir = self.results / task_id
        of_children = tuple(ChildTask(task_id=name, spec={}, out_dir=self.results / name) for name in given)
        return PreparedTask(
            order=RunTask(task_id=task_id, spec={}, out_dir=out_dir, children=of_children),
            entry=CatalogEntry(kind="echo", target="x:Y"),
            engine_key="",
            exclusive=False,
            folder=Folder(out_dir, ()),
            child_folders={},
            failed_children={},
            warnings=[],
            timeout_sec=0,
            no_progress_sec=0,
            inputs=requests,
            child_inputs={name: (request,) for name, request in given.items()},
        )

    @property
    def entries(self) -> list[Path]:
        return [path for path in (self.results / ".cache").iterdir() if len(path.name) == 64]

    @property
    def leftovers(self) -> list[str]:
        return [path.name for path in (self.results / ".cache").iterdir() if path.name.startswith((".new", ".old"))]

    @property
    def statuses(self) -> list[int | None]:
        return [call.status for call in self.orch.seen("download")]


@pytest.fixture
def orch(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator", token=TOKEN) as running:
        yield running


@pytest.fixture
async def world(tmp_path: Path, orch: HttpOrchestrator) -> AsyncIterator[World]:
    (tmp_path / "results").mkdir()
    made = World(tmp_path / "results", orch)
    yield made
    await made.aclose()


def checkpoint(**keys: object) -> InputRequest:
    return CheckpointLoad.model_validate(keys).request(NAME)


def adapter(**keys: object) -> InputRequest:
    return AdapterEntry.model_validate(keys).request("model.adapters[0]")


def jsonl(**keys: object) -> InputRequest:
    return JsonlSource.model_validate(keys).request("data.jsonl")


def model_folder(folder: Path, marker: str = "local") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"marker": marker}))
    (folder / "model.safetensors").write_text("weights")
    return folder


def marker_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["marker"])


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def archive(marker: str = "fetched", top: str = "final_model/") -> bytes:
    content = json.dumps({"marker": marker}).encode()
    return tar_of({f"{top}config.json": content, f"{top}model.safetensors": b"weights " * 1000})


def put(world: World, content: bytes, task_id: str = "77aa", name: str = "final_model.tar.gz") -> str:
    return world.orch.put_file(task_id, name, content)


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


async def test_a_url_alone_that_is_refused_is_no_use_to_retry(world: World):
    failure = await world.failure(checkpoint(url=world.orch.file_url("77aa", "x.tar.gz")))
    assert not failure.retryable


@pytest.mark.parametrize("place", ["final_model", "final_lora", "checkpoints/final_model", "."])
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


async def test_an_adapter_out_of_an_archive(world: World):
    url = put(world, tar_of({"final_lora/inner/adapter_config.json": b"{}", "final_lora/README.md": b"x"}))
    (found,) = (await world.fetch(adapter(url=url))).values()
    assert [file.name for file in found.iterdir()] == ["adapter_config.json"]
    failure = await world.failure(adapter(url=put(world, archive(), name="other.tar.gz")))
    assert "holds no adapter_config.json" in failure.message


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


async def test_jsonl_over_http_is_never_unpacked_unless_told(world: World):
    content = tar_of({"rows.jsonl": b'{"a": 1}\n'})
    url = put(world, content, name="rows.tar.gz")
    (plain,) = (await world.fetch(jsonl(path=url))).values()
    assert plain.read_bytes() == content
    (unpacked,) = (await world.fetch(jsonl(path=url, archive_format="tar.gz"))).values()
    assert (unpacked.name, unpacked.read_bytes()) == ("rows.jsonl", b'{"a": 1}\n')
    several = put(world, archive(), name="several.tar.gz")
    failure = await world.failure(jsonl(path=several, archive_format="tgz"))
    assert "expected one file" in failure.message


async def test_a_relative_url_is_the_orchestrators(world: World):
    put(world, b"{}\n", name="rows.jsonl")
    (found,) = (await world.fetch(jsonl(url="/api/v1/results/77aa/files/rows.jsonl"))).values()
    assert found.read_bytes() == b"{}\n"


async def test_a_file_of_a_task_without_a_url(world: World):
    put(world, archive("built"), name="model v1.tar.gz")
    assert marker_of(await world.checkpoint(task_id="t1", taskId="77aa", filename="model v1.tar.gz")) == "built"
    lonely = World(world.results, world.orch)
    lonely.settings = lonely.settings.model_copy(update={"orchestrator_base_url": ""})
    lonely.inputs = TaskInputs(lonely.link, lonely.cache, lonely.settings)
    failure = await lonely.failure(checkpoint(taskId="77ab", filename="m.tar.gz"))
    assert "ORCHESTRATOR_BASE_URL is not set" in failure.message
    put(world, archive("other base"), name="m.tar.gz", task_id="77ab")
    found = await lonely.checkpoint(taskId="77ab", filename="m.tar.gz", base_url=f"{world.orch.base_url}/")
    assert marker_of(found) == "other base"
    await lonely.aclose()


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


async def test_hosts_that_are_not_allowed(world: World):
    strict = world.again(worker_allowed_hosts=("models.example",))
    failure = await strict.failure(checkpoint(url="http://user:secret-1@evil.example/x?k=secret-2"))
    assert "evil.example" in failure.message
    assert "secret" not in failure.message
    for url in ("ftp://h/x", "file:///etc/passwd", "http://", "http://[bad"):
        failure = await strict.failure(checkpoint(url=url))
        assert failure.reason == "input_failed"
        assert not failure.retryable
    await strict.aclose()


# The cache.


async def test_a_digest_needs_no_network(world: World):
    content = archive()
    url = put(world, content)
    digest = hashlib.sha256(content).hexdigest()
    first = await world.checkpoint(url=url, sha256=digest)
    world.orch.stop()
    other = world.again()
    assert await other.checkpoint(url=url, sha256=digest) == first
    assert await other.checkpoint(url="http://nowhere.invalid/y.tar.gz", sha256=digest.upper()) == first
    assert world.statuses == [200]
    await other.aclose()


async def test_a_wrong_digest_leaves_nothing(world: World):
    failure = await world.failure(checkpoint(url=put(world, archive()), sha256="0" * 64))
    assert "000000000000" in failure.message
    assert not failure.retryable
    assert world.entries == []
    assert world.leftovers == []


async def test_unchanged_is_not_sent_again(world: World):
    url = put(world, archive())
    first = await world.checkpoint(url=url)
    other = world.again()
    assert await other.checkpoint(url=url) == first
    assert world.statuses == [200, 304]
    await other.aclose()


async def test_changed_is_fetched_anew(world: World):
    url = put(world, archive("old"))
    first = await world.checkpoint(url=url)
    put(world, archive("new"))
    second = await world.checkpoint(url=url)
    assert (marker_of(first), marker_of(second)) == ("old", "new")
    assert world.statuses == [200, 200]
    assert await world.checkpoint(url=url) == second
    assert world.statuses == [200, 200, 304]


async def test_without_a_validator_it_is_fetched_each_time(world: World):
    url = put(world, b"{}" * 16, name="rows.jsonl")
    for _ in range(2):
        world.orch.lie("wrong_content")  # and without ETag
        await world.fetch(jsonl(url=url))
    assert world.statuses == [200, 200]
    assert ["if-none-match" in call.headers for call in world.orch.seen("download")] == [False, False]


async def test_a_damaged_entry_is_fetched_anew(world: World):
    url = put(world, archive())
    first = await world.checkpoint(url=url)
    world.inputs.release("t1")
    (entry,) = world.entries
    (entry / "entry.json").write_text("{")
    assert marker_of(await world.checkpoint(url=url)) == "fetched"
    assert world.statuses == [200, 200]
    assert first.exists()


async def test_equal_requests_of_children_are_fetched_once(world: World):
    request = checkpoint(url=put(world, archive()))
    task = world.task(
        request, children={"c1": request, "c2": checkpoint(url=put(world, archive("other"), name="o.tgz"))}
    )
    order = await world.inputs.fetch(task, world.heard.append)
    assert world.statuses == [200, 200]
    assert [child.task_id for child in order.children] == ["c1", "c2"]
    assert order.children[0].inputs == order.inputs
    assert marker_of(order.children[1].inputs[NAME]) == "other"


async def test_a_task_without_inputs_costs_nothing(world: World):
    task = world.task()
    assert await world.inputs.fetch(task, world.heard.append) is task.order
    world.inputs.prefetch(task)
    world.inputs.release("t1")
    assert not (world.results / ".cache").exists()


async def test_unused_entries_go_when_others_come(world: World):
    small = world.again(worker_cache_max_bytes=20_000)
    urls = [put(world, archive(str(number)), name=f"{number}.tar.gz") for number in range(4)]
    kept = await small.checkpoint(task_id="t0", url=urls[0])
    for number in (1, 2, 3):
        await small.checkpoint(task_id=f"t{number}", url=urls[number])
        small.inputs.release(f"t{number}")
    await small.aclose()
    assert len(world.entries) == 2
    assert kept.exists(), "it was in use"
    await world.checkpoint(url=urls[3])
    assert world.statuses == [200, 200, 200, 200, 304]


async def test_what_a_task_uses_stays(world: World):
    tiny = world.again(worker_cache_max_bytes=0)
    found = await tiny.checkpoint(url=put(world, archive()))
    await world.checkpoint(task_id="t2", url=put(world, archive("b"), name="b.tar.gz"))
    await tiny.cache.trim()
    assert marker_of(found) == "fetched"
    tiny.inputs.release("t1")
    await tiny.aclose()
    assert not found.exists()


async def test_a_full_disk_drops_unused_entries_first(world: World, monkeypatch: pytest.MonkeyPatch):
    await world.checkpoint(url=put(world, archive("old"), name="old.tar.gz"))
    world.inputs.release("t1")
    await world.inputs.close()
    content = bytes(3 * 1024**2)
    # Room for the new file alone.
    monkeypatch.setattr(
        world.cache, "free_bytes", lambda: len(content) if not world.entries else len(content) - 2 * 1024**2 - 1
    )
    found = await world.checkpoint(url=put(world, content, name="m.gguf"))
    assert found.stat().st_size == len(content)
    assert [entry.name for entry in world.entries] == [found.parents[1].name]


async def test_no_room_is_disk_full(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(world.cache, "free_bytes", lambda: 10)
    failure = await world.failure(checkpoint(url=put(world, bytes(3 * 1024**2), name="m.gguf")))
    assert (failure.reason, failure.retryable) == ("disk_full", True)
    assert world.entries == []
    assert world.leftovers == []


async def test_no_room_while_unpacking_is_disk_full(world: World, monkeypatch: pytest.MonkeyPatch):
    async def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("worker.input_fetching.unpack", full)
    failure = await world.failure(checkpoint(url=put(world, archive())))
    assert failure.reason == "disk_full"
    assert "No space left" in failure.message
    assert world.leftovers == []


# Archives.


def everything_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


async def test_a_zip_and_a_subdir(world: World):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/config.json", '{"marker": "a"}')
        file.writestr("b/model/config.json", '{"marker": "b"}')
    url = put(world, buffer.getvalue(), name="model.zip")
    assert marker_of(await world.checkpoint(url=url, subdir="b/model")) == "b"
    assert marker_of(await world.checkpoint(url=url, subdir="a")) == "a"
    assert world.statuses == [200, 304]
    assert "'c'" in (await world.failure(checkpoint(url=url, subdir="c"))).message
    assert "holds a, b; expected config.json" in (await world.failure(checkpoint(url=url))).message


async def test_a_local_archive_is_unpacked_once(world: World):
    file = world.results / "77aa" / "final_model.tar.gz"
    file.parent.mkdir()
    file.write_bytes(archive("one"))
    first = await world.checkpoint(path=str(file))
    assert await world.checkpoint(path="77aa/final_model.tar.gz", task_id="t2") == first
    assert len(world.entries) == 1
    assert file.exists()
    file.write_bytes(archive("two!"))
    assert marker_of(await world.checkpoint(path=str(file))) == "two!"
    assert "SHA-256" in (await world.failure(checkpoint(path=str(file), sha256="0" * 64))).message
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert marker_of(await world.checkpoint(path=str(file), sha256=digest)) == "two!"


async def test_an_unsafe_archive_is_refused(world: World):
    failure = await world.failure(checkpoint(url=put(world, tar_of({"../../../evil": b"x", "config.json": b"{}"}))))
    assert "../../../evil" in failure.message
    assert not failure.retryable
    assert not any(path.name == "evil" for path in everything_in(world.results.parent))
    assert world.entries == []
    assert world.leftovers == []


async def test_too_much_content_is_refused(world: World):
    strict = world.again(worker_unpack_max_bytes=1000)
    failure = await strict.failure(checkpoint(url=put(world, archive())))
    assert failure.reason == "input_failed"
    assert world.entries == []
    small = world.again(worker_download_max_bytes=50)
    failure = await small.failure(checkpoint(url=put(world, archive())))
    assert "WORKER_DOWNLOAD_MAX_BYTES" in failure.message
    for each in (strict, small):
        await each.aclose()


async def test_a_lone_weights_file(world: World):
    found = await world.checkpoint(url=put(world, b"GGUF...", name="m.gguf"))
    assert (found.name, found.read_bytes()) == ("m.gguf", b"GGUF...")
    named = await world.checkpoint(url=put(world, b"GGUF...", name="blob"), filename="n.gguf")
    assert named.name == "n.gguf"
    assert (
        "neither an archive nor a weights file"
        in (await world.failure(checkpoint(url=put(world, b"<html>", name="page")))).message
    )
    assert (
        "zip" in (await world.failure(checkpoint(url=put(world, b"GGUF", name="x.gguf"), archive_format="zip"))).message
    )


# Together and ahead.


def in_flight(world: World) -> Callable[[], bool]:
    return lambda: len(world.orch.seen("download")) > 0


async def begun(world: World) -> None:
    await asyncio.to_thread(wait_until, in_flight(world), "the download has begun")


async def test_a_prefetch_is_joined(world: World):
    world.orch.hang("download")
    task = world.task(checkpoint(url=put(world, archive())))
    world.inputs.prefetch(task)
    await begun(world)
    fetching = asyncio.create_task(world.inputs.fetch(task, world.heard.append))
    await asyncio.sleep(0)
    world.orch.release()
    order = await fetching
    assert marker_of(order.inputs[NAME]) == "fetched"
    assert len(world.statuses) == 1
    assert {progress.name for progress in world.heard} == {NAME}
    assert world.heard[-1].done_bytes == world.heard[-1].total_bytes


async def test_a_prefetch_that_is_over_needs_no_second_look(world: World):
    task = world.task(checkpoint(url=put(world, archive())))
    world.inputs.prefetch(task)
    await asyncio.to_thread(
        wait_until, lambda: world.entries if (world.results / ".cache").exists() else [], "it is here"
    )
    order = await world.inputs.fetch(task, world.heard.append)
    assert marker_of(order.inputs[NAME]) == "fetched"
    assert world.statuses == [200]


async def test_a_failed_prefetch_is_forgotten(world: World):
    url = world.orch.file_url("77aa", "final_model.tar.gz")
    task = world.task(checkpoint(url=url))
    world.inputs.prefetch(task)
    await asyncio.to_thread(wait_until, lambda: world.statuses == [404], "it has failed")
    put(world, archive())
    order = await world.inputs.fetch(task, world.heard.append)
    assert marker_of(order.inputs[NAME]) == "fetched"


async def test_one_prefetch_at_a_time(world: World):
    world.orch.hang("download")
    world.inputs.prefetch(world.task(checkpoint(url=put(world, archive())), task_id="t1"))
    world.inputs.prefetch(world.task(checkpoint(url=put(world, archive(), name="b.tgz")), task_id="t2"))
    await begun(world)
    world.orch.release()
    assert await world.checkpoint(task_id="t1", url=world.orch.file_url("77aa", "final_model.tar.gz"))
    assert [call.path.rpartition("/")[2] for call in world.orch.seen("download")] == ["final_model.tar.gz"]


async def test_two_tasks_share_one_download(world: World):
    world.orch.hang("download")
    request = checkpoint(url=put(world, archive()))
    world.inputs.prefetch(world.task(request, task_id="t2"))
    await begun(world)
    fetching = asyncio.create_task(world.checkpoint(url=request.url))
    await asyncio.sleep(0)
    world.orch.release()
    path = await fetching
    assert await world.checkpoint(task_id="t2", url=request.url) == path
    assert len(world.statuses) == 1


async def test_a_cancelled_fetch_ends_its_download(world: World):
    world.orch.hang("download")
    fetching = asyncio.create_task(world.checkpoint(url=put(world, archive())))
    await begun(world)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert world.leftovers == []
    await asyncio.to_thread(wait_until, lambda: world.orch.seen("download")[0].done, "the connection is closed")
    world.orch.release()


async def test_a_cancelled_fetch_leaves_a_shared_download_alone(world: World):
    world.orch.hang("download")
    request = checkpoint(url=put(world, archive()))
    ahead = world.task(request, task_id="t2")
    world.inputs.prefetch(ahead)
    await begun(world)
    fetching = asyncio.create_task(world.checkpoint(url=request.url))
    await asyncio.sleep(0)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    world.orch.release()
    order = await world.inputs.fetch(ahead, world.heard.append)
    assert marker_of(order.inputs[NAME]) == "fetched"
    assert len(world.statuses) == 1


@pytest.mark.parametrize("way", ["forget", "close", "cancelled fetch"])
async def test_a_prefetch_can_be_ended(world: World, way: str):
    world.orch.hang("download")
    task = world.task(checkpoint(url=put(world, archive())))
    world.inputs.prefetch(task)
    await begun(world)
    if way == "forget":
        world.inputs.release("t1")
    elif way == "cancelled fetch":
        fetching = asyncio.create_task(world.inputs.fetch(task, world.heard.append))
        await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    else:
        await world.inputs.close()
    await asyncio.to_thread(wait_until, lambda: not world.leftovers, "nothing is left of it")
    world.orch.release()
    assert marker_of(await world.checkpoint(url=put(world, archive()))) == "fetched"


async def test_two_daemons_fetch_one_file_once(world: World):
    other = world.again()
    world.orch.hang("download")
    url = put(world, archive())
    first = asyncio.create_task(world.checkpoint(url=url))
    await begun(world)
    second = asyncio.create_task(other.checkpoint(url=url))
    world.orch.release()
    assert await first == await second
    assert world.statuses == [200, 304]
    await other.aclose()


async def test_a_broken_connection_is_resumed(world: World):
    content = bytes(range(256)) * 20_000
    url = put(world, content, name="m.gguf")
    world.orch.cut("download", after_bytes=2_000_000)
    found = await world.checkpoint(url=url)
    assert found.read_bytes() == content
    assert world.statuses == [200, 206]


# Secrets.


async def test_no_secret_is_written_or_said(world: World):
    url = put(world, archive()).replace("http://", "http://user:secret-1@") + "?key=secret-2"
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Key": "secret-3"}
    with structlog.testing.capture_logs() as logs:
        await world.checkpoint(url=url, headers=headers)
        missing = await world.failure(
            checkpoint(url=url.replace("final_model", "gone"), headers=headers, path="/no/such")
        )
        world.orch.fail("download", status=403, body=f"secret-2 {TOKEN} secret-3".encode())
        refused = await world.failure(checkpoint(url=url, headers=headers))
    written = [path for path in (world.results / ".cache").rglob("*") if path.is_file()]
    texts = [path.read_text(errors="replace") for path in written if path.name == "entry.json"]
    assert len(texts) == 1
    assert "key=***" in texts[0]
    for text in (*texts, *(str(path) for path in written), missing.message, refused.message, str(logs)):
        assert "secret-" not in text
        assert TOKEN not in text
    assert "404" in missing.message
    assert "403" in refused.message


async def test_the_token_goes_to_the_orchestrator_only(world: World, tmp_path: Path):
    with HttpOrchestrator(tmp_path / "stranger") as stranger:
        foreign = stranger.put_file("77aa", "m.gguf", b"weights")
        await world.checkpoint(url=foreign)
        await world.checkpoint(url=put(world, b"weights", name="m.gguf"))
        assert [call.headers.get("authorization") for call in stranger.requests] == [None]
    assert [call.headers.get("authorization") for call in world.orch.requests] == [f"Bearer {TOKEN}"]
