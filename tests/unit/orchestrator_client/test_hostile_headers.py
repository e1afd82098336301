"""Whatever a peer or a spec says, what reads it ends in a value or in an error of our own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator_client.errors import AddressError, RefusedError, TransferError, WireError
from orchestrator_client.transfers.downloads import DownloadLimits, Source, _Fetch, default_name, next_place
from orchestrator_client.transfers.http_answers import failure, retry_after_sec
from orchestrator_client.transfers.http_link import HttpCall, HttpLink, HttpPolicy
from orchestrator_client.transfers.part_file import PartFile
from orchestrator_client.transfers.web_addresses import check_pattern, read_address, shown_url

DIGITS = st.one_of(st.integers().map(str), st.sampled_from(["9" * 20, "9" * 5000, "-1", "²", "٣", "1e3", "0x5", ""]))
LETTERS = st.text(st.characters(codec=None), max_size=30)
DATES = st.builds(
    "{}, {} {} {} {}:{}:{} {}".format,
    st.sampled_from(["Mon", "", "Xyz"]), DIGITS, st.sampled_from(["Jan", "jan", "Foo", "13"]),
    DIGITS, DIGITS, DIGITS, DIGITS, st.sampled_from(["GMT", "+9999999999999999999999", "-2359", "EST", ""]),
)  # fmt: skip
URLS = st.lists(
    st.sampled_from(
        [
            "http://", "https://", "//", "@", ":", "a", "[", "]", "::1", "%00", "%ff", "é", "\u2100", "0", "99999", "?",
            "#", "/", "..", ";", "&", "=", "xn--", "*", ".", "-", " ", "\ud800", "\x00", "\\", "9" * 5000,
        ]
    ),
    max_size=9,
).map("".join)  # fmt: skip
HEADER = st.one_of(DIGITS, LETTERS, DATES, URLS)


def wire(text: str) -> bytes:
    """What of a text can stand in a header."""
    return text.replace("\r", "").replace("\n", "").encode("utf-8", "replace")


@given(st.one_of(DATES, DIGITS, LETTERS))
@example("Mon, 01 Jan 2030 00:00:999999999999999999999 GMT")
@example("Mon, 01 Jan 99999999999999999999 00:00:00 GMT")
@example("Mon, 01 Jan 2030 00:00:00 +99999999999999999999")
def test_a_hostile_retry_after_is_a_pause_or_none(text: str):
    seconds = retry_after_sec({"retry-after": text})
    assert seconds is None or 0 <= seconds <= 3600


def test_a_date_in_the_past_and_one_far_ahead():
    assert retry_after_sec({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    year = datetime.now(UTC).year + 5
    assert retry_after_sec({"retry-after": f"Sun, 06 Nov {year} 08:49:37 GMT"}) == 3600


@given(st.one_of(URLS, URLS.map("http://{}".format), LETTERS))
@example("http://\ud800@h/x")
@example("http://h/\ud800")
def test_a_hostile_url_is_an_address_or_an_address_error(url: str):
    shown_url(url)
    default_name(url, None)
    with contextlib.suppress(AddressError):
        check_pattern(url)
    with contextlib.suppress(AddressError):
        place = read_address(url, what="the URL")
        place.url.encode("utf-8")
        assert place.origin.host
        assert 0 <= place.origin.port <= 65535


@pytest.mark.parametrize("start", ["http://u:s3cr3t", "ftp://s3cr3t:", "http:/s3cr3t", "u:s3cr3t", "//s3cr3t:p"])
@given(middle=st.text(st.sampled_from("a1 :@%[]=&é."), max_size=8))
def test_what_stands_before_an_at_sign_is_not_shown(start: str, middle: str):
    assert "s3cr3t" not in shown_url(f"{start}{middle}@h/x?y")


@given(middle=st.text(st.sampled_from("a1 :@%[]=&é./?#"), max_size=8))
def test_a_password_that_lacks_its_percent_signs_is_not_shown(middle: str):
    assert "s3cr3t" not in shown_url(f"http://u:s3cr3t{middle}@h/x?y")


@pytest.fixture(scope="module")
def call() -> HttpCall:
    return HttpLink(HttpPolicy()).prepare("GET", "http://h.example/a/b", {}, own={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@given(place=st.one_of(URLS, LETTERS))
def test_a_hostile_location_leads_somewhere_or_is_refused(call: HttpCall, place: str):
    with contextlib.suppress(RefusedError):
        assert next_place(call, httpx.Response(302, extensions={"location": place})).origin.scheme in {"http", "https"}


@given(status=st.integers(100, 999), retry_after=HEADER, place=st.one_of(URLS, LETTERS), body=st.binary(max_size=50))
async def test_a_hostile_refusal_is_an_error_of_ours(
    call: HttpCall, status: int, retry_after: str, place: str, body: bytes
):
    answer = httpx.Response(
        status, headers=[(b"Retry-After", wire(retry_after))], extensions={"location": place}, stream=Bytes(body)
    )
    error = await failure(call, answer, next_steps={0: "Look."})
    assert isinstance(error, TransferError | RefusedError)
    assert "\n" not in str(error)


class Bytes(httpx.AsyncByteStream):
    """A body that arrives."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


NAMES = ("Content-Length", "Content-Range", "Content-Encoding", "ETag", "Last-Modified", "Retry-After")
RANGES = st.builds("bytes {}-{}/{}".format, DIGITS, DIGITS, st.one_of(DIGITS, st.just("*")))


@given(
    status=st.sampled_from([200, 206, 304, 416, 404, 503, 999]),
    values=st.lists(st.tuples(st.sampled_from(NAMES), st.one_of(HEADER, RANGES)), max_size=6),
    begun=st.booleans(),
)
@example(status=200, values=[("Content-Length", "9" * 5000)], begun=False)
@example(status=206, values=[("Content-Range", f"bytes 3-{'9' * 5000}/{'9' * 5000}")], begun=True)
async def test_a_hostile_answer_to_a_download_is_a_file_or_an_error_of_ours(
    folder: Path,
    call: HttpCall,
    status: int,
    values: list[tuple[str, str]],
    *,
    begun: bool,
):
    part = PartFile(folder / "file")
    fetch = _Fetch(
        HttpLink(HttpPolicy()), Source(call.url), part, DownloadLimits(1000, 5), lambda _size, _total: None, '"a"'
    )
    if begun:
        fetch._strong = '"a"'
        await part.add(b"abc")
    answer = httpx.Response(status, headers=[(wire(name), wire(value)) for name, value in values], stream=Bytes(b"hi"))
    try:
        with contextlib.suppress(WireError):
            await fetch._take(call, answer)
    finally:
        part.discard()
    assert part.size <= 5
