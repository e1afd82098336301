"""Fixtures for tests of the real daemon: a world for one test, and one that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from daemon_process import DaemonProcess
from daemon_world import World

_WORLD = pytest.StashKey[World]()


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    """A broker and no daemon yet; at the end everything is stopped and nothing may be left."""
    made = World(tmp_path_factory.mktemp("world"))
    request.node.stash[_WORLD] = made
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world of a module with one daemon `w-1`; use `busy_world`."""
    made = World(tmp_path_factory.mktemp("shared"))
    made.start(WORKER_CANCEL_GRACE_SEC="0.5")
    yield made
    made.close()


@pytest.fixture
def busy_world(shared_world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """The module's daemon; after each test it must still be the same process and run the next task."""
    request.node.stash[_WORLD] = shared_world
    pid = only_daemon(shared_world).pid
    yield shared_world
    end = shared_world.run({"taskType": "subject", "act": "fine"})
    assert end.ok, f"the daemon does not run the next task: {end.error}"
    assert only_daemon(shared_world).running
    assert only_daemon(shared_world).pid == pid


def only_daemon(world: World) -> DaemonProcess:
    """The one daemon of a world."""
    (daemon,) = world.daemons
    return daemon


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:  # noqa: ANN401 - the hook's own type
    """Show the daemons' logs with a failure."""
    report = yield
    if report.failed and (world := item.stash.get(_WORLD, None)) is not None:
        report.sections.append(("daemon logs", world.log_tail()))
    return report
