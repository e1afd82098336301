"""Files come whole from a real HTTP server, whatever it does on the way; or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import psutil
import pytest
from http_orchestrator import HttpOrchestrator
from pydantic import SecretStr
from raw_peer import raw_peer

from orchestrator_client.errors import AddressError, RefusedError, TransferError
from orchestrator_client.transfers.downloads import Downloaded, DownloadLimits, Source, default_name, download
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy

NAME = "final_model.tar.gz"
CONTENT = os.urandom(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
LIMITS = DownloadLimits(max_bytes=10_000_000, max_seconds=30)


def unheard(_received: int, _total: int | None) -> None:
    pass


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


@pytest.fixture
def url(orch: HttpOrchestrator) -> str:
    return orch.put_file("task-1", NAME, CONTENT)


async def fetched(link: HttpLink, source: Source, inbox: Path, limits: DownloadLimits = LIMITS) -> Downloaded:
    got = await download(link, source, inbox / NAME, limits, unheard)
    assert got is not None
    assert content_of(inbox) == {NAME: CONTENT}
    assert (got.size_bytes, got.sha256, got.path) == (len(CONTENT), DIGEST, inbox / NAME)
    return got


def content_of(inbox: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in inbox.iterdir()}


async def test_a_file_comes_with_digest_and_validator(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    heard: list[tuple[int, int | None]] = []
    got = await download(
        link, Source(url, {"X-Team": "a"}), inbox / NAME, LIMITS, lambda *progress: heard.append(progress)
    )
    assert got is not None
    assert (got.sha256, got.size_bytes) == (DIGEST, len(CONTENT))
    assert got.validator.startswith('"')
    assert content_of(inbox) == {NAME: CONTENT}
    assert heard == sorted(heard)
    assert heard[-1] == (len(CONTENT), len(CONTENT))
    (call,) = orch.requests
    assert call.headers["accept-encoding"] == "identity"
    assert call.headers["x-team"] == "a"
    assert "range" not in call.headers


async def test_what_is_there_is_replaced_only_by_something_whole(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str
):
    old = b"what was there"
    put(inbox / NAME, old)
    orch.fail("download", status=404)
    with pytest.raises(RefusedError):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert content_of(inbox) == {NAME: old}
    await fetched(link, Source(url), inbox)


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


async def test_a_copy_that_is_current_is_not_sent_again(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    got = await fetched(link, Source(url), inbox)
    for validator in (got.validator, f"W/{got.validator}"):
        assert await download(link, Source(url), inbox / "again", LIMITS, unheard, validator=validator) is None
    assert [call.status for call in orch.requests] == [200, 304, 304]
    assert content_of(inbox) == {NAME: CONTENT}
    orch.put_file("task-1", NAME, CONTENT + b"!")
    changed = await download(link, Source(url), inbox / NAME, LIMITS, unheard, validator=got.validator)
    assert changed is not None
    assert changed.size_bytes == len(CONTENT) + 1


async def test_without_an_etag_the_date_is_the_validator(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.lie("no_etag")
    got = await fetched(link, Source(url), inbox)
    assert got.validator.endswith("GMT")
    assert await download(link, Source(url), inbox / "again", LIMITS, unheard, validator=got.validator) is None
    assert orch.requests[-1].headers["if-modified-since"] == got.validator


async def test_a_hostile_validator_is_not_sent(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    assert await download(link, Source(url), inbox / NAME, LIMITS, unheard, validator='"a"\r\nX-Evil: 1') is not None
    assert not {"x-evil", "if-none-match"} & orch.requests[0].headers.keys()


async def test_a_304_that_nobody_asked_for_is_no_success(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.fail("download", status=304, body=b"")
    with pytest.raises(RefusedError, match="304"):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)


@pytest.mark.usefixtures("short_pauses")
async def test_cuts_at_every_tenth_are_resumed(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    tenth = len(CONTENT) // 10
    for _ in range(9):
        orch.cut("download", after_bytes=tenth)
    await fetched(link, Source(url, sha256=DIGEST), inbox)
    assert [call.status for call in orch.requests] == [200] + [206] * 9
    assert sum(call.body_bytes for call in orch.requests) == len(CONTENT)
    assert [call.headers.get("range") for call in orch.requests[1:3]] == [f"bytes={tenth}-", f"bytes={2 * tenth}-"]
    assert all("if-range" in call.headers for call in orch.requests[1:])


@pytest.mark.usefixtures("short_pauses")
async def test_a_file_that_changed_meanwhile_starts_over(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.put_file("task-1", NAME, b"old" * 500_000)
    orch.cut("download", after_bytes=1_200_000)

    def replace(_error: TransferError, _pause: float) -> None:
        orch.put_file("task-1", NAME, CONTENT)

    got = await download(link, Source(url), inbox / NAME, LIMITS, unheard, on_wait=replace)
    assert got is not None
    assert content_of(inbox) == {NAME: CONTENT}
    assert got.sha256 == DIGEST


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("lie", ["ignore_range", "wrong_range"])
async def test_a_range_that_is_not_the_one_asked_for_starts_over(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str, lie: str
):
    orch.cut("download", after_bytes=2_000_000)
    orch.lie("ignore_range" if lie == "ignore_range" else "wrong_range")
    await fetched(link, Source(url), inbox)
    assert "range" in orch.requests[1].headers


@pytest.mark.usefixtures("short_pauses")
async def test_without_a_strong_etag_a_broken_transfer_starts_over(link: HttpLink, inbox: Path):
    asked: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        head = f'HTTP/1.1 200 OK\r\nETag: W/"1"\r\nConnection: close\r\nContent-Length: {len(CONTENT)}\r\n\r\n'
        writer.write(head.encode() + (CONTENT[:1_500_000] if len(asked) < 3 else CONTENT))
        await writer.drain()

    async with raw_peer(talk) as url:
        got = await fetched(link, Source(url), inbox)
    assert len(asked) == 3
    assert not any(b"range:" in request.lower() for request in asked)
    assert got.validator == 'W/"1"'


@pytest.mark.usefixtures("short_pauses")
async def test_a_body_shorter_than_promised_is_tried_again(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str
):
    orch.lie("short")
    await fetched(link, Source(url), inbox)


@pytest.mark.usefixtures("short_pauses")
async def test_what_may_pass_is_tried_again(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    statuses = [408, 425, 429, 500, 503]
    for status in statuses:
        orch.fail("download", status=status)
    orch.hang("download")
    await fetched(link, Source(url, timeout_sec=0.3), inbox)
    assert [call.status for call in orch.requests if call.status] == [*statuses, 200]


@pytest.mark.usefixtures("short_pauses")
async def test_the_eighth_failure_in_a_row_is_the_last(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.fail("download", status=503, times=20)
    with pytest.raises(TransferError, match="503"):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert len(orch.requests) == 8
    assert content_of(inbox) == {}


async def test_retry_after_is_waited_for(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.fail("download", status=429, headers={"Retry-After": "1"})
    pauses: list[float] = []
    await download(link, Source(url), inbox / NAME, LIMITS, unheard, on_wait=lambda _error, pause: pauses.append(pause))
    assert pauses == [1.0]


async def test_more_patience_than_there_is_time_is_not_taken(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str
):
    orch.fail("download", status=429, headers={"Retry-After": "100"})
    with pytest.raises(TransferError, match="429"):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert len(orch.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204])
async def test_a_refusal_is_for_good(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str, status: int):
    orch.fail("download", status=status, body=b"" if status == 204 else b"because")
    with pytest.raises(RefusedError, match=f"GET {url} was answered with {status}") as caught:
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert caught.value.status == status
    assert len(orch.requests) == 1
    assert content_of(inbox) == {}


async def test_another_digest_leaves_no_file(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.lie("wrong_content")
    with pytest.raises(RefusedError, match=f"expected {DIGEST[:12]}…"):
        await download(link, Source(url, sha256=DIGEST.upper()), inbox / NAME, LIMITS, unheard)
    assert content_of(inbox) == {}
    assert len(orch.requests) == 1


async def test_what_is_no_digest_is_said_before_anything_is_fetched(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str
):
    with pytest.raises(RefusedError, match="64 hex digits"):
        await download(link, Source(url, sha256="abc"), inbox / NAME, LIMITS, unheard)
    assert orch.requests == []


async def test_a_file_that_says_it_is_too_large_is_not_read(link: HttpLink, inbox: Path, url: str):
    with pytest.raises(RefusedError, match="WORKER_DOWNLOAD_MAX_BYTES"):
        await download(link, Source(url), inbox / NAME, DownloadLimits(2_999_999, 30), unheard)
    assert content_of(inbox) == {}
    await fetched(link, Source(url), inbox, DownloadLimits(3_000_000, 30))


async def test_a_body_that_never_ends_hits_the_cap(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.lie("endless")
    most = 0

    def watch(received: int, total: int | None) -> None:
        nonlocal most
        assert total is None
        most = received

    with pytest.raises(RefusedError, match="WORKER_DOWNLOAD_MAX_BYTES"):
        await download(link, Source(url), inbox / NAME, LIMITS, watch)
    assert most <= LIMITS.max_bytes
    assert content_of(inbox) == {}


async def test_a_body_that_trickles_hits_the_total_time(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.lie("trickle")
    with pytest.raises(TransferError, match="WORKER_DOWNLOAD_TIMEOUT_SEC"):
        await download(link, Source(url), inbox / NAME, DownloadLimits(10**9, 0.5), unheard)
    assert content_of(inbox) == {}


async def test_an_encoding_that_nobody_asked_for_is_refused(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str
):
    orch.lie("gzip")
    with pytest.raises(RefusedError, match="Content-Encoding 'gzip'"):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert content_of(inbox) == {}


async def test_the_specs_headers_for_ranges_are_dropped(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    await fetched(link, Source(url, {"Range": "bytes=5-", "Accept-Encoding": "gzip", "IF-NONE-MATCH": "*"}), inbox)
    assert not {"range", "if-none-match"} & orch.requests[0].headers.keys()
    assert orch.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str, status: int):
    orch.redirect("download", f"/api/v1/results/task-1/files/{NAME}?again=1", status=status)
    await fetched(link, Source(url, {"X-Key": "k"}), inbox)
    assert [call.headers.get("x-key") for call in orch.requests] == ["k", "k"]
    assert orch.requests[1].query == "again=1"


async def test_credentials_end_where_the_origin_does(tmp_path: Path, inbox: Path):
    with HttpOrchestrator(tmp_path / "a", token="t0ken") as own, HttpOrchestrator(tmp_path / "b") as foreign:
        link = HttpLink(HttpPolicy(base_url=own.base_url, token=SecretStr("t0ken")))
        elsewhere = foreign.put_file("task-1", NAME, CONTENT)
        here = own.put_file("task-1", NAME, CONTENT)
        own.redirect("download", elsewhere.replace("http://", "http://user:pw@"))
        await fetched(link, Source(here, {"X-Key": "k"}, with_token=True), inbox)
        assert own.requests[0].headers["authorization"] == "Bearer t0ken"
        assert own.requests[0].headers["x-key"] == "k"
        assert not {"authorization", "x-key"} & foreign.requests[0].headers.keys()
        # And they do not come back with a redirect to where they belong.
        foreign.redirect("download", here)
        with pytest.raises(RefusedError) as caught:
            await download(link, Source(elsewhere, {"X-Key": "k"}, with_token=True), inbox / NAME, LIMITS, unheard)
        assert caught.value.status == 401
        await link.aclose()


@pytest.mark.parametrize(("with_token", "sent"), [(True, "Bearer t0ken"), (False, None)])
async def test_the_token_is_sent_only_when_wanted(tmp_path: Path, inbox: Path, *, with_token: bool, sent: str | None):
    with HttpOrchestrator(tmp_path / "o") as orch:
        link = HttpLink(HttpPolicy(base_url=orch.base_url, token=SecretStr("t0ken")))
        await fetched(link, Source(orch.put_file("t", NAME, CONTENT), with_token=with_token), inbox)
        assert orch.requests[0].headers.get("authorization") == sent
        await link.aclose()


async def test_userinfo_of_the_url_stays_with_its_origin(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.redirect("download", f"{url}?again=1")
    await fetched(link, Source(url.replace("http://", "http://u:p@")), inbox)
    assert [call.headers.get("authorization") for call in orch.requests] == ["Basic dTpw"] * 2


async def test_a_redirect_loop_ends(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.redirect("download", url, times=50)
    with pytest.raises(RefusedError, match="more than 5 times"):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert len(orch.requests) == 6


@pytest.mark.parametrize("place", ["ftp://host/x", "file:///etc/passwd", "http://host:port/x", "http://[", ""])
async def test_a_redirect_to_what_is_no_http_url_is_refused(
    orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str, place: str
):
    orch.redirect("download", place)
    with pytest.raises(RefusedError, match="redirect"):
        await download(link, Source(url), inbox / NAME, LIMITS, unheard)
    assert content_of(inbox) == {}


async def test_a_redirect_to_a_host_outside_the_list_is_refused(orch: HttpOrchestrator, inbox: Path, url: str):
    strict = HttpLink(HttpPolicy(base_url=orch.base_url, allowed_hosts=("files.example",)))
    orch.redirect("download", "http://169.254.169.254/latest")
    with pytest.raises(AddressError, match="WORKER_ALLOWED_HOSTS"):
        await download(strict, Source(url), inbox / NAME, LIMITS, unheard)
    await strict.aclose()


async def test_cancelling_leaves_nothing(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    orch.lie("trickle")
    before = psutil.Process().num_fds()
    task = asyncio.create_task(download(link, Source(url), inbox / NAME, LIMITS, unheard))
    async with asyncio.timeout(10):
        while not orch.seen("download") or not orch.seen("download")[0].body_bytes:
            await asyncio.sleep(0.01)
    assert len(content_of(inbox)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await link.aclose()
    orch.stop()
    assert content_of(inbox) == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert psutil.Process().num_fds() <= before


async def test_a_folder_that_is_missing_is_no_matter_of_the_network(link: HttpLink, inbox: Path, url: str):
    with pytest.raises(FileNotFoundError):
        await download(link, Source(url), inbox / "missing" / NAME, LIMITS, unheard)


async def test_memory_does_not_grow_with_the_file(orch: HttpOrchestrator, link: HttpLink, inbox: Path, url: str):
    await fetched(link, Source(url), inbox)
    large = orch.folder / "task-1" / "artifacts" / "large"
    large.write_bytes(b"")
    os.truncate(large, 200_000_000)
    process = psutil.Process()
    idle = most = process.memory_info().rss

    def watch(_received: int, _total: int | None) -> None:
        nonlocal most
        most = max(most, process.memory_info().rss)

    got = await download(
        link, Source(orch.file_url("task-1", "large")), inbox / "large", DownloadLimits(10**9, 60), watch
    )
    assert got is not None
    assert got.size_bytes == 200_000_000
    assert most - idle < 60_000_000


@pytest.mark.parametrize(
    ("url", "filename", "name"),
    [
        ("http://h/a/model.tar.gz?x=y/z", None, "model.tar.gz"),
        ("http://h/a/", None, "a"),
        ("http://h/", None, "checkpoint"),
        ("http://h", "", "checkpoint"),
        ("http://h/x", "my.zip", "my.zip"),
        ("http://h/x", "../../etc/passwd", "passwd"),
        ("http://h/x", "..", "x"),
        ("http://h/..%2f..%2fevil", None, "evil"),
        ("http://h/%2e%2e", None, "checkpoint"),
        ("http://h/a%00b%0ac", None, "a_b_c"),
        ("http://h/x", "C:\\models\\a b.zip", "a_b.zip"),
        ("http://h/x", ".hidden", "hidden"),
        ("http://[", None, "checkpoint"),
        ("http://h/" + "a" * 300 + ".zip", None, "a" * 146 + ".zip"),
    ],
)
def test_the_name_of_a_fetched_file_is_safe(url: str, filename: str | None, name: str):
    assert default_name(url, filename) == name
