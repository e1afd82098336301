"""One vLLM engine for the whole session: its start takes about 40 seconds."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from adapter_files import make_adapter
from executor_tasks import Adapters, Json, TaskMaker, adapter
from smollm_folder import smollm_folder
from waiting_until import wait_until

from executors.inference.on_transformers.text_generation import TextGeneration
from executors.inference.on_vllm.vllm_generation import VllmGeneration

ENGINE: Json = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "swap_space": 4,  # vLLM knew it once
    "max_lora_rank": 16,
    # More than all tests together use. In an engine with adapters vLLM computes tasks without one, on the CPU, with
    # whatever adapter its last place holds; the worker gives such tasks an engine of their own, these tests do not.
    "max_loras": 8,
    "dtype": "float32",  # rounding is then too small to change the likeliest token
    "kv_cache_memory_bytes": 512 * 1024**2,  # 45 KiB a token: room for 11 sequences of this length
}


@pytest.fixture(scope="session", autouse=True)
def engine_environment() -> Iterator[None]:
    """What the daemon gives to engine processes; vLLM reads it when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        # Else each engine pins itself to the same cores, and two of them starve each other.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


@pytest.fixture(scope="session")
def imported_vllm() -> ModuleType:
    """What an engine needs, imported already: its modules warn of what they do themselves meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("vllm.v1.engine.async_llm")


@pytest.fixture(scope="session")
def smollm(request: pytest.FixtureRequest) -> Path:
    """The bundled model as a folder in bfloat16, kept between test runs."""
    return smollm_folder(request.config.cache.mkdir("smollm"))


@pytest.fixture(scope="session")
def adapters(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Two adapters, each strong enough to change nearly every answer."""
    folder = tmp_path_factory.mktemp("adapters")
    return Adapters(
        make_adapter(smollm, folder / "first", rank=4, seed=1, scale_of_b=0.1),
        make_adapter(smollm, folder / "second", rank=8, alpha=16, seed=2, scale_of_b=0.1),
    )


@pytest.fixture(scope="session")
def loaded(
    smollm: Path, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory, imported_vllm: ModuleType
) -> Iterator[VllmGeneration]:
    """The executor with its engine, ready for adapters; closed at the end, and no process of it may stay."""
    del imported_vllm
    before = set(psutil.Process().children(recursive=True))
    executor = VllmGeneration()
    tasks = TaskMaker(tmp_path_factory.mktemp("load"), smollm, roots=[adapters.first.parent], vllm=ENGINE)
    executor.load(tasks.task(["x"], adapters=[adapter(adapters.first)]))
    yield executor
    assert executor._loaded is not None
    started = set(psutil.Process().children(recursive=True)) - before
    assert any(map(_lives, started))
    executor._loaded.link.close()
    wait_until(lambda: not any(map(_lives, started)), "the engine's processes have ended")
    executor._loaded = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # vLLM leaves a context of ZeroMQ to the garbage collector
        gc.collect()


@pytest.fixture(scope="session")
def other(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> TextGeneration:
    """Transformers with the same weights in the same type."""
    executor = TextGeneration()
    executor.load(TaskMaker(tmp_path_factory.mktemp("other"), smollm, transformers={"dtype": "float32"}).task(["x"]))
    return executor


@pytest.fixture
def tasks(smollm: Path, adapters: Adapters, tmp_path: Path) -> TaskMaker:
    """Makes tasks for both executors."""
    return TaskMaker(tmp_path, smollm, roots=[adapters.first.parent], vllm=ENGINE, transformers={"dtype": "float32"})


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; the helpers for shared memory and for output stay as long as this process."""
    try:
        command = " ".join(process.cmdline())
        helper = "resource_tracker" in command or "executors.output_tail" in command
        return process.status() != psutil.STATUS_ZOMBIE and not helper
    except psutil.NoSuchProcess:
        return False
