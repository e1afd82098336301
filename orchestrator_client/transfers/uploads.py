"""Sending results and files to the orchestrator (WIRE 6). Each call is one attempt; see `http_link.with_patience`."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from pydantic import JsonValue
from pydantic_core import to_json

from orchestrator_client.errors import RefusedError, TransferError
from orchestrator_client.transfers.file_body import FileBody, opened
from orchestrator_client.transfers.http_answers import REDIRECTS, failure
from orchestrator_client.transfers.http_link import HttpCall, HttpLink, Target
from orchestrator_client.transfers.web_addresses import extended, read_address

if TYPE_CHECKING:
    import httpx

_RESULT_STALL_SEC: Final = 15.0
_FILE_STALL_SEC: Final = 30.0
_LEAST_TOTAL_SEC: Final = 300.0
_LEAST_BYTES_PER_SEC: Final = 64 * 1024
_MOST_REPLY_BYTES: Final = 64 * 1024
_REPLY_SEC: Final = 5.0
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_TYPES: Final = (
    ((".tar.gz", ".tgz", ".gz"), "application/gzip"),
    ((".jsonl",), "application/x-ndjson"),
    ((".json",), "application/json"),
)
_NO_REDIRECT: Final = "Sending follows no redirects: use the final URL in the task or in RESULTS_UPLOAD_URL."
_CREDENTIALS: Final = (
    "Set ORCHESTRATOR_TOKEN (it goes to the origins of ORCHESTRATOR_BASE_URL and RESULTS_UPLOAD_URL only), or give an "
    "Authorization header in the task."
)
_PLACE: Final = "Correct the URL in the task, or set RESULTS_UPLOAD_URL."
_NEXT_STEPS: Final = {
    0: "It is not tried again by itself: look into the peer's log.",
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: _PLACE,
    405: _PLACE,
    413: "It is too large for the peer, or for a proxy before it: raise the limit there.",
    **dict.fromkeys(REDIRECTS, _NO_REDIRECT),
}


@dataclass(frozen=True)
class ResultBody:
    """What a result's request holds.

    Attributes:
        task_id: whose result it is.
        worker_id: who made it.
        metadata: more about it; no NaN.
        result_file: its `responses.json`, an object, sent as it lies there.
    """

    task_id: str
    worker_id: str
    result_file: Path
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)


async def post_result(link: HttpLink, target: Target, body: ResultBody) -> None:
    """Send a result once.

    Raises:
        TransferError: it did not work; another attempt may.
        RefusedError: the peer or a check of ours said no for good.
        OSError: the file cannot be read.
    """
    envelope = to_json(
        {"task_id": body.task_id, "worker_id": body.worker_id, "metadata": dict(body.metadata)}, inf_nan_mode="null"
    )
    with opened(body.result_file) as file:
        if (file.first_byte(), file.last_byte()) != (b"{", b"}"):
            raise RefusedError(f"{body.result_file} holds no JSON object: it cannot be sent as a result")
        content = FileBody(
            file, head=envelope[:-1] + b',"result":', tail=b"}", bandwidth=link.bandwidth, on_progress=_unheard
        )
        own = {"Content-Type": "application/json", "Content-Length": str(content.length)}
        call = link.prepare(target.method, target.url, target.headers, own=own)
        if call.method == "GET":
            raise RefusedError(
                "the method 'GET' sends no result: expected POST, PUT or PATCH in the task's destination"
            )
        await _send(link, call, content, _RESULT_STALL_SEC if target.timeout_sec is None else target.timeout_sec)


async def upload_file(  # noqa: PLR0913, PLR0917 - what, where to, under which name; each is one word at the caller's
    link: HttpLink, target: Target, task_id: str, path: Path, name: str, on_progress: Callable[[int, int], None]
) -> str:
    """Send a file once.

    Args:
        link: the client.
        target: the results route.
        task_id: whose file it is.
        path: the file.
        name: its name over there: letters, digits, `.`, `_`, `-`.
        on_progress: hears bytes sent and bytes in all; often, on the loop.

    Returns:
        The URL from which it can be downloaded, without userinfo and query.

    Raises:
        TransferError: it did not work; another attempt may.
        RefusedError: the peer or a check of ours said no for good.
        ValueError: a name that no orchestrator takes.
        OSError: the file cannot be read.
    """
    where = file_url(target, task_id, name)
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        f"Content-Type: {_type_of(name)}\r\n\r\n"
    )
    with opened(path) as file:
        content = FileBody(
            file,
            head=head.encode(),
            tail=f"\r\n--{boundary}--\r\n".encode(),
            bandwidth=link.bandwidth,
            on_progress=on_progress,
        )
        own = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(content.length)}
        url = extended(target.url, f"/{quote(task_id, safe='')}/files")
        call = link.prepare("POST", url, target.headers, own=own)
        await _send(link, call, content, _FILE_STALL_SEC if target.timeout_sec is None else target.timeout_sec)
    return where


def file_url(target: Target, task_id: str, name: str) -> str:
    """Where an uploaded file can be downloaded (WIRE 6): without userinfo and query, which may be secrets.

    Raises:
        ValueError: a name that no orchestrator takes.
        AddressError: the target is no URL.
    """
    if not _NAME.fullmatch(name) or name in {".", ".."}:
        raise ValueError(f"{name!r} is no name for an uploaded file: expected letters, digits, '.', '_' and '-'")
    place = read_address(target.url, what="the URL").url.partition("?")[0]
    return extended(place, f"/{quote(task_id, safe='')}/files/{name}")


async def _send(link: HttpLink, call: HttpCall, body: FileBody, stall_sec: float) -> None:
    total_sec = max(_LEAST_TOTAL_SEC, body.length / _LEAST_BYTES_PER_SEC)
    try:
        async with asyncio.timeout(total_sec) as limit:

            def put_off(seconds: float) -> None:
                limit.reschedule((limit.when() or 0.0) + seconds)

            body.on_pause = put_off
            async with aclosing(body.pieces()) as pieces, link.exchange(call, pieces, stall_sec=stall_sec) as answer:
                if not answer.is_success:
                    raise await failure(call, answer, next_steps=_NEXT_STEPS)
                if not body.is_sent:
                    raise TransferError(
                        f"{call.shown} was answered with {answer.status_code} after {body.sent} of {body.length} bytes"
                    )
                await _read_away(answer)
    except TimeoutError as error:
        raise TransferError(
            f"{call.shown} took longer than {total_sec:g} s: {body.sent} of {body.length} bytes sent"
        ) from error


async def _read_away(answer: httpx.Response) -> None:
    """Read a short reply, so that the connection can be used again. The status has said all that counts."""
    import httpx  # noqa: PLC0415 - the daemon starts without it

    size = 0
    try:
        async with asyncio.timeout(_REPLY_SEC):
            async for piece in answer.aiter_raw():
                size += len(piece)
                if size > _MOST_REPLY_BYTES:
                    return
    except (httpx.TransportError, TimeoutError):
        return  # acknowledged is acknowledged; only this connection is lost


def _type_of(name: str) -> str:
    return next((kind for endings, kind in _TYPES if name.endswith(endings)), "application/octet-stream")


def _unheard(_sent: int, _total: int) -> None:
    pass
