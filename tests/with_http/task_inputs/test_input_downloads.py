"""Inputs fetched from a real HTTP server: which URLs, what is unpacked and refused, which secrets stay secret."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import structlog
from http_orchestrator import HttpOrchestrator
from input_world import TOKEN, World, adapter, archive, checkpoint, jsonl, marker_of, put, tar_of

from worker.task_inputs import TaskInputs

# From where.


async def test_a_url_alone_that_is_refused_is_no_use_to_retry(world: World):
    failure = await world.failure(checkpoint(url=world.orch.file_url("77aa", "x.tar.gz")))
    assert not failure.retryable


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
    assert "needs ORCHESTRATOR_BASE_URL" in failure.message
    put(world, archive("other base"), name="m.tar.gz", task_id="77ab")
    found = await lonely.checkpoint(taskId="77ab", filename="m.tar.gz", base_url=f"{world.orch.base_url}/")
    assert marker_of(found) == "other base"
    await lonely.aclose()


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


async def test_a_broken_connection_is_resumed(world: World):
    content = bytes(range(256)) * 20_000
    url = put(world, content, name="m.gguf")
    world.orch.cut("download", after_bytes=2_000_000)
    found = await world.checkpoint(url=url)
    assert found.read_bytes() == content
    assert world.statuses == [200, 206]


# Archives and files.


def everything_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


async def test_an_adapter_out_of_an_archive(world: World):
    url = put(world, tar_of({"final_lora/inner/adapter_config.json": b"{}", "final_lora/README.md": b"x"}))
    (found,) = (await world.fetch(adapter(url=url))).values()
    assert [file.name for file in found.iterdir()] == ["adapter_config.json"]
    failure = await world.failure(adapter(url=put(world, archive(), name="other.tar.gz")))
    assert "holds no adapter_config.json" in failure.message


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
