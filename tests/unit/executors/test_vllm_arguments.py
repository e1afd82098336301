"""From a spec and a host to the arguments of vLLM's engine, without vLLM."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from executors.contract import EnginePolicy
from executors.errors import BadSpecError
from executors.gpu_memory import GpuMemory
from executors.inference.inference_spec import InferenceSpec
from executors.inference.memory_forecast import NotEnoughHostMemoryError, NotEnoughMemoryError
from executors.inference.on_vllm import vllm_arguments
from executors.inference.on_vllm.vllm_arguments import EnginePlan, engine_key, on_one_gpu, plan_engine, smaller
from executors.inference.on_vllm.vllm_weights import ModelFolders

GIB = 1024**3
HUB = ModelFolders("a/b", "a/b", None)
LORA = {"type": "lora", "path": "/models/adapter"}


@dataclasses.dataclass
class KnownArguments:
    """Stands for vLLM's list of arguments; the tests with vLLM use the real one."""

    model: str = ""
    block_size: int = 0
    swap_space: float = 0
    kv_cache_memory_bytes: int = 0
    cpu_offload_gb: float = 0


@pytest.fixture(autouse=True)
def known_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.AsyncEngineArgs = KnownArguments  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the host says is available."""
    memory = SimpleNamespace(available=16 * GIB)
    monkeypatch.setattr(vllm_arguments.psutil, "virtual_memory", lambda: memory)
    return memory


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, free_gib: int = 79) -> EnginePolicy:
    """A host with GPUs of 80 GiB each."""

    def memory(names: Sequence[str]) -> tuple[GpuMemory, ...]:
        return tuple(GpuMemory(place, name, "H100", 80 * GIB, free_gib * GIB, ()) for place, name in enumerate(names))

    monkeypatch.setattr(vllm_arguments, "gpu_memory", memory)
    return EnginePolicy(gpus=tuple(f"GPU-{number}" for number in range(count)))


def spec_of(vllm: dict[str, object] | None = None, **fields: Any) -> InferenceSpec:  # noqa: ANN401 - JSON
    model = {"source": {"identifier": "a/b"}, "vllm": vllm or {}, **fields.pop("model", {})}
    return InferenceSpec.model_validate({"model": model, "data": {"items": ["x"]}, **fields})


def model_folder(folder: Path, *, heads: int = 4, values: int = 1000) -> ModelFolders:
    """A model's configuration, and the header of its weights; their bytes are a hole in the file."""
    config = {"num_attention_heads": heads, "num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    tensor = {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}
    header = json.dumps({"model.layers.0.weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + 2 * values)
    return ModelFolders(str(folder), str(folder), folder)


def test_what_a_host_without_gpus_gets():
    plan = plan_engine(spec_of(), EnginePolicy(), HUB, on_gpu=False)
    assert (plan.devices, plan.parallel, plan.notes) == ("cpu", 1, ())
    assert plan.arguments == {
        "model": "a/b",
        "tokenizer": "a/b",
        "dtype": "auto",
        "max_model_len": -1,  # vLLM's word for: as long as fits
        "trust_remote_code": False,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "max_logprobs": 20,
        "enforce_eager": True,  # compiling takes longer than most tasks on such a host
        "kv_cache_memory_bytes": 4 * GIB,  # a quarter of what is available
    }
    assert not on_one_gpu(plan, "any")
    assert smaller(plan) == []


@pytest.mark.parametrize(
    ("available", "expected"),
    [(100 * GIB, 8 * GIB), (16 * GIB, 4 * GIB), (GIB, GIB // 2)],  # at most 8 GiB, a quarter, at least 512 MiB
)
def test_room_for_the_cache_on_a_host_without_gpus(host_memory: SimpleNamespace, available: int, expected: int):
    host_memory.available = available
    plan = plan_engine(spec_of(), EnginePolicy(), HUB, on_gpu=False)
    assert plan.arguments["kv_cache_memory_bytes"] == expected


def test_too_little_memory_on_the_host_is_told_with_numbers(host_memory: SimpleNamespace, tmp_path: Path):
    host_memory.available = 100 * 1024**2
    with pytest.raises(
        NotEnoughMemoryError, match=r"'a/b' needs .* GiB of the host's memory .* available are 0\.1 GiB"
    ):
        plan_engine(spec_of(), EnginePolicy(), model_folder(tmp_path), on_gpu=False)


def test_what_a_host_with_gpus_gets(monkeypatch: pytest.MonkeyPatch):
    plan = plan_engine(spec_of(), gpus(monkeypatch, 2), HUB, on_gpu=True)
    assert (plan.devices, plan.parallel, plan.notes) == ("cuda:0,cuda:1", 2, ())
    assert plan.arguments["gpu_memory_utilization"] == 0.9
    assert plan.arguments["enforce_eager"] is False
    assert "kv_cache_memory_bytes" not in plan.arguments


def test_values_of_the_task_reach_the_engine(tmp_path: Path):
    options = {"dtype": "bf16", "max_model_len": 512, "max_num_seqs": 4, "enforce_eager": False}
    wanted = {**options, "download_dir": str(tmp_path)}
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    arguments = plan_engine(spec_of(wanted), policy, HUB, on_gpu=False).arguments
    assert {name: arguments[name] for name in options} == {**options, "dtype": "bfloat16"}
    assert arguments["download_dir"] == str(tmp_path)
    with pytest.raises(BadSpecError, match=r"spec\.model\.vllm\.download_dir"):
        plan_engine(spec_of(wanted), EnginePolicy(), HUB, on_gpu=False)


def test_a_revision_is_of_the_weights_and_of_the_tokenizer():
    spec = spec_of(model={"source": {"identifier": "a/b", "revision": "v2"}})
    arguments = plan_engine(spec, EnginePolicy(), HUB, on_gpu=False).arguments
    assert (arguments["revision"], arguments["tokenizer_revision"]) == ("v2", "v2")
    assert "revision" not in plan_engine(spec_of(), EnginePolicy(), HUB, on_gpu=False).arguments


@pytest.mark.parametrize("wish", [{"kv_cache_memory_bytes": 2**60}, {"cpu_offload_gb": 2**30}])
def test_more_of_the_hosts_memory_than_there_is_is_refused(wish: dict[str, object]):
    with pytest.raises(NotEnoughHostMemoryError, match=rf"spec\.model\.vllm\.{next(iter(wish))}"):
        plan_engine(spec_of(wish), EnginePolicy(), HUB, on_gpu=False)


@pytest.mark.parametrize(("allowed", "expected"), [(True, True), (False, False)])
def test_remote_code_needs_the_operators_word(*, allowed: bool, expected: bool):
    policy = EnginePolicy(allow_remote_code=allowed)
    plan = plan_engine(spec_of({"trust_remote_code": True}), policy, HUB, on_gpu=False)
    assert plan.arguments["trust_remote_code"] is expected


def test_room_for_adapters_is_made_only_where_the_task_has_some():
    assert "enable_lora" not in plan_engine(spec_of(), EnginePolicy(), HUB, on_gpu=False).arguments
    merged = spec_of(model={"adapters": [{**LORA, "apply": "merge"}]})
    assert "enable_lora" not in plan_engine(merged, EnginePolicy(), HUB, on_gpu=False).arguments
    spec = spec_of({"max_lora_rank": 32, "max_loras": 6}, model={"source": {"identifier": "a/b"}, "adapters": [LORA]})
    arguments = plan_engine(spec, EnginePolicy(), HUB, on_gpu=False).arguments
    assert {name: arguments[name] for name in ("enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras")} == {
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 6,
        "max_cpu_loras": 12,
    }


def test_further_arguments_are_passed_on_with_a_word_about_each():
    spec = spec_of({"block_size": 32, "block_siez": 16, "nothing_like_it": 1, "kv_cache_memory_bytes": 7})
    plan = plan_engine(spec, EnginePolicy(), HUB, on_gpu=False)
    assert (plan.arguments["block_size"], plan.arguments["kv_cache_memory_bytes"]) == (32, 7)
    assert not {"block_siez", "nothing_like_it"} & plan.arguments.keys()
    assert plan.notes == (
        "spec.model.vllm.block_size is passed to vLLM as it is",
        "spec.model.vllm.block_siez is ignored: vLLM has no engine argument of that name; did you mean 'block_size'?",
        "spec.model.vllm.nothing_like_it is ignored: vLLM has no engine argument of that name",
        "spec.model.vllm.kv_cache_memory_bytes is passed to vLLM as it is",
    )


@pytest.mark.parametrize(
    "argument",
    [
        {"model": "other/model"},
        {"tokenizer_revision": "x"},
        {"data_parallel_address": "10.0.0.1"},
        {"node_rank": 1},
        {"hf_overrides": {"architectures": ["Other"]}},
        {"worker_cls": "os.system"},
        {"load_format": "../../etc/passwd"},
        {"quantization": "a/b"},
        {"kv_transfer_config": {"kv_connector_module_path": "evil"}},
        {"enable_log_requests": True},
        {"Block-Size": 1},
    ],
)
def test_arguments_that_reach_too_far_are_refused_with_their_name(argument: dict[str, object]):
    (name,) = argument
    with pytest.raises(ValidationError, match=f"'{name}'"):
        spec_of(argument)


@pytest.mark.parametrize(
    ("asked", "limit", "visible", "expected", "note"),
    [
        (None, None, 4, 4, ""),
        (None, 2, 4, 2, ""),
        (4, None, 2, 2, "tensor_parallel_size is 2 instead of 4: this worker has 2 GPUs"),
        (4, 1, 4, 1, "tensor_parallel_size is 1 instead of 4: resources.hardware.gpu.count is 1"),
        (4, None, 4, 4, ""),
        (3, None, 4, 2, "tensor_parallel_size is 2 instead of 3: the model's 4 attention heads cannot be split evenly"),
        (None, None, 3, 2, ""),
        (2, None, 0, 1, "tensor_parallel_size is 1 instead of 2: this worker has 1 GPU"),
    ],
)
def test_over_how_many_gpus_a_model_is_split(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    asked: int | None,
    limit: int | None,
    visible: int,
    expected: int,
    note: str,
):
    resources = {"resources": {"hardware": {"gpu": {"count": limit}}}} if limit else {}
    spec = spec_of({"tensor_parallel_size": asked}, **resources)
    plan = plan_engine(spec, gpus(monkeypatch, visible), model_folder(tmp_path), on_gpu=True)
    assert plan.parallel == expected
    assert "".join(plan.notes).startswith(note)
    assert bool(plan.notes) == bool(note)


def test_adapters_keep_a_model_on_one_gpu(monkeypatch: pytest.MonkeyPatch):
    spec = spec_of({"tensor_parallel_size": 2}, model={"source": {"identifier": "a/b"}, "adapters": [LORA]})
    plan = plan_engine(spec, gpus(monkeypatch, 2), HUB, on_gpu=True)
    assert (plan.parallel, plan.devices) == (1, "cuda:0")
    assert "LoRA adapters run on one GPU" in plan.notes[0]


def test_the_memory_share_is_lowered_to_what_is_free(monkeypatch: pytest.MonkeyPatch):
    plan = plan_engine(spec_of(), gpus(monkeypatch, 1, free_gib=40), HUB, on_gpu=True)
    # 40 GiB less 512 MiB for the CUDA context, of 80 GiB, rounded down.
    assert plan.arguments["gpu_memory_utilization"] == 0.49
    assert "lowered from 0.90 to 0.49" in plan.notes[0]


def test_weights_that_do_not_fit_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folders = model_folder(tmp_path, values=GIB)  # 2 GiB of weights
    with pytest.raises(NotEnoughMemoryError, match=r"'a/b' needs 2\.\d GiB on the GPU"):
        plan_engine(spec_of(), gpus(monkeypatch, 1, free_gib=1), folders, on_gpu=True)


def test_what_is_tried_after_an_engine_did_not_get_its_memory():
    plan = EnginePlan({"gpu_memory_utilization": 0.4, "tensor_parallel_size": 2}, "cuda:0,cuda:1", ("before",))
    steps = smaller(plan)
    # Not 0.25: below 0.3 there is hardly room for a cache.
    assert [step.arguments["gpu_memory_utilization"] for step in steps] == [0.35, 0.3]
    assert steps[1].notes == ("before", "gpu_memory_utilization lowered from 0.40 to 0.30: the engine did not start")
    assert {step.parallel for step in steps} == {2}
    single = on_one_gpu(plan, "RuntimeError: NCCL")
    assert single is not None
    assert (single.parallel, single.devices) == (1, "cuda:0")
    assert single.notes[-1] == (
        "tensor_parallel_size lowered from 2 to 1: the engine did not start (RuntimeError: NCCL)"
    )


def test_the_engine_key_tells_engines_apart_and_nothing_else():
    def key(vllm: dict[str, object] | None = None, merged: str = "", **fields: Any) -> str:  # noqa: ANN401 - JSON
        return engine_key(spec_of(vllm, **fields), merged)

    plain = key()
    lora = {"model": {"source": {"identifier": "a/b"}, "adapters": [LORA]}}
    another = {"model": {"source": {"identifier": "a/b"}, "adapters": [{**LORA, "path": "/models/other"}]}}
    assert key({"release_after_run": True, "max_lora_rank": 8, "max_loras": 2}) == plain
    assert key(inference={"temperature": 0, "n": 1}) == plain
    assert key(**lora) == key(**another)
    assert key({"max_lora_rank": 8}, **lora) != key(**lora)
    different = [
        plain,
        key({"max_model_len": 512}),
        key({"dtype": "float16"}),
        key({"block_size": 32}),
        key({"trust_remote_code": True}),
        key(merged="digest"),
        key(**lora),
        key(resources={"hardware": {"gpu": {"count": 1}}}),
        key(model={"source": {"identifier": "a/c"}}),
        key(model={"source": {"identifier": "a/b", "revision": "v2"}}),
        key(checkpoint={"load": {"path": "/models/checkpoint"}}),
    ]
    assert len(set(different)) == len(different)
