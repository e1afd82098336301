"""Models that cannot be loaded are told before any process of vLLM starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapter_files import make_adapter
from executor_tasks import TaskMaker, adapter
from model_files import bundled_model, make_tiny_model

from executors.errors import BadSpecError, ExecutorError, ModelLoadError
from executors.inference.memory_forecast import NotEnoughHostMemoryError
from executors.inference.on_vllm import vllm_arguments
from executors.inference.on_vllm.vllm_generation import VllmGeneration

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("imported_vllm")]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExecutorError]:
    """Load a model in vain; returns why."""

    def no_engine(*_: object) -> None:
        pytest.fail("an engine was about to start")

    def load(model: Path | str, **fields: object) -> ExecutorError:
        monkeypatch.setattr("executors.inference.on_vllm.vllm_start.VllmLink", no_engine)
        tasks = TaskMaker(tmp_path / "tasks", Path(model), roots=[tmp_path, bundled_model().parent])
        with pytest.raises(ExecutorError) as caught:
            VllmGeneration().load(tasks.task(["x"], model=model, **fields))
        return caught.value

    return load


def test_a_hub_model_that_is_not_in_the_cache(refused: Callable[..., ExecutorError]):
    error = refused("acme/no-such-model")
    assert isinstance(error, ModelLoadError)
    assert "spec.model.source.identifier 'acme/no-such-model' cannot be loaded" in error.message
    assert "HF_HUB_OFFLINE" in error.hint


def test_a_folder_without_weights(refused: Callable[..., ExecutorError], tiny: Path):
    (tiny / "model.safetensors").unlink()
    error = refused(tiny)
    assert isinstance(error, ModelLoadError)
    assert "holds no weights" in error.message


def test_a_gguf_file(refused: Callable[..., ExecutorError]):
    error = refused(bundled_model())
    assert isinstance(error, BadSpecError)
    assert "GGUF" in error.message
    assert "spec.enforce_cpu" in error.hint


def test_too_little_memory(refused: Callable[..., ExecutorError], tiny: Path, monkeypatch: pytest.MonkeyPatch):
    little = SimpleNamespace(available=100 * 1024**2)  # far below what the libraries alone need
    monkeypatch.setattr(vllm_arguments, "psutil", SimpleNamespace(virtual_memory=lambda: little))
    error = refused(tiny)
    assert isinstance(error, NotEnoughHostMemoryError)
    assert "available are 0.1 GiB" in error.message


@pytest.mark.parametrize("content", [b"{}", b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00not json........"])
def test_damaged_weights(refused: Callable[..., ExecutorError], tiny: Path, content: bytes):
    (tiny / "model.safetensors").write_bytes(content)
    error = refused(tiny)
    assert isinstance(error, ModelLoadError)
    assert "model.safetensors" in error.message


def test_a_damaged_configuration(refused: Callable[..., ExecutorError], tiny: Path):
    (tiny / "config.json").write_text("{")
    error = refused(tiny)
    assert isinstance(error, ModelLoadError)
    assert str(tiny) in error.message


def test_an_adapter_of_another_model(refused: Callable[..., ExecutorError], tiny: Path, tmp_path: Path):
    folder = make_adapter(tiny, tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "model.safetensors").unlink()
    make_wider(other)
    error = refused(other, adapters=[adapter(folder, name="a", apply="merge")])
    assert isinstance(error, BadSpecError)
    assert "'a' does not belong to the model" in error.message


def make_wider(folder: Path) -> None:
    """Replace a tiny model's weights by wider ones."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size = 48
    config.head_dim = 24
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
