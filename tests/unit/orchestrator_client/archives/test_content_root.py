"""The folder of an unpacked archive that counts: the only one at the top, or the one asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_client.archives.archive_reader import content_root
from orchestrator_client.errors import ArchiveError


def test_the_root_is_the_only_folder_at_the_top(tmp_path: Path):
    assert content_root(tmp_path, None) == tmp_path
    model = tmp_path / "final_model"
    (model / "sub").mkdir(parents=True)
    assert content_root(tmp_path, None) == model
    assert content_root(tmp_path, " ") == model
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "._final_model").touch()
    assert content_root(tmp_path, None) == model
    (tmp_path / "config.json").touch()
    assert content_root(tmp_path, None) == tmp_path


def test_one_file_at_the_top_is_no_root(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    assert content_root(tmp_path, None) == tmp_path
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "link").symlink_to(".")
    assert content_root(tmp_path, None) == tmp_path


def test_subdir_is_inside(tmp_path: Path):
    unpacked = tmp_path / "unpacked"
    (unpacked / "a" / "b").mkdir(parents=True)
    (unpacked / "a" / "file").touch()
    (unpacked / "in").symlink_to("a")
    (unpacked / "out").symlink_to("..")
    assert content_root(unpacked, "a/b") == unpacked / "a" / "b"
    assert content_root(unpacked, "a/b/") == unpacked / "a" / "b"
    assert content_root(unpacked, "in/b") == unpacked / "a" / "b"
    for subdir in ("missing", "..", "a/../..", "/", str(tmp_path), "out", "a/file", "a\0b"):
        with pytest.raises(
            ArchiveError, match=r"is no folder inside the archive; at the top it holds 'a', 'in', 'out'"
        ):
            content_root(unpacked, subdir)
