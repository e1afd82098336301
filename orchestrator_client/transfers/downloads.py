"""Fetching files over HTTP: with its own retries, resumed where that is safe, within caps on size and time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urljoin, urlsplit

import stamina

from orchestrator_client.errors import RefusedError, TransferError
from orchestrator_client.transfers.http_answers import LOCATION, REDIRECTS, failure, shown_place
from orchestrator_client.transfers.http_link import HttpCall, HttpLink
from orchestrator_client.transfers.part_file import PartFile
from orchestrator_client.transfers.patience import Patience
from orchestrator_client.transfers.web_addresses import WebAddress, read_address, shown_url

if TYPE_CHECKING:
    import httpx

_STALL_SEC: Final = 60.0
_MOST_REDIRECTS: Final = 5
_MOST_FAILURES: Final = 8
_LONGEST_NAME: Final = 150
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_STRONG: Final = re.compile(r'"[\x21\x23-\x7e]{0,256}"')
_VALIDATOR: Final = re.compile(r"[\x20-\x7e]{1,300}")
_DIGITS: Final = re.compile(r"[0-9]{1,18}")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_OWN: Final = ("Accept-Encoding", "If-Match", "If-Modified-Since", "If-None-Match", "If-Range", "Range")
_CREDENTIALS: Final = "Give the headers that it needs in the task; ORCHESTRATOR_TOKEN goes to the orchestrator only."
_NEXT_STEPS: Final = {
    0: "Correct the URL or its headers in the task.",
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: "Correct the URL in the task, or wait for the task that makes the file.",
}


@dataclass(frozen=True)
class Source:
    """What is fetched.

    Attributes:
        url: where from.
        headers: from the spec, untrusted; dropped when a redirect leaves the origin.
        timeout_sec: longest silence of the peer, for each read; None is 60.
        sha256: what the content must have, 64 hexadecimal digits; None is anything.
        with_token: whether the orchestrator's token may be added (only for its own origins).
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_sec: float | None = None
    sha256: str | None = None
    with_token: bool = False


@dataclass(frozen=True)
class DownloadLimits:
    """Caps on one download: bytes of the file, seconds with all retries."""

    max_bytes: int
    max_seconds: float


@dataclass(frozen=True)
class Downloaded:
    """A fetched file.

    Attributes:
        path: where it is.
        size_bytes: how large.
        sha256: of its content.
        validator: its ETag or Last-Modified, for the next `download`; empty if the server gave none.
    """

    path: Path
    size_bytes: int
    sha256: str
    validator: str


async def download(  # noqa: PLR0913 - what, where to, how much, and who listens
    link: HttpLink,
    source: Source,
    target: Path,
    limits: DownloadLimits,
    on_progress: Callable[[int, int | None], None],
    *,
    validator: str = "",
    on_wait: Callable[[TransferError, float], None] | None = None,
) -> Downloaded | None:
    """Fetch a file; it appears whole or not at all.

    Args:
        link: the client.
        source: what to fetch.
        target: where to; its folder exists. What is there is replaced.
        limits: caps.
        on_progress: hears bytes received and bytes in all, if known; on the loop.
        validator: of a copy that is there already: see Returns.
        on_wait: hears each failure that is followed by another attempt, and the seconds until then.

    Returns:
        None if the server says that the copy with `validator` is still current.

    Raises:
        TransferError: it did not work within `limits.max_seconds`, or eight times in a row without a new byte.
        RefusedError: the peer said no for good, the file is too large, or its digest is another one.
        OSError: the file cannot be written.
    """
    wanted = (source.sha256 or "").lower()
    if wanted and not _SHA256.fullmatch(wanted):
        raise RefusedError(f"the sha256 {wanted[:80]!r} of {shown_url(source.url)} is none: expected 64 hex digits")
    part = PartFile(target)
    try:
        known = validator if _VALIDATOR.fullmatch(validator) else ""
        fetch = _Fetch(link, source, part, limits, on_progress, known)
        if not await fetch.whole(Patience(limits.max_seconds, on_wait=on_wait, most_in_a_row=_MOST_FAILURES)):
            return None
        digest = await part.sha256()
        if wanted and digest != wanted:
            raise RefusedError(
                f"GET {shown_url(source.url)} gave a file with sha256 {digest[:12]}…, expected {wanted[:12]}…: it was "
                "changed or damaged. Correct the sha256 or the URL in the task."
            )
        await part.finish()
        return Downloaded(target, part.size, digest, fetch.found_validator)
    finally:
        part.discard()


