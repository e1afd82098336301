"""The rules that keep the rooms apart (DESIGN 5): names, imports, who reads the environment, sizes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("worker", "executors", "orchestrator_client")
MODULES = [file for package in PACKAGES for file in sorted((REPO / package).rglob("*.py"))]
MAY_IMPORT = {
    "worker": {"worker", "executors", "orchestrator_client"},
    "executors": {"executors"},
    "orchestrator_client": {"orchestrator_client"},
}
MOST_LINES = 400
MOST_LINES_OF_MAIN = 70
LONGER = {"worker/settings.py"}
"""Files that may be longer: one list of all settings reads best in one place."""


def name_of(file: Path) -> str:
    return file.relative_to(REPO).as_posix()


def imported(file: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: imports here are absolute"
            yield node.module or ""


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_no_module_shadows_another(file: Path):
    """`python worker/main.py` and torchrun put the folder of the script first on `sys.path`."""
    if file.stem == "__init__":
        return
    installed = {name for name in packages_distributions() if name not in PACKAGES}
    assert file.stem not in sys.stdlib_module_names
    assert file.stem not in installed
    assert file.stem not in PACKAGES


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_go_one_way(file: Path):
    room = file.relative_to(REPO).parts[0]
    ours = {name.partition(".")[0] for name in imported(file)} & set(PACKAGES)
    assert ours <= MAY_IMPORT[room]


def test_only_the_entry_file_of_the_command_line_imports_main():
    users = {name_of(file) for file in MODULES if "worker.main" in set(imported(file))}
    assert users <= {"worker/commands/command_line.py"}


def test_the_daemon_imports_nothing_of_the_command_line():
    for file in (REPO / "worker").glob("*.py"):
        assert not any(name.startswith("worker.commands") for name in imported(file)), name_of(file)


def test_the_page_on_executors_shows_the_example_as_it_is():
    page = (REPO / "docs" / "adding-an-executor.md").read_text()
    example = (REPO / "examples" / "word-count-executor" / "word_count_executor.py").read_text()
    shown = [block.partition("```")[0].strip() for block in page.split("```python\n")[1:3]]
    assert len(shown) == 2
    for block in shown:
        assert block in example


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_only_settings_reads_the_environment(file: Path):
    if file == REPO / "worker" / "settings.py":
        return
    readers = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"} and _is_os(node.value)
    ]
    assert not readers, f"{name_of(file)} reads the environment in lines {readers}"
    names = {
        alias.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        for alias in node.names
    }
    assert not names & {"environ", "getenv"}


def _is_os(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "os"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_files_are_short(file: Path):
    lines = len(file.read_text().splitlines())
    assert lines <= MOST_LINES or name_of(file) in LONGER


def test_the_entry_file_is_thin():
    assert len((REPO / "worker" / "main.py").read_text().splitlines()) <= MOST_LINES_OF_MAIN


def test_no_redis_below_the_engine_and_no_blocking_process_in_the_client():
    """Fetching, running and recording are different modules (EXAMPLES 3.4)."""
    for file in (REPO / "executors").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(file)} & {"redis", "httpx", "requests"}, name_of(file)
    for file in (REPO / "orchestrator_client").rglob("*.py"):
        assert "subprocess" not in set(imported(file)), name_of(file)  # archives use asyncio's, which can be cancelled
    assert not any(name.startswith("redis") for name in imported(REPO / "worker" / "engine_process.py"))
