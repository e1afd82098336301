"""An orchestrator with a token, and a worker's inputs beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from http_orchestrator import HttpOrchestrator
from input_world import TOKEN, World


@pytest.fixture
def orch(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator", token=TOKEN) as running:
        yield running


@pytest.fixture
async def world(tmp_path: Path, orch: HttpOrchestrator) -> AsyncIterator[World]:
    (tmp_path / "results").mkdir()
    made = World(tmp_path / "results", orch)
    yield made
    await made.aclose()
