"""Results and files reach a real HTTP orchestrator, or end with an error that says what to do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import psutil
import pytest
from http_orchestrator import HttpOrchestrator
from pydantic import SecretStr
from raw_peer import raw_peer

from orchestrator_client.errors import AddressError, RefusedError, TransferError
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy, Target, with_patience
from orchestrator_client.transfers.uploads import ResultBody, file_url, post_result, upload_file

NAME = "final_model.tar.gz"


def unheard(_sent: int, _total: int) -> None:
    pass


def unwatched(_error: TransferError, _pause: float) -> None:
    pass


def content_of(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(os.urandom(3_000_000))
    return path


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    path = tmp_path / "responses.json"
    path.write_text('\n{\n  "ok": true,\n  "text": "Grüße"\n}\n', encoding="utf-8")
    return path


def sending(
    link: HttpLink, orch: HttpOrchestrator, path: Path, timeout_sec: float = 20
) -> Callable[[], Awaitable[str]]:
    target = Target(orch.results_url, timeout_sec=timeout_sec)
    return lambda: upload_file(link, target, "task-1", path, NAME, unheard)


async def test_a_file_arrives_as_one_honest_part(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    heard: list[tuple[int, int]] = []
    url = await upload_file(
        link,
        Target(orch.results_url + "/", headers={"content-type": "application/json", "X-Team": "a"}),
        "task-1",
        archive,
        NAME,
        lambda sent, total: heard.append((sent, total)),
    )
    assert orch.file("task-1", NAME) == content_of(archive)
    assert url == orch.file_url("task-1", NAME)
    (call,) = orch.requests
    assert call.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert int(call.headers["content-length"]) == call.body_bytes
    assert "transfer-encoding" not in call.headers
    assert call.headers["x-team"] == "a"
    assert heard == sorted(heard)
    assert heard[-1] == (3_000_000, 3_000_000)


@pytest.mark.parametrize(
    ("name", "part_type"),
    [
        ("a.tar.gz", "application/gzip"),
        ("a.tgz", "application/gzip"),
        ("a.jsonl", "application/x-ndjson"),
        ("a.json", "application/json"),
        ("a.bin", "application/octet-stream"),
    ],
)
async def test_the_part_type_is_true(orch: HttpOrchestrator, link: HttpLink, tmp_path: Path, name: str, part_type: str):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    await upload_file(link, Target(orch.results_url), "t", path, name, unheard)
    assert orch.part_types == [part_type]


async def test_an_empty_file_arrives(orch: HttpOrchestrator, link: HttpLink, tmp_path: Path):
    (tmp_path / "empty").write_bytes(b"")
    await upload_file(link, Target(orch.results_url), "t", tmp_path / "empty", "empty", unheard)
    assert orch.file("t", "empty") == b""


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", 'a"b', "a\r\nb", "ä"])
async def test_a_name_that_nobody_takes_is_a_fault_of_ours(link: HttpLink, archive: Path, name: str):
    with pytest.raises(ValueError, match="no name for an uploaded file"):
        await upload_file(link, Target("http://127.0.0.1:1/x"), "t", archive, name, unheard)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("http://h/api/v1/results", "http://h/api/v1/results/t%2F1/files/a.bin"),
        ("http://u:p@h:8/r/", "http://h:8/r/t%2F1/files/a.bin"),
        ("http://h/r?tenant=a#x", "http://h/r/t%2F1/files/a.bin"),
    ],
)
def test_where_a_file_can_be_downloaded(url: str, where: str):
    assert file_url(Target(url), "t/1", "a.bin") == where


async def test_the_query_of_the_target_stays_behind_the_path(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    await upload_file(link, Target(f"{orch.results_url}?tenant=a"), "t", archive, NAME, unheard)
    assert (orch.requests[0].path, orch.requests[0].query) == ("/api/v1/results/t/files", "tenant=a")


async def test_a_result_arrives_with_everything(orch: HttpOrchestrator, link: HttpLink, result_file: Path):
    target = Target(orch.results_url, headers={"Content-type": "text/plain", "X-Team": "a"})
    await post_result(link, target, ResultBody("task-1", "worker-1", result_file, {"kind": "echo", "sizes": [1, 2]}))
    posted = orch.result("task-1")
    assert posted is not None
    assert posted["result"] == {"ok": True, "text": "Grüße"}
    assert (posted["worker_id"], posted["metadata"]) == ("worker-1", {"kind": "echo", "sizes": [1, 2]})
    assert orch.requests[0].headers["content-type"] == "application/json"
    assert int(orch.requests[0].headers["content-length"]) == orch.requests[0].body_bytes


async def test_the_method_is_the_specs(orch: HttpOrchestrator, link: HttpLink, result_file: Path):
    await post_result(link, Target(orch.results_url, method="put"), ResultBody("t", "w", result_file))
    assert orch.requests[0].method == "PUT"
    for method in ("GET", "DELETE"):
        with pytest.raises(RefusedError, match=method):
            await post_result(link, Target(orch.results_url, method=method), ResultBody("t", "w", result_file))


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", "text"])
async def test_what_is_no_object_is_not_posted(orch: HttpOrchestrator, link: HttpLink, tmp_path: Path, content: str):
    (tmp_path / "responses.json").write_text(content)
    with pytest.raises(RefusedError, match="no JSON object"):
        await post_result(link, Target(orch.results_url), ResultBody("t", "w", tmp_path / "responses.json"))
    assert orch.requests == []


async def test_a_missing_file_is_no_matter_of_the_network(link: HttpLink, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        await upload_file(link, Target("http://127.0.0.1:1/x"), "t", tmp_path / "gone", "gone", unheard)


async def test_a_file_that_shrinks_meanwhile_is_no_success(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    def shrink(_sent: int, _total: int) -> None:
        os.truncate(archive, 300_000)

    with pytest.raises(TransferError, match="it changed"):
        await upload_file(link, Target(orch.results_url), "t", archive, NAME, shrink)
    assert orch.file("t", NAME) is None


@pytest.mark.usefixtures("short_pauses")
async def test_cuts_at_every_tenth_end_with_the_right_bytes(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    for tenth in range(11):
        orch.cut("upload", after_bytes=max(3_000_000 * tenth // 10, 1))
    failures: list[TransferError] = []
    await with_patience(sending(link, orch, archive), 60, lambda error, _pause: failures.append(error))
    assert len(failures) == 11
    assert [call.status for call in orch.requests] == [None] * 11 + [200]
    assert orch.file("task-1", NAME) == content_of(archive)


@pytest.mark.usefixtures("short_pauses")
async def test_what_may_pass_is_tried_again(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    statuses = [408, 425, 429, 500, 502, 503, 504]
    for status in statuses:
        orch.fail("upload", status=status)
    orch.hang("upload")
    orch.cut("upload", after_bytes=0, stored=True)
    await with_patience(sending(link, orch, archive, timeout_sec=0.5), 60, unwatched)
    assert [call.status for call in orch.requests] == [*statuses, None, None, 200]
    assert orch.file("task-1", NAME) == content_of(archive)


async def test_a_refused_connection_may_be_taken_later(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    orch.stop()

    def back_again(_error: TransferError, _pause: float) -> None:
        orch.start()

    await with_patience(sending(link, orch, archive), 60, back_again)
    assert orch.file("task-1", NAME) == content_of(archive)


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_the_peer_says_how_long_it_wants_to_be_left_alone(
    orch: HttpOrchestrator, link: HttpLink, archive: Path, form: str
):
    when = "30" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    orch.fail("upload", status=429, headers={"Retry-After": when})
    with pytest.raises(TransferError, match="429 Too Many Requests") as caught:
        await sending(link, orch, archive)()
    assert caught.value.retry_after_sec == pytest.approx(30, abs=3)


@pytest.mark.parametrize(
    ("status", "step"),
    [
        (400, "peer's log"), (401, "ORCHESTRATOR_TOKEN"), (403, "ORCHESTRATOR_TOKEN"), (404, "RESULTS_UPLOAD_URL"),
        (413, "too large"), (422, "peer's log"),
    ],
)  # fmt: skip
async def test_a_refusal_is_for_good_and_says_what_to_do(
    orch: HttpOrchestrator, link: HttpLink, archive: Path, status: int, step: str
):
    orch.fail("upload", status=status, body=b"because\nof \x1b[31m" + b"x" * 1000)
    with pytest.raises(RefusedError, match=step) as caught:
        await with_patience(sending(link, orch, archive), 60, unwatched)
    assert caught.value.status == status
    assert f"POST {orch.results_url}/task-1/files was answered with {status}" in str(caught.value)
    assert "because of ?[31mxxx" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert len(orch.requests) == 1


async def test_sending_follows_no_redirect(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    orch.redirect("upload", "http://user:pw@elsewhere.example/x?sig=s3cret", status=307)
    with pytest.raises(RefusedError, match=r"points to http://elsewhere\.example/x\?sig=\*\*\*") as caught:
        await sending(link, orch, archive)()
    assert caught.value.status == 307
    assert len(orch.requests) == 1


async def test_an_early_refusal_wins_over_the_broken_connection(orch: HttpOrchestrator, link: HttpLink, tmp_path: Path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(100_000_000)
    for _ in range(5):
        orch.answer_early("upload", status=413)
        with pytest.raises(RefusedError) as caught:
            await sending(link, orch, large)()
        assert caught.value.status == 413
    assert max(call.body_bytes for call in orch.requests) < 100_000_000


async def test_a_success_that_comes_before_the_end_is_none(link: HttpLink, tmp_path: Path):
    """A peer that says 200 after the headers and hangs up has not got the file."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(50_000_000)
    async with raw_peer(answer) as url:
        with pytest.raises(TransferError, match=r"(200 after \d+ of 50\d+ bytes|broke|reset)"):
            await upload_file(link, Target(url, timeout_sec=5), "t", large, "large", unheard)


