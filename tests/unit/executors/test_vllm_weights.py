"""The folder that vLLM loads: refused early, put together from parts, and gone afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from executors.errors import BadSpecError, ModelLoadError
from executors.inference.on_vllm import vllm_weights
from executors.inference.on_vllm.vllm_weights import ready_folders, require_usable
from executors.lora.lora_adapters import Adapter
from executors.weights_source import WeightsSource


def source_of(folder: Path, **fields: object) -> WeightsSource:
    stamp = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir()))
    return WeightsSource(str(folder), fields.pop("gguf_file", None), stamp, **fields)  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder; nobody reads the weights here."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    return folder


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    monkeypatch.setattr(vllm_weights, "read_headers", lambda _folder: {})  # the weights here are none
    return Adapter("a", 0, tmp_path, 1.0, 4, (), (), "", (), None, fan_in_fan_out=False, has_base_copies=False)


def test_a_gguf_file_is_refused_with_the_way_out(model: Path):
    with pytest.raises(
        BadSpecError, match=r"spec\.field is the GGUF file 'a\.gguf', which vLLM does not load"
    ) as caught:
        require_usable(source_of(model, gguf_file="a.gguf"), "spec.field")
    assert "spec.enforce_cpu" in caught.value.hint


@pytest.mark.parametrize("content", [None, b""])
def test_a_folder_without_weights_is_refused(model: Path, content: bytes | None):
    (model / "model.safetensors").unlink()
    if content is not None:
        (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"spec\.field is the folder .*model', which holds no weights"):
        require_usable(source_of(model), "spec.field")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.SAFETENSORS"])
def test_other_names_of_weights_will_do(model: Path, name: str):
    (model / "model.safetensors").rename(model / name)
    require_usable(source_of(model), "spec.field")
    assert (model / name).exists()


def test_a_hub_name_is_for_vllm_to_find(scratch: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_weights, "cached_folder", lambda *_: None)
    source = WeightsSource("org/model", None, ())
    require_usable(source, "spec.field")
    with ready_folders(source, (), {}, scratch) as folders:
        assert (folders.model, folders.tokenizer, folders.local) == ("org/model", "org/model", None)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the revisions main and v2 of one model."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        folder = cache / "models--org--model"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "model.safetensors").write_text(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache / "models--org--model" / "snapshots"


@pytest.mark.parametrize(("revision", "commit"), [(None, "a" * 40), ("v2", "b" * 40)])
def test_a_cached_hub_model_is_the_folder_of_its_revision(
    hub_cache: Path, scratch: Path, revision: str | None, commit: str
):
    options = {"revision": revision} if revision else {}
    with ready_folders(WeightsSource("org/model", None, ()), (), options, scratch) as folders:
        assert folders.local == hub_cache / commit
        assert (folders.model, folders.tokenizer) == (str(hub_cache / commit), str(hub_cache / commit))


@pytest.mark.parametrize(
    "content", [None, '{"weight_map": {"w": "model-00002-of-00002.safetensors"}}', '{"weight_map": 1}']
)
def test_what_the_cache_holds_in_part_is_fetched_by_its_name(hub_cache: Path, scratch: Path, content: str | None):
    snapshot = hub_cache / ("a" * 40)
    (snapshot / "model.safetensors").rename(
        snapshot / ("kept" if content is None else "model-00001-of-00002.safetensors")
    )
    if content is not None:
        (snapshot / "model.safetensors.index.json").write_text(content)
    with ready_folders(WeightsSource("org/model", None, ()), (), {}, scratch) as folders:
        assert (folders.model, folders.local) == ("org/model", None)


def test_a_folder_is_used_where_it_lies(model: Path, scratch: Path):
    with ready_folders(source_of(model), (), {}, scratch) as folders:
        assert (folders.model, folders.tokenizer, folders.local) == (str(model), str(model), model)
        assert not list(scratch.iterdir())
    assert model.is_dir()


def test_a_lone_weights_file_gets_its_bases_configuration_as_links(model: Path, scratch: Path, tmp_path: Path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "trained.safetensors").write_text("trained")
    source = source_of(alone, weights_file="trained.safetensors", base=source_of(model))
    with ready_folders(source, (), {}, scratch) as folders:
        assert folders.local is not None
        found = {file.name: file.read_text() for file in folders.local.iterdir()}
        assert found == {
            "config.json": "config.json",
            "tokenizer.json": "tokenizer.json",
            "model.safetensors": "trained",  # neither the base's weights nor its index
        }
        assert folders.tokenizer == str(model)
        assert folders.model == str(folders.local)
    assert not list(scratch.iterdir())
    assert (model / "model.safetensors").read_text() == "model.safetensors"


def test_a_base_that_is_not_there_yet_is_named(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_weights, "cached_folder", lambda *_: None)
    base = WeightsSource("org/base", None, ())
    source = WeightsSource(str(tmp_path), None, (("w.safetensors", 1, 1),), weights_file="w.safetensors", base=base)
    with (
        pytest.raises(ModelLoadError, match="'org/base' is not in the local cache"),
        ready_folders(source, (), {}, scratch),
    ):
        pytest.fail("there is no folder to use")
    assert not list(scratch.iterdir())


def test_a_merged_model_is_written_used_and_removed(
    model: Path, scratch: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def write(
        location: str, options: Mapping[str, object], tokenizer: str, merged: Sequence[Adapter], to: Path
    ) -> Path:
        assert not to.exists()  # what a killed run left is gone
        calls.append((location, dict(options), tokenizer, list(merged)))
        to.mkdir()
        return to

    monkeypatch.setattr(vllm_weights, "write_merged_model", write)
    left = scratch / "_merged_vllm_model"
    left.mkdir()
    (left / "half").write_text("of a killed run")
    with ready_folders(source_of(model), [adapter], {"revision": "v"}, scratch) as folders:
        assert (folders.model, folders.local) == (str(left), left)
        assert folders.tokenizer == str(model)
        assert left.is_dir()
    assert calls == [(str(model), {"revision": "v"}, str(model), [adapter])]
    assert not list(scratch.iterdir())


def test_nothing_stays_after_a_failure(model: Path, scratch: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> Path:
        (scratch / "_merged_vllm_model").mkdir()
        raise ModelLoadError("does not fit")

    monkeypatch.setattr(vllm_weights, "write_merged_model", fail)
    with pytest.raises(ModelLoadError, match="does not fit"), ready_folders(source_of(model), [adapter], {}, scratch):
        pytest.fail("there is no folder to use")
    assert not list(scratch.iterdir())
