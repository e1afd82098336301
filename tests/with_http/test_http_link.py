"""Whom the link calls, with which headers, and how errors read."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from http_orchestrator import HttpOrchestrator
from pydantic import SecretStr

from orchestrator_client.errors import AddressError, RefusedError, TransferError
from orchestrator_client.transfers.downloads import next_place
from orchestrator_client.transfers.http_answers import retry_after_sec
from orchestrator_client.transfers.http_link import (
    HttpCall,
    HttpLink,
    HttpPolicy,
    _certificates,
    _new_client,
    shown_url,
    with_patience,
)
from orchestrator_client.transfers.listening_stream import ListeningBackend
from orchestrator_client.transfers.web_addresses import check_pattern, is_allowed, read_address

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x", "file:///etc/passwd", "//host/x", "host/x", "", "http://", "http:///x", "https://:80/x",
        "http://host:99999/x", "http://host:port/x", "http://ho st/x", " http://host/x", "http://host/x\n",
        "http://host/\r\nX: y", "http://host\\@evil/x", "http://[::1/x", "http://büro.example/x", "http://a..b/x",
        "http://-a/x", f"http://{'a' * 64}.example/", "javascript:alert(1)", "http://host\t.example/", "http://a@b@c%/",
    ],
)  # fmt: skip
def test_what_is_no_http_url_is_refused_by_name(url: str):
    with pytest.raises(AddressError, match=r"spec\.output\.destination\.url"):
        HttpLink(HttpPolicy()).check_url(url, what="spec.output.destination.url")


@pytest.mark.parametrize("url", ["http://h", "https://h.example:8443/a b?c=d#e", "http://[::1]:8000/x", "HTTP://H/x"])
def test_what_is_one_is_not(url: str):
    HttpLink(HttpPolicy()).check_url(url, what="url")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://files.example/x", True),
        ("http://FILES.example./x", True),
        ("https://files.example:444/x", True),
        ("http://orch.example:8000/x", True),
        ("http://orch.example/x", False),
        ("http://a.cdn.example/x", True),
        ("http://a.b.cdn.example/x", True),
        ("http://cdn.example/x", False),
        ("http://evilcdn.example/x", False),
        ("http://[::1]:9/x", True),
        ("http://[::1]:10/x", False),
        ("http://base.example:81/x", True),
        ("http://base.example/x", False),
        ("https://upload.example/x", True),
        ("http://upload.example/x", False),
        ("http://files.example@evil.example/x", False),
        ("http://evil.example/?files.example", False),
    ],
)
def test_allowed_hosts(url: str, *, allowed: bool):
    policy = HttpPolicy(
        base_url="http://base.example:81/",
        upload_url="https://upload.example/r",
        allowed_hosts=("Files.example", "orch.example:8000", "*.cdn.example", "[::1]:9"),
    )
    if allowed:
        HttpLink(policy).check_url(url, what="url")
    else:
        with pytest.raises(AddressError, match="WORKER_ALLOWED_HOSTS"):
            HttpLink(policy).check_url(url, what="url")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:secret@h:8/p?sig=secret&secret#f", "http://h:8/p?sig=***&***"),
        ("http://h/p", "http://h/p"),
        ("http://h/a\nb", "http://h/ab"),
        ("http://[", "http://["),
        ("http://u:secret@[", "(an address that cannot be read)"),
        ("http://u:secret/x@h/", "(an address that cannot be read)"),
        ("http://h:99999/x?sig=secret", "http://h:99999/x?sig=***"),
        ("u_x:secret@h/", "(an address that cannot be read)"),
        ("http:///x", "http:///x"),
        ("http://h/to/http://u:secret@g/", "http://h/to/http://…"),
        ("http://h/?a to http://u:secret@h/x?q=1", "http://h/?***"),
        ("http://h/?q=1;http://u:secret@h", "http://h/?q=***"),
        ("mailto:secret@x", "mailto:…"),
        ("http://h/" + "x" * 400, "http://h/" + "x" * 291 + "…"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str):
    assert shown_url(url) == shown


def prepared(policy: HttpPolicy, url: str, headers: dict[str, str]) -> HttpCall:
    return HttpLink(policy).prepare("post", url, headers, own={"Content-Type": "application/json"})


def authorization(call: HttpCall) -> list[str]:
    return [value for name, value in call.headers if name.lower() == "authorization"]


POLICY = HttpPolicy(base_url="http://base.example:8000", upload_url="https://up.example/r", token=SecretStr("t0ken"))


@pytest.mark.parametrize(
    ("url", "headers", "sent"),
    [
        ("http://base.example:8000/x", {}, ["Bearer t0ken"]),
        ("https://UP.example:443/x", {}, ["Bearer t0ken"]),
        ("http://up.example/x", {}, []),
        ("https://base.example:8000/x", {}, []),
        ("http://base.example/x", {}, []),
        ("http://base.example.evil:8000/x", {}, []),
        ("http://base.example:8000/x", {"aUTHORIZATION": "Basic x"}, ["Basic x"]),
        ("http://u:p%40@base.example:8000/x", {}, ["Basic dTpwQA=="]),
        ("http://u:p@foreign/x", {"authorization": "mine"}, ["mine"]),
    ],
)
def test_the_token_goes_to_its_own_origins_only(url: str, headers: dict[str, str], sent: list[str]):
    assert authorization(prepared(POLICY, url, headers)) == sent


def test_headers_of_the_connection_and_those_of_ours_are_not_the_specs():
    spec = {
        "content-TYPE": "text/plain", "Content-Length": "1", "HOST": "evil", "Transfer-Encoding": "chunked",
        "Connection": "close", "Expect": "100-continue", "X-Kept": " yes ",
    }  # fmt: skip
    call = prepared(HttpPolicy(), "http://h/x", spec)
    assert call.headers == (("X-Kept", "yes"), ("Content-Type", "application/json"))
    assert call.method == "POST"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "X\r\nY", "büro", "a\0"])
def test_a_hostile_header_name_is_refused(name: str):
    with pytest.raises(RefusedError, match="header name"):
        prepared(HttpPolicy(), "http://h/x", {name: "v"})


@pytest.mark.parametrize("value", ["s3cret\r\nX: y", "s3cret\n", "s3cret\0", "s3cret€", "s3cret\x7f"])
def test_a_hostile_header_value_is_refused_without_being_shown(value: str):
    if value.endswith("\n"):
        value += "x"
    with pytest.raises(RefusedError, match="X-Key") as caught:
        prepared(HttpPolicy(), "http://h/x", {"X-Key": value})
    assert "s3cret" not in str(caught.value)


def test_an_odd_method_is_refused():
    with pytest.raises(RefusedError, match="CONNECT"):
        HttpLink(HttpPolicy()).prepare("CONNECT", "http://h/x", {}, own={})


def test_text_from_outside_becomes_one_clean_line():
    spec = {"X-Key": "an api-key of mine"}
    call = prepared(POLICY, "http://base.example:8000/x?sig=s1gnature", spec)
    told = call.clean("a\n\tb \x1b[31m t0ken Bearer an api-key of mine s1gnature " + "x" * 500)
    assert told.startswith("a b ?[31m *** Bearer *** *** ")
    assert len(told) == 300


def test_the_wrong_address_of_a_policy_is_named():
    with pytest.raises(AddressError, match="RESULTS_UPLOAD_URL"):
        HttpLink(HttpPolicy(upload_url="gopher://h"))


def test_httpx_is_imported_at_the_first_request_only():
    code = (
        "import sys, orchestrator_client.transfers.uploads, orchestrator_client.transfers.downloads as d; "
        "from orchestrator_client.transfers.http_link import *; link = HttpLink(HttpPolicy(base_url='http://h')); "
        "link.check_url('http://h/x', what='x'); "
        "assert not {'httpx', 'httpcore', 'h11'} & sys.modules.keys(), 'too early'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=60)


@pytest.mark.parametrize("token", ["s3cret\n", "s3cret…", "s3\x00cret"])
def test_a_token_that_cannot_be_sent_is_a_refusal_without_it(token: str):
    link = HttpLink(HttpPolicy(base_url="http://base.example", token=SecretStr(token)))
    with pytest.raises(RefusedError, match="'Authorization' cannot be sent") as caught:
        link.prepare("GET", "http://base.example/x", {}, own={})
    assert "cret" not in str(caught.value)


async def test_a_request_that_cannot_be_put_together_is_not_tried_again(orch: HttpOrchestrator, link: HttpLink):
    call = link.prepare("GET", orch.results_url, {}, own={})
    with pytest.raises(RefusedError, match=r"GET .* cannot be put together") as caught:
        async with link.exchange(replace(call, headers=(("X-Key", "s3cret\ns3cret"),)), None, stall_sec=5):
            pass
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["a.b", "A_b.c:80", "*.cdn.example", "*.cdn.example:8", "[::1]:9", "[::1]", "::1"])
def test_a_pattern_that_fits_something(pattern: str):
    check_pattern(pattern)
    host = pattern.replace("*", "x") if pattern != "::1" else "[::1]"
    assert is_allowed(read_address(f"http://{host}", what="x").origin, (pattern,))


@pytest.mark.parametrize(
    "pattern", ["https://orch.example/", "orch.example/", "h:port", "h:99999", "*", "*.", "", "u@h", "h?x", "[::1", "é"]
)
def test_a_pattern_that_fits_nothing_is_refused_with_the_right_form(pattern: str):
    with pytest.raises(AddressError, match=r"`name`, `name:port` or `\*\.domain` without http://"):
        check_pattern(pattern)


async def test_connections_listen_while_they_send():
    """The private names of httpx are what they were: see `listening_stream`."""
    client = await asyncio.to_thread(_new_client)
    assert isinstance(client._transport._pool._network_backend, ListeningBackend)
    await client.aclose()


class OtherTransport(httpx.AsyncHTTPTransport):
    """Has another name for its pool until the first request."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - httpx's own arguments
        super().__init__(**options)
        self._other = self.__dict__.pop("_pool")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._pool = self._other
        return await super().handle_async_request(request)