@dataclass
class _Fetch:
    """One download over all its attempts."""

    link: HttpLink
    source: Source
    part: PartFile
    limits: DownloadLimits
    on_progress: Callable[[int, int | None], None]
    known: str
    found_validator: str = ""
    _strong: str = ""  # the ETag under which a broken transfer may be resumed
    _total: int | None = None

    async def whole(self, patience: Patience) -> bool:
        """Fetch until everything is there. Returns False if the copy that is known is current."""
        trouble = "it was still going on"
        most = 0

        async def attempt() -> bool:
            nonlocal trouble, most
            try:
                return await self._attempt()
            except TransferError as error:
                trouble = str(error)
                if self.part.size > most:
                    most = self.part.size
                    patience.progressed()
                raise

        try:
            async with asyncio.timeout(self.limits.max_seconds):
                async for one in stamina.retry_context(on=patience, attempts=None, timeout=None):
                    with one:
                        return await attempt()
        except TimeoutError as error:
            raise TransferError(
                f"GET {shown_url(self.source.url)} is not complete after {self.limits.max_seconds:g} s "
                f"(WORKER_DOWNLOAD_TIMEOUT_SEC); {self.part.size} bytes have come, and then: {trouble}"
            ) from error
        raise AssertionError("stamina ends with a result or an error")

    async def _attempt(self) -> bool:
        """Ask once, following redirects; every hop is checked like the first URL."""
        url, headers, with_token = self.source.url, dict(self.source.headers), self.source.with_token
        if (first := read_address(url, what="the URL")).credentials and "authorization" not in {
            *map(str.lower, headers)
        }:
            headers["Authorization"] = first.credentials  # also for the next hop, if that has the same origin
        stall_sec = _STALL_SEC if self.source.timeout_sec is None else self.source.timeout_sec
        for _ in range(_MOST_REDIRECTS + 1):
            call = self.link.prepare("GET", url, headers, own=self._own_headers(), with_token=with_token)
            async with self.link.exchange(call, None, stall_sec=stall_sec) as answer:
                if answer.status_code not in REDIRECTS:
                    return await self._take(call, answer)
                place = next_place(call, answer)
            url = place.url
            if place.origin != call.origin:
                headers, with_token = {}, False
        raise RefusedError(
            f"GET {shown_url(self.source.url)} was redirected more than {_MOST_REDIRECTS} times. {_NEXT_STEPS[0]}"
        )

    @property
    def _resumes(self) -> bool:
        return bool(self.part.size and self._strong)

    def _own_headers(self) -> dict[str, str]:
        own = dict.fromkeys(_OWN, "")
        if self._resumes:
            own |= {"Range": f"bytes={self.part.size}-", "If-Range": self._strong}
        elif self.known:
            is_etag = self.known.startswith(('"', "W/"))
            own["If-None-Match" if is_etag else "If-Modified-Since"] = self.known
        return own

    async def _take(self, call: HttpCall, answer: httpx.Response) -> bool:
        status = answer.status_code
        if status == 304 and self.known and not self._resumes:
            return False
        if self._resumes and (status == 416 or (status == 206 and not self._goes_on(answer))):
            await self.part.restart()
            raise TransferError(f"{call.shown} did not go on where it broke off; it starts over")
        if status == 200:
            await self._begin(answer)
        elif not (status == 206 and self._resumes):
            raise await failure(call, answer, next_steps=_NEXT_STEPS)
        encoding = answer.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise RefusedError(
                f"{call.shown} sends the file in Content-Encoding {call.clean(encoding)[:40]!r}, unasked: its size and "
                "digest would be of something else. Let the server send it as it is."
            )
        await self._receive(call, answer)
        return True

    async def _begin(self, answer: httpx.Response) -> None:
        if self.part.size:  # the file has changed, or the server knows no ranges
            await self.part.restart()
        length = answer.headers.get("content-length", "")
        self._total = int(length) if _DIGITS.fullmatch(length) else None
        etag = answer.headers.get("etag", "").strip()
        self._strong = etag if _STRONG.fullmatch(etag) else ""
        validator = etag or answer.headers.get("last-modified", "").strip()
        self.found_validator = validator if _VALIDATOR.fullmatch(validator) else ""

    def _goes_on(self, answer: httpx.Response) -> bool:
        """Whether a 206 is the rest of what we have."""
        match = _RANGE.fullmatch(answer.headers.get("content-range", "").strip())
        if match is None or int(match[1]) != self.part.size or answer.headers.get("etag", self._strong) != self._strong:
            return False
        if match[3] != "*" and self._total is None:
            self._total = int(match[3])
        return match[3] == "*" or (int(match[3]) == self._total and int(match[2]) == self._total - 1)

    async def _receive(self, call: HttpCall, answer: httpx.Response) -> None:
        self._check_size(call, self._total or 0)
        try:
            async for piece in answer.aiter_raw():
                self._check_size(call, self.part.size + len(piece))
                if await self.part.add(piece):
                    self.on_progress(self.part.size, self._total)
            if self._total is not None and self.part.size != self._total:
                raise TransferError(f"{call.shown} ended after {self.part.size} of {self._total} bytes")
        finally:
            self.on_progress(self.part.size, self._total)

    def _check_size(self, call: HttpCall, size: int) -> None:
        if size > self.limits.max_bytes:
            raise RefusedError(
                f"{call.shown} is larger than the {self.limits.max_bytes} bytes that WORKER_DOWNLOAD_MAX_BYTES allows"
            )


def default_name(url: str, filename: str | None) -> str:
    """A safe name for a fetched file: `filename`, else the last segment of the URL's path, else "checkpoint"."""
    try:
        path = urlsplit(url).path
    except ValueError:
        path = ""
    for candidate in (filename or "", unquote(path)):
        last = candidate.replace("\\", "/").rstrip("/").rpartition("/")[2]
        name = _UNSAFE.sub("_", last)[-_LONGEST_NAME:].lstrip(".")
        if name.strip("._"):
            return name
    return "checkpoint"


def next_place(call: HttpCall, answer: httpx.Response) -> WebAddress:
    """Where a redirect leads; `prepare` looks whether that may be called."""
    location: str = answer.extensions.get(LOCATION, "")
    if not location:
        raise RefusedError(f"{call.shown} was redirected, but not told where to. {_NEXT_STEPS[0]}")
    shown = call.clean(shown_place(call, location))
    try:
        place = read_address(urljoin(call.url, location), what=f"the redirect of {call.shown} to")
    except ValueError:
        raise RefusedError(f"{call.shown} was redirected to something that is no URL. {_NEXT_STEPS[0]}") from None
    if call.origin.scheme == "https" and place.origin.scheme != "https":
        raise RefusedError(f"{call.shown} was redirected from https to {shown}, which anybody on the way could read")
    return place
