"""The tests' orchestrator over HTTP: WIRE section 6 on real sockets, in a thread, with faults on request.

`with HttpOrchestrator(folder, token="t") as orch:` runs it. `orch.fail("upload", status=503, times=3)`
spoils the next three uploads. `orch.file("task-1", "final_model.tar.gz")` is what was stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import anyio
import uvicorn
from http_faults import ConnectionProtocol, Fault, FaultLayer, Kind, Lie, Seen
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from waiting_until import wait_until

Json = dict[str, Any]
_RESULTS = "/api/v1/results"


class HttpOrchestrator:
    """An orchestrator's HTTP side. Every method may be called from any thread.

    Args:
        folder: stored things lie in `<folder>/<task id>/`: `posted.json`, and files in `artifacts/`.
        token: when given, every call but /healthz needs it as bearer.
        port: 0 takes a free one, which stays the same over `stop` and `start`.
    """

    def __init__(self, folder: Path, *, token: str = "", port: int = 0) -> None:
        self.folder = folder
        self._token = token
        self._layer = FaultLayer(_Authorization(self._app(), token))
        # Bound but deaf: the port stays ours while the server is stopped, and connections are refused.
        self._place = _bound_socket(port)
        self.port: int = self._place.getsockname()[1]
        self.part_types: list[str | None] = []
        """Content types of the parts that were stored, in order."""
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def results_url(self) -> str:
        return f"{self.base_url}{_RESULTS}"

    def file_url(self, task_id: str, name: str) -> str:
        return f"{self.results_url}/{task_id}/files/{name}"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._place.close()

    def start(self) -> None:
        """Listen, on the same port as before."""
        assert self._server is None, "it runs already"
        listener = _bound_socket(self.port)
        config = uvicorn.Config(
            self._layer, http=ConnectionProtocol, ws="none", lifespan="off", loop="asyncio", log_config=None,
            log_level="critical", access_log=False, timeout_keep_alive=30,
        )  # fmt: skip
        server = self._server = _Server(config, self._layer)
        self._thread = threading.Thread(target=server.run, args=([listener],), name="http orchestrator")
        self._thread.start()
        wait_until(lambda: server.started, "the orchestrator's HTTP side listens")

    def stop(self) -> None:
        """Cut all connections and listen no more. A second call does nothing."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the orchestrator's HTTP side does not end"
        self._server = self._thread = None

    # What went wrong, by request. `kind`: "upload" (POST of a file), "result" (POST), "download" (GET of a file).

    def fail(
        self, kind: Kind, *, status: int, times: int = 1, headers: Mapping[str, str] | None = None,
        body: bytes = b"told to fail", stored: bool = False,
    ) -> None:  # fmt: skip
        """Answer a status, after the body was read (`stored`: and kept, as if only the answer had gone wrong)."""
        self._layer.add(kind, Fault(status=status, headers=headers or {}, body=body, stored=stored), times)

    def answer_early(self, kind: Kind, *, status: int, times: int = 1, body: bytes = b"told to fail") -> None:
        """Answer a status without reading the body."""
        self._layer.add(kind, Fault(status=status, body=body, early=True), times)

    def cut(self, kind: Kind, *, after_bytes: int, times: int = 1, stored: bool = False) -> None:
        """End the connection when that much of the body has come in (download: gone out).

        `stored`: everything was taken and kept; only the answer never comes.
        """
        self._layer.add(kind, Fault(cut_after=after_bytes, stored=stored), times)

    def hang(self, kind: Kind, *, times: int = 1, stored: bool = False) -> None:
        """Say nothing until `release`, then be honest. `stored`: take and keep everything first, then say nothing."""
        self._layer.add(kind, Fault(hang=True, stored=stored), times)

    def release(self) -> None:
        """Let what hangs go on."""
        self._layer.release()

    def redirect(self, kind: Kind, to: str, *, status: int = 302, times: int = 1) -> None:
        """Answer with a redirect."""
        self._layer.add(kind, Fault(status=status, headers={"location": to}, body=b"elsewhere"), times)

    def lie(self, how: Lie, *, times: int = 1) -> None:
        """Let a download be wrong.

        short: less than its Content-Length. endless: a body that never ends. trickle: the same, a byte at a time.
        ignore_range: the whole in answer to a Range. wrong_range: another range than asked for. wrong_content: other
        bytes of the same length. gzip: a Content-Encoding that nobody asked for. no_etag: only Last-Modified.
        """
        self._layer.add("download", Fault(lie=how), times)

    def forget_faults(self) -> None:
        """Be honest from here on."""
        self._layer.clear()
        self._layer.release()

    # What there is.

    @property
    def requests(self) -> list[Seen]:
        """All calls so far, in the order in which they came; unfinished ones too."""
        return self._layer.seen()

    def seen(self, kind: Kind) -> list[Seen]:
        return [call for call in self.requests if call.kind == kind]

    def result(self, task_id: str) -> Json | None:
        """What was posted for a task: task_id, result, worker_id, metadata, received_at; None if nothing was."""
        try:
            found: Json = json.loads((self._task_folder(task_id) / "posted.json").read_bytes())
        except FileNotFoundError:
            return None
        return found

    def file(self, task_id: str, name: str) -> bytes | None:
        """A file that was uploaded; None if it was not."""
        try:
            return (self._task_folder(task_id) / "artifacts" / name).read_bytes()
        except FileNotFoundError:
            return None

    def put_file(self, task_id: str, name: str, content: bytes) -> str:
        """Place a file for download. Returns its URL."""
        path = self._task_folder(task_id) / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self.file_url(task_id, name)

    def _task_folder(self, task_id: str) -> Path:
        return self.folder / quote(task_id, safe="").replace(".", "%2E")

    # WIRE 6.

    def _app(self) -> Starlette:
        files = f"{_RESULTS}/{{task_id}}/files"
        return Starlette(
            routes=[
                Route("/healthz", _healthz),
                Route(_RESULTS, self._post_result, methods=["POST", "PUT"]),
                Route(f"{_RESULTS}/{{task_id}}", self._get_result, methods=["GET"]),
                Route(files, self._post_file, methods=["POST"]),
                Route(f"{files}/{{name}}", self._get_file, methods=["GET"]),
            ]
        )

    async def _post_result(self, request: Request) -> Response:
        raw = await request.body()
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            return _refusal(422, "expected Content-Type: application/json")
        try:
            body = json.loads(raw, parse_constant=_no_constant)
        except ValueError as error:
            return _refusal(422, f"no JSON: {error}")
        if trouble := _trouble_of_result(body):
            return _refusal(422, trouble)
        folder = self._task_folder(body["task_id"])
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: body.get(name) for name in ("task_id", "result", "worker_id", "metadata", "received_at")}
        _write_whole(folder / "posted.json", json.dumps(kept).encode())
        return JSONResponse({"ok": True, "path": str(folder / "responses.json")})

    async def _get_result(self, request: Request) -> Response:
        found = self.result(request.path_params["task_id"])
        return JSONResponse(found) if found is not None else _refusal(404, "no such result")

    async def _post_file(self, request: Request) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "multipart/form-data":
            async for _ in request.stream():
                pass
            return _refusal(422, f"expected multipart/form-data, not {media_type}")
        async with request.form() as form:
            part = form.get("file")
            if not isinstance(part, UploadFile):
                return _refusal(422, "expected one part named file")
            name = part.filename or ""
            if "/" in name or name in {"", ".", ".."}:
                return _refusal(400, "bad filename")
            folder = self._task_folder(request.path_params["task_id"]) / "artifacts"
            await anyio.to_thread.run_sync(_keep, part, folder / name)
            self.part_types.append(part.content_type)
        return JSONResponse({"ok": True, "path": str(folder / name)})

    async def _get_file(self, request: Request) -> Response:
        if request.method == "HEAD":
            return _refusal(405, "no HEAD")
        folder = self._task_folder(request.path_params["task_id"])
        name = request.path_params["name"]
        path = next((found for found in (folder / "artifacts" / name, folder / name) if found.is_file()), None)
        if path is None:
            return _refusal(404, "no such file")
        lie: Lie = request.state.fault.lie
        if lie:
            return _untrue(request, path, lie)
        facts = path.stat()
        answer = FileResponse(path, stat_result=facts, headers={"etag": _etag(path)})
        if _is_current(request, answer.headers["etag"], facts.st_mtime):
            return Response(status_code=304, headers={"etag": answer.headers["etag"]})
        return answer


