"""One worker's task inputs beside an orchestrator; what tasks ask for, and what they are given."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from http_orchestrator import HttpOrchestrator
from pydantic import SecretStr

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
            concurrent=False,
            folder=Folder(out_dir, ()),
            child_folders={},
            failed_children={},
            warnings=[],
            timeout_sec=0,
            no_progress_sec=0,
            inputs=requests,
            child_inputs={name: (request,) for name, request in given.items()},
        )

    def orch_file(self, name: str, task_id: str = "77aa") -> Path:
        """Where the server has a file."""
        return self.results.parent / "orchestrator" / task_id / "artifacts" / name

    @property
    def entries(self) -> list[Path]:
        return [path for path in (self.results / ".cache").iterdir() if len(path.name) == 64]

    @property
    def leftovers(self) -> list[str]:
        return [path.name for path in (self.results / ".cache").iterdir() if path.name.startswith((".new", ".old"))]

    @property
    def statuses(self) -> list[int | None]:
        return [call.status for call in self.orch.seen("download")]


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
