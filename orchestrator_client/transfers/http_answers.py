"""What an HTTP answer that is no success means: whether another try can help, and what a person can do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin

from orchestrator_client.errors import RefusedError, TransferError
from orchestrator_client.transfers.web_addresses import shown_url

if TYPE_CHECKING:
    import httpx

    from orchestrator_client.transfers.http_link import HttpCall

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
LOCATION: Final = "location"
"""Under this name an answer's `extensions` hold its Location header, see `http_link`."""
_TRY_AGAIN: Final = frozenset({408, 425, 429})
_MOST_EXCERPT_BYTES: Final = 8192
_LONGEST_RETRY_AFTER_SEC: Final = 3600.0
_DIGITS: Final = re.compile(r"[0-9]{1,12}")
_HTTP_DATE: Final = "%a, %d %b %Y %H:%M:%S GMT"
"""The one form that is sent since 1999. `email.utils` reads more, and hostile dates end in foreign errors there."""


def retry_after_sec(headers: Mapping[str, str]) -> float | None:
    """Read `Retry-After`, seconds or a date: 0 to 3600 s from now; None if there is none that can be read."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if _DIGITS.fullmatch(text):
        wanted = float(text)
    else:
        try:
            when = datetime.strptime(text, _HTTP_DATE).replace(tzinfo=UTC)
        except ValueError:
            return None  # the usual pause is as good as any
        wanted = (when - datetime.now(UTC)).total_seconds()
    return math.ceil(min(max(wanted, 0.0), _LONGEST_RETRY_AFTER_SEC))


async def failure(call: HttpCall, answer: httpx.Response, *, next_steps: Mapping[int, str]) -> Exception:
    """Make the error for an answer that is no success.

    Args:
        call: what was asked.
        answer: its body has not been read yet.
        next_steps: what a person can do, by status; 0 is for all others.

    Returns:
        A TransferError for what may pass (408, 425, 429, 5xx), else a RefusedError with the status.
    """
    status = answer.status_code
    said = call.clean(await _excerpt(answer))
    text = f"{call.shown} was answered with {status}{_phrase(status)}" + (f": {said}" if said else "")
    if status in _TRY_AGAIN or status >= 500:
        return TransferError(text, retry_after_sec=retry_after_sec(answer.headers))
    step = next_steps.get(status, next_steps[0])
    if status in REDIRECTS and (place := answer.extensions.get(LOCATION)):
        step = f"{step} It points to {call.clean(shown_place(call, place))}"
    return RefusedError(f"{text}. {step}", status=status)


def shown_place(call: HttpCall, place: str) -> str:
    """The URL of a Location for people."""
    try:
        return shown_url(urljoin(call.url, place))
    except ValueError:
        return "(an address that cannot be read)"


async def _excerpt(answer: httpx.Response) -> str:
    import httpx  # noqa: PLC0415 - the daemon starts without it

    body = b""
    try:
        async for piece in answer.aiter_raw():
            body += piece
            if len(body) >= _MOST_EXCERPT_BYTES:
                break
    except httpx.TransportError:
        pass  # the status says what counts; the rest of its explanation is lost
    return body[:_MOST_EXCERPT_BYTES].decode("utf-8", errors="replace")


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""