class _Server(uvicorn.Server):
    """Ends at once: cuts what is open."""

    def __init__(self, config: uvicorn.Config, layer: FaultLayer) -> None:
        super().__init__(config)
        self._layer = layer

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._layer.begin()
        await super().startup(sockets)

    async def main_loop(self) -> None:
        while not self.should_exit:  # looks ten times as often as uvicorn's own
            await self.on_tick(0)
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        self._layer.release_here()
        async with asyncio.timeout(5):
            while self.server_state.connections or self.server_state.tasks:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
                await asyncio.sleep(0.001)


class _Authorization:
    """401 without a bearer token, 403 for a wrong one."""

    def __init__(self, app: Starlette, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI
        request = Request(scope, receive)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not self._token or scope["path"] == "/healthz" or (scheme == "Bearer" and token == self._token):
            await self._app(scope, receive, send)
            return
        try:
            async for _ in request.stream():
                pass
        except ClientDisconnect:
            return
        answer = _refusal(401, "no token") if scheme != "Bearer" else _refusal(403, "wrong token")
        await answer(scope, receive, send)


def _bound_socket(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    return found


async def _healthz(_request: Request) -> Response:
    return JSONResponse({"ok": True})


def _refusal(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status_code=status)


def _trouble_of_result(body: object) -> str:  # noqa: PLR0911 - one for each field
    if not isinstance(body, dict):
        return "expected an object"
    if not isinstance(body.get("task_id"), str) or not body["task_id"].strip():
        return "task_id: expected a string that is not blank"
    if not isinstance(body.get("result"), dict):
        return "result: expected an object"
    if not isinstance(body.get("worker_id"), str | None):
        return "worker_id: expected a string"
    if not isinstance(body.get("metadata"), dict | None):
        return "metadata: expected an object"
    if not isinstance(body.get("received_at", ""), str):
        return "received_at: expected a string"
    return ""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _keep(part: UploadFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        shutil.copyfileobj(part.file, file, 1024**2)
    beside.rename(path)


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.rename(path)


def _etag(path: Path) -> str:
    facts = path.stat()
    return f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'


def _is_current(request: Request, etag: str, changed_at: float) -> bool:
    if asked := request.headers.get("if-none-match"):
        return etag in {part.strip().removeprefix("W/") for part in asked.split(",")}
    if since := request.headers.get("if-modified-since"):
        return int(changed_at) <= parsedate_to_datetime(since).timestamp()
    return False


def _untrue(request: Request, path: Path, lie: Lie) -> Response:  # noqa: PLR0911 - one for each lie
    content = path.read_bytes()
    etag = {"etag": _etag(path)}
    if lie == "short":
        length = str(len(content) + 1000)
        return StreamingResponse(_pieces(content, request), headers={**etag, "content-length": length})
    if lie in {"endless", "trickle"}:
        return StreamingResponse(_for_ever(65536 if lie == "endless" else 1), headers=etag)
    if lie == "wrong_content":
        return Response(hashlib.sha256(content).digest() * (len(content) // 32) + b"!" * (len(content) % 32))
    if lie == "gzip":
        return Response(content, headers={**etag, "content-encoding": "gzip"})
    if lie == "no_etag":
        return Response(content, headers={"last-modified": formatdate(path.stat().st_mtime, usegmt=True)})
    if lie == "wrong_range" and "range" in request.headers:
        span = f"bytes 0-{len(content) - 1}/{len(content)}"
        return Response(content, status_code=206, headers={**etag, "content-range": span})
    return Response(content, headers=etag)


async def _pieces(content: bytes, request: Request) -> AsyncIterator[bytes]:
    yield content
    request.state.connection.close()


async def _for_ever(size: int) -> AsyncIterator[bytes]:
    while True:
        yield b"x" * size
        await anyio.sleep(0 if size > 1 else 0.02)
