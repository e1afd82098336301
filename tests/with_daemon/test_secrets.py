"""The broker's password and the orchestrator's token turn up nowhere: no log, no result, no event, no key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_world import World
from http_orchestrator import HttpOrchestrator
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


SPEC_SECRET = "hunter2secret"


def test_secrets_of_specs_and_settings_turn_up_nowhere(world: World, tmp_path: Path):
    with HttpOrchestrator(tmp_path / "orchestrator") as orchestrator:
        daemon = world.start(
            ORCHESTRATOR_TOKEN=f"{TOKEN}\n",
            ORCHESTRATOR_BASE_URL=orchestrator.base_url.replace("http://", f"http://me:{PASSWORD}@"),
            RESULTS_UPLOAD_URL=f"{orchestrator.results_url}?sig={PASSWORD}",
        )
        url = f"http://u:{SPEC_SECRET}@h/x?sig={SPEC_SECRET}"
        headers = {"X-Key": SPEC_SECRET}
        rows = {"type": "list", "items": ["a"]}
        ends = [
            world.run({"taskType": "inference", "checkpoint": {"load": {"url": [url], "headers": "a"}}, "data": rows}),
            world.run({"taskType": "subject", "act": "environment"}),
            world.run({"taskType": "echo", "data": {"url": url, "headers": headers}, "X-API-Key": SPEC_SECRET}),
            world.run({"taskType": "echo", "output": {"destination": {"type": "http", "headers": {"X-Key": None}}}}),
        ]
        assert [end.ok for end in ends] == [False, True, True, True], [end.error for end in ends]
        assert orchestrator.result(ends[-1].event["task_id"]) is not None
        (call,) = orchestrator.seen("result")
        assert call.headers["authorization"] == f"Bearer {TOKEN}"
    assert "spec.checkpoint.load.url is ['http://h/x?sig=***']" in ends[0].error
    kept = "".join(world.events.raw) + _everything_in(world)
    assert daemon.stop() == 0
    results = [file for end in ends for file in end.folder.rglob("*") if file.is_file()]
    shown = [kept, daemon.stdout, daemon.stderr, daemon.log_text, *(file.read_text() for file in results)]
    for secret in (SPEC_SECRET, PASSWORD, TOKEN):
        assert [text for text in shown if secret in text] == []
