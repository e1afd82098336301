"""The end of a real engine process comes, whatever goes wrong with looking for what it leaves behind."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

import pytest

from executors.contract import EnginePolicy
from worker import engine_process
from worker.engine_output import EngineOutput
from worker.engine_pool import EnginePool
from worker.engine_process import EngineProcess, EngineSetup

ECHO = "executors.echo_task:EchoTask"


@pytest.fixture
def setup(tmp_path: Path) -> EngineSetup:
    return EngineSetup(f"{tmp_path}/{uuid.uuid4().hex}/", tmp_path / "engine", EnginePolicy())


def fail(*arguments: object) -> None:
    del arguments
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("name", ["tagged", "end_everything"])
async def test_the_engine_ends_though_its_leftovers_cannot_be_looked_for(
    monkeypatch: pytest.MonkeyPatch, setup: EngineSetup, name: str
):
    monkeypatch.setattr(engine_process, name, fail)
    pool = EnginePool(setup, 0)
    first, _ = await pool.acquire("a", ECHO, exclusive=True)

    await pool.release(first, keep=False)

    assert first.ended.done()
    second, warm = await pool.acquire("b", ECHO, exclusive=True)
    assert (second.alive, warm) == (True, False)
    await pool.release(second, keep=True)
    await pool.close()
    assert second.ended.done()


async def test_a_stop_that_broke_may_be_tried_again(monkeypatch: pytest.MonkeyPatch, setup: EngineSetup):
    engine = await EngineProcess.start("a", ECHO, setup)
    with monkeypatch.context() as broken:
        broken.setattr(EngineOutput, "drain", fail)
        with pytest.raises(OSError, match="Too many"):
            await engine.stop()
    assert engine.ended.done()

    await engine.stop()

    assert not engine.alive
