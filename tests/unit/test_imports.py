"""In a fresh interpreter: importing the daemon, or any executor module, loads no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
HEAVY = frozenset(
    {
        "torch", "transformers", "vllm", "trl", "peft", "datasets", "accelerate", "sentence_transformers", "numpy",
        "pandas", "pyarrow", "tokenizers", "huggingface_hub", "jinja2", "scipy", "gguf", "qdrant_client",
    }
)  # fmt: skip
FOR_PEOPLE = frozenset({"typer", "yaml"})
"""Light, but not the daemon's business: they belong to the command line. (structlog itself imports a bit of rich.)"""


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout))


def modules_of(package: str) -> list[str]:
    return [f"{package}.{file.stem}" for file in sorted((REPO / package).glob("*.py")) if file.stem != "__init__"]


def test_the_daemon_loads_nothing_heavy():
    loaded = loaded_by("import worker.main, worker.app_wiring")
    assert "redis" in loaded
    assert not loaded & (HEAVY | FOR_PEOPLE)


def test_no_module_of_ours_loads_anything_heavy():
    names = [name for package in ("executors", "orchestrator_client", "worker") for name in modules_of(package)]
    assert not loaded_by(f"import {', '.join(names)}") & HEAVY


def test_reading_every_executor_class_loads_nothing_heavy():
    every = "[entry for found in catalog.entries().values() for entry in found if not catalog.missing_libraries(entry)]"
    loaded = loaded_by(f"from executors import catalog\nfor entry in {every}: catalog.executor_class(entry)")
    assert "executors" in loaded
    assert not loaded & HEAVY


def test_importing_the_catalog_loads_no_executor():
    statement = "import executors.catalog, sys; sys.modules.pop('executors.catalog')\n"
    check = (
        "assert not {'executors.inference.on_transformers.text_generation', 'executors.echo_task'} & sys.modules.keys()"
    )
    loaded_by(statement + check)


@pytest.mark.parametrize("package", ["executors", "orchestrator_client"])
def test_the_lower_packages_load_nothing_of_the_upper_ones(package: str):
    loaded = loaded_by(f"import {', '.join(modules_of(package))}")
    assert not loaded & ({"worker", "executors", "orchestrator_client"} - {package})
