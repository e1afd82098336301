"""What the executor `producing` leaves (tests/subjects/producing_subject.py), and whether it arrived."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile

from daemon_world import TaskEnd, World
from http_orchestrator import HttpOrchestrator


def made_bytes(task_id: str, size: int) -> bytes:
    """The content of the model's one file."""
    return random.Random(task_id).randbytes(size)  # noqa: S311 - repeatable is the point


def model_in(archive: bytes, top: str = "final_model") -> bytes:
    """The model's file out of an archive, which holds one folder."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = tar.getnames()
        assert all(name == top or name.startswith(f"{top}/") for name in names), names
        member = tar.extractfile(f"{top}/model.bin")
        assert member is not None
        return member.read()


def check_delivered(world: World, orchestrator: HttpOrchestrator, task_id: str, size: int) -> TaskEnd:
    """Wait for the end: one success, the right bytes on the server and named in the result, computed once."""
    end = world.ended(task_id, within_sec=60)
    assert end.ok, end.error
    archive = orchestrator.file(task_id, "final_model.tar.gz")
    assert archive is not None
    assert model_in(archive) == made_bytes(task_id, size)
    posted = orchestrator.result(task_id)
    assert posted is not None
    assert posted["result"]["final_model_archive_sha256"] == hashlib.sha256(archive).hexdigest()
    assert (end.folder / "runs.txt").read_text() == "ran\n"
    assert len(world.events.ends(task_id)) == 1
    left = [path.name for path in end.folder.iterdir() if path.name.startswith(".")]
    assert not left, f"half-made files are left: {left}"
    return end
