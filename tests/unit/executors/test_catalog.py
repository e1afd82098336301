"""What the catalog holds, and what it says of executors that cannot be imported."""

from __future__ import annotations

import pytest
from choosing_subjects import BROKEN, MISSING

from executors import catalog
from executors.catalog import CatalogEntry, executor_class, install_command, install_hint
from executors.errors import MissingLibraryError


class FakePoint:
    """An entry point of another distribution."""

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value


def test_inference_has_two_executors_in_order_of_preference():
    found = catalog.entries()["inference"]

    assert [(entry.name, entry.target, entry.extra) for entry in found] == [
        ("vllm", "executors.inference.on_vllm.vllm_generation:VllmGeneration", "vllm"),
        ("transformers", "executors.inference.on_transformers.text_generation:TextGeneration", "inference"),
    ]
    assert [entry.key for entry in found] == ["inference.vllm", "inference.transformers"]


def test_an_only_executor_has_the_name_of_its_kind():
    (echo,) = catalog.entries()["echo"]

    assert (echo.name, echo.key) == ("echo", "echo")


def test_no_two_executors_of_a_kind_have_the_same_name():
    for kind, found in catalog.entries().items():
        assert len({entry.name for entry in found}) == len(found), kind


def test_entry_points_add_kinds_but_replace_none(monkeypatch: pytest.MonkeyPatch):
    points = [FakePoint("Poem", "poems:Poem"), FakePoint("inference", "poems:Inference"), FakePoint("poem", "b:B")]
    monkeypatch.setattr(catalog, "entry_points", lambda **_: points)
    built_in = catalog.entries()["inference"]

    found = catalog.entries.__wrapped__()

    assert found["poem"] == (CatalogEntry("poem", "poems:Poem"),)
    assert found["inference"] == built_in


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    with pytest.raises(MissingLibraryError, match="'subject' needs no_such_library, not installed here") as caught:
        executor_class(MISSING)

    assert caught.value.hint == install_hint(MISSING) == "install it on the worker: uv sync --inexact --extra more"
    assert install_command(MISSING) == "uv sync --inexact --extra more"


@pytest.mark.parametrize(
    ("target", "words"),
    [(BROKEN.target, "No module named 'no_such_module'"), ("pathlib:Path", "no subclass"), ("pathlib:No", "no sub")],
)
def test_a_target_that_is_no_executor_is_a_missing_one(target: str, words: str):
    with pytest.raises(MissingLibraryError, match=words):
        executor_class(CatalogEntry("subject", target))


def test_what_another_distribution_brings_is_installed_with_it():
    assert install_hint(BROKEN) == install_command(BROKEN) == "install the distribution that provides no_such_module"
