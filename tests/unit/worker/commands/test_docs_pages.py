from __future__ import annotations

from pathlib import Path

import pytest

from worker import exit_codes
from worker.commands import docs_pages
from worker.settings import described


def test_the_page_names_everything():
    page = docs_pages.configuration_page()
    for name, _, _ in described():
        assert f"| `{name}` |" in page
    assert f"| {exit_codes.BAD_CONFIG} |" in page


def test_write_then_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(docs_pages, "PAGE", tmp_path / "docs" / "configuration.md")
    assert docs_pages.main(["--check"]) == exit_codes.FAILED
    assert "make docs" in capsys.readouterr().err
    assert docs_pages.main([]) == exit_codes.OK
    assert docs_pages.main(["--check"]) == exit_codes.OK
    assert docs_pages.main(["--wrong"]) == exit_codes.USAGE