async def test_another_httpx_is_a_warning_and_sends_all_the_same(
    orch: HttpOrchestrator, link: HttpLink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("httpx._client.AsyncHTTPTransport", OtherTransport)
    with structlog.testing.capture_logs() as logs:
        call = link.prepare("GET", f"{orch.base_url}/healthz", {}, own={})
        async with link.exchange(call, None, stall_sec=5) as answer:
            assert answer.status_code == 200
        await link.aclose()
    assert [(record["log_level"], record["httpx"]) for record in logs] == [("warning", httpx.__version__)]


async def test_what_is_called_is_what_was_checked(orch: HttpOrchestrator, link: HttpLink):
    call = link.prepare("GET", f"{orch.base_url.replace('http://', 'http://u:p@')}/healthz", {}, own={})
    async with link.exchange(call, None, stall_sec=5) as answer:
        assert answer.status_code == 200
    assert orch.requests[0].headers["authorization"] == "Basic dTpw"
    assert "u:p" not in call.shown


async def test_no_cookie_is_kept(orch: HttpOrchestrator, link: HttpLink):
    orch.fail("result", status=200, headers={"set-cookie": "session=1"})
    for _ in range(2):
        call = link.prepare("POST", orch.results_url, {}, own={"Content-Length": "0"})
        async with link.exchange(call, None, stall_sec=5):
            pass
    assert [call.headers.get("cookie") for call in orch.requests] == [None, None]


async def test_the_library_logs_no_url(orch: HttpOrchestrator, link: HttpLink, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("DEBUG"):
        call = link.prepare("GET", f"{orch.base_url}/healthz?sig=s3cret", {}, own={})
        async with link.exchange(call, None, stall_sec=5):
            pass
    assert "s3cret" not in caplog.text
    assert "httpcore" not in {record.name.partition(".")[0] for record in caplog.records}


async def test_a_name_that_does_not_resolve_may_resolve_later(link: HttpLink):
    call = link.prepare("GET", "http://no-such-host.invalid/x?sig=s3cret", {}, own={})
    with pytest.raises(TransferError, match=r"no-such-host\.invalid") as caught:
        async with link.exchange(call, None, stall_sec=5):
            pass
    assert "s3cret" not in str(caught.value)


async def test_a_closed_link_opens_again(orch: HttpOrchestrator, link: HttpLink):
    for _ in range(2):
        call = link.prepare("GET", f"{orch.base_url}/healthz", {}, own={})
        async with link.exchange(call, None, stall_sec=5) as answer:
            assert answer.status_code == 200
        await link.aclose()


@pytest.mark.parametrize(("name", "value"), [("SSL_CERT_FILE", "/missing"), ("HTTP_PROXY", "gopher://proxy:1")])
async def test_an_environment_that_no_client_can_use_is_named(
    link: HttpLink, monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    _certificates.cache_clear()
    monkeypatch.setenv(name, value)
    call = link.prepare("GET", "http://h/x", {}, own={})
    with pytest.raises(TransferError, match=r"SSL_CERT_FILE.* HTTP_PROXY"):
        async with link.exchange(call, None, stall_sec=5):
            pass


async def test_a_proxy_of_the_environment_is_used(orch: HttpOrchestrator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", orch.base_url)
    behind = HttpLink(HttpPolicy())
    call = behind.prepare("GET", "http://far.example/healthz", {}, own={})
    async with behind.exchange(call, None, stall_sec=5):
        pass
    assert (orch.requests[0].path, orch.requests[0].headers["host"]) == ("http://far.example/healthz", "far.example")
    await behind.aclose()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", None), ("3", 3), ("0", 0), ("99999999", 3600), ("-1", None), ("soon", None), ("1e3", None)],
)
def test_retry_after_in_seconds(text: str, seconds: float | None):
    assert retry_after_sec({"retry-after": text}) == seconds


@pytest.mark.parametrize(("ahead", "least", "most"), [(120, 110, 121), (-50, 0, 0), (10**6, 3600, 3600)])
def test_retry_after_as_a_date(ahead: int, least: float, most: float):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
    seconds = retry_after_sec({"retry-after": when})
    assert seconds is not None
    assert least <= seconds <= most


class Attempts:
    """Fails as told, then works."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.at: list[float] = []

    async def __call__(self) -> str:
        self.at.append(time.monotonic())
        if self._failures:
            raise self._failures.pop(0)
        return "done"


async def test_patience_waits_as_asked_and_tells():
    attempts = Attempts(TransferError("busy", retry_after_sec=0.3), TransferError("again", retry_after_sec=0))
    told: list[tuple[str, float]] = []
    assert await with_patience(attempts, 60, lambda error, pause: told.append((str(error), pause))) == "done"
    assert told == [("busy", 0.3), ("again", 0)]
    assert attempts.at[1] - attempts.at[0] >= 0.3


async def test_pauses_double_with_jitter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator_client.transfers.patience._FIRST_PAUSE_SEC", 0.02)
    monkeypatch.setattr("orchestrator_client.transfers.patience._LONGEST_PAUSE_SEC", 0.05)
    pauses: list[float] = []
    await with_patience(Attempts(*[TransferError("x")] * 4), 60, lambda _error, pause: pauses.append(pause))
    for pause, longest in zip(pauses, (0.02, 0.04, 0.05, 0.05), strict=True):
        assert longest / 2 <= pause <= longest


async def test_a_refusal_is_not_tried_again():
    attempts = Attempts(RefusedError("no", status=400))
    with pytest.raises(RefusedError):
        await with_patience(attempts, 60, lambda _error, _pause: None)
    assert len(attempts.at) == 1


async def test_patience_ends_with_the_last_failure():
    attempts = Attempts(*[TransferError(f"failure {number}") for number in range(1000)])
    with pytest.raises(TransferError, match="failure"):
        await with_patience(attempts, 0.3, lambda _error, _pause: None)
    assert len(attempts.at) >= 2
    assert attempts.at[-1] - attempts.at[0] <= 0.6


async def test_patience_is_over_when_the_peer_wants_longer_than_that():
    attempts = Attempts(TransferError("busy", retry_after_sec=100))
    with pytest.raises(TransferError, match="busy"):
        await with_patience(attempts, 5, lambda _error, _pause: None)
    assert len(attempts.at) == 1


def test_a_redirect_from_https_to_http_is_refused():
    call = HttpLink(HttpPolicy()).prepare("GET", "https://h.example/x", {}, own={})
    for place in ("http://h.example/x?sig=s3cret", "HTTP://other.example/y"):
        with pytest.raises(RefusedError, match="from https to") as caught:
            next_place(call, httpx.Response(302, extensions={"location": place}))
        assert "s3cret" not in str(caught.value)
    assert next_place(call, httpx.Response(302, extensions={"location": "//b.example/z"})).url == "https://b.example/z"
