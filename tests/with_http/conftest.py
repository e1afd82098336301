"""A real HTTP orchestrator, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from http_orchestrator import HttpOrchestrator

from orchestrator_client.transfers import patience
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy


@pytest.fixture
def orch(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator") as running:
        yield running


@pytest_asyncio.fixture
async def link(orch: HttpOrchestrator) -> AsyncIterator[HttpLink]:
    made = HttpLink(HttpPolicy(base_url=orch.base_url))
    yield made
    await made.aclose()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SEC", 0.001)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_SEC", 0.005)