async def test_an_interim_answer_is_no_reason_to_stop(link: HttpLink, tmp_path: Path):
    got = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        while got < length:
            got += len(await reader.read(65536))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(20_000_000)
    async with raw_peer(answer) as url:
        await upload_file(link, Target(url, timeout_sec=5), "t", large, "large", unheard)
    assert got > 20_000_000


@pytest.mark.parametrize("stored", [False, True])
async def test_a_peer_that_falls_silent_is_left(
    orch: HttpOrchestrator, link: HttpLink, tmp_path: Path, *, stored: bool
):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(20_000_000)
    orch.hang("upload", stored=stored)
    with pytest.raises(TransferError, match=r"no answer for 0\.3 s" if stored else r"took no data for 0\.3 s"):
        await sending(link, orch, large, timeout_sec=0.3)()


async def test_a_peer_that_takes_a_byte_now_and_then_is_left(
    link: HttpLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("orchestrator_client.transfers.uploads._LEAST_TOTAL_SEC", 0.5)
    monkeypatch.setattr("orchestrator_client.transfers.uploads._LEAST_BYTES_PER_SEC", 100_000_000)
    over = asyncio.Event()

    async def sip(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        while not over.is_set():
            await reader.read(10)
            await asyncio.sleep(0.01)

    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(20_000_000)
    async with raw_peer(sip) as url:
        with pytest.raises(TransferError, match=r"took longer than 0\.5 s: \d+ of 20\d+ bytes"):
            await upload_file(link, Target(url, timeout_sec=60), "t", large, "large", unheard)
        over.set()


async def test_cancelling_closes_everything(orch: HttpOrchestrator, link: HttpLink, archive: Path):
    orch.hang("upload", stored=True)
    before = psutil.Process().num_fds()
    task = asyncio.create_task(upload_file(link, Target(orch.results_url), "t", archive, NAME, unheard))
    async with asyncio.timeout(10):
        while not orch.seen("upload") or orch.seen("upload")[0].body_bytes < 3_000_000:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await link.aclose()
    orch.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert psutil.Process().num_fds() <= before


async def test_the_loop_goes_on_while_a_file_is_sent(orch: HttpOrchestrator, link: HttpLink, tmp_path: Path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(100_000_000)
    gaps: list[float] = []
    sent = asyncio.Event()

    async def beat() -> None:
        loop = asyncio.get_running_loop()
        while not sent.is_set():
            last = loop.time()
            await asyncio.sleep(0)
            gaps.append(loop.time() - last)

    beats = asyncio.create_task(beat())
    await sending(link, orch, large)()
    sent.set()
    await beats
    assert len(gaps) > 100
    assert max(gaps) < 1.0


async def test_memory_does_not_grow_with_the_file(
    orch: HttpOrchestrator, link: HttpLink, tmp_path: Path, archive: Path
):
    """Server and client are one process here, and both together stay small."""
    await sending(link, orch, archive)()
    process = psutil.Process()
    idle = process.memory_info().rss
    most = idle
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(200_000_000)

    def watch(_sent: int, _total: int) -> None:
        nonlocal most
        most = max(most, process.memory_info().rss)

    await upload_file(link, Target(orch.results_url), "t", large, NAME, watch)
    assert (orch.folder / "t" / "artifacts" / NAME).stat().st_size == 200_000_000
    assert most - idle < 60_000_000


async def test_the_token_is_taken_and_its_echo_is_cut_out(tmp_path: Path, archive: Path):
    with HttpOrchestrator(tmp_path / "o", token="t0ken-of-ours") as orch:
        own = HttpLink(HttpPolicy(upload_url=orch.results_url, token=SecretStr("t0ken-of-ours")))
        await sending(own, orch, archive)()
        orch.fail("upload", status=400, body=b"you sent Bearer t0ken-of-ours")
        with pytest.raises(RefusedError, match=r"you sent Bearer \*\*\*") as caught:
            await sending(own, orch, archive)()
        assert "t0ken" not in str(caught.value)
        await own.aclose()
        foreign = HttpLink(HttpPolicy(base_url="http://elsewhere.example", token=SecretStr("t0ken-of-ours")))
        with pytest.raises(RefusedError, match="ORCHESTRATOR_TOKEN"):
            await sending(foreign, orch, archive)()
        assert "authorization" not in orch.requests[-1].headers
        await foreign.aclose()


async def test_a_host_outside_the_list_is_not_called(orch: HttpOrchestrator, archive: Path):
    strict = HttpLink(HttpPolicy(allowed_hosts=("files.example",)))
    with pytest.raises(AddressError, match="WORKER_ALLOWED_HOSTS"):
        await sending(strict, orch, archive)()
    assert orch.requests == []
    await strict.aclose()
