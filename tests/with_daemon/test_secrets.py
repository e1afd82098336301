"""The broker's password and the orchestrator's token turn up nowhere: no log, no result, no event, no key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemon_world import World
from waiting_until import wait_until

PASSWORD = "correct-horse-battery"
TOKEN = "tok-4711-very-secret"


@pytest.fixture
def locked_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("locked"), password=PASSWORD)
    yield made
    made.close()


def test_secrets_turn_up_nowhere(locked_world: World):
    world = locked_world
    daemon = world.start(ORCHESTRATOR_TOKEN=TOKEN)
    assert world.run({"taskType": "subject", "act": "environment"}).ok
    assert not world.run({"taskType": "subject", "act": "sys_exit"}).ok
    assert not world.run({"taskType": "nonsense"}).ok
    kept = "".join(world.events.raw) + _everything_in(world)
    world.server.stop()  # connection errors name the broker
    wait_until(lambda: daemon.logged("reconnect"), "it tries to reconnect")
    assert daemon.stop() == 0
    files = [file for file in world.folder.rglob("*") if file.is_file()]
    assert any(file.name == "engine.log" for file in files)
    assert any(file.name.startswith("journal.sqlite3") for file in files)
    for secret in (PASSWORD, TOKEN):
        assert secret not in kept
        assert [file for file in files if secret.encode() in file.read_bytes()] == []
        assert secret not in daemon.stdout + daemon.stderr


def _everything_in(world: World) -> str:
    return " ".join(str(world.redis.hgetall(key)) for key in world.redis.keys("*") if world.redis.type(key) == "hash")
