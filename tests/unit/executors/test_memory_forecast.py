"""What a model will need, and refusals with the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_files import make_tiny_model

from executors.errors import ModelLoadError
from executors.failure_report import verdict_on
from executors.gpu_memory import GpuMemory, MemoryHolder
from executors.inference.memory_forecast import (
    MemoryForecast,
    NotEnoughGpuMemoryError,
    NotEnoughHostMemoryError,
    forecast,
    require_gpu_memory,
    require_host_memory,
    utilization_for,
)

GIB = 1024**3
MIB = 1024**2

LLAMA: dict[str, object] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GEMMA = {
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 512,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}
DEEPSEEK = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


def write_model(folder: Path, config: object, tensors: dict[str, tuple[str, list[int], int]] | None = None) -> Path:
    """Write config.json and one safetensors file of zeros: name → dtype, shape, bytes."""
    header, end = {}, 0
    for name, (dtype, shape, size) in (tensors or {"w": ("BF16", [4], 8)}).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def needs(folder: Path, *, dtype: str = "auto", tokens: int | None = 1000, devices: int = 1) -> MemoryForecast:
    found = forecast(folder, dtype=dtype, context_tokens=tokens, devices=devices)
    assert found is not None
    return found


def gpu(index: int, free: float, total: float = 80, *holders: MemoryHolder) -> GpuMemory:
    return GpuMemory(index, f"GPU-{index}", "NVIDIA H100", round(total * GIB), round(free * GIB), holders)


@pytest.mark.parametrize("present", [[], ["config.json"], ["model.safetensors"], ["config.json", "model.gguf"]])
def test_nothing_is_forecast_without_a_config_and_safetensors_files(tmp_path: Path, present: list[str]):
    whole = write_model(tmp_path, LLAMA)
    for name in {"config.json", "model.safetensors"} - set(present):
        (whole / name).unlink()
    assert forecast(whole, dtype="auto", context_tokens=10) is None
    assert forecast(tmp_path / "org" / "name", dtype="auto", context_tokens=10) is None


@pytest.mark.parametrize(
    ("dtype", "extra", "expected"),
    [
        ("bfloat16", {}, 20 + 20 + 10 + 3),
        ("half", {}, 20 + 20 + 10 + 3),
        ("float32", {}, 40 + 40 + 10 + 3),
        ("auto", {"dtype": "float32"}, 20 + 20 + 10 + 3),  # as vLLM does it
        ("auto", {"torch_dtype": "bfloat16"}, 20 + 20 + 10 + 3),
        ("bfloat16", {"quantization_config": {"quant_method": "fp8"}}, 40 + 20 + 10 + 3),
        ("float32", {"text_config": {"quantization_config": {}}}, 40 + 20 + 10 + 3),
        ("bfloat16", {"quantization_config": None}, 20 + 20 + 10 + 3),
    ],
)
def test_floats_count_as_loaded_and_quantised_weights_as_stored(
    tmp_path: Path, dtype: str, extra: dict[str, object], expected: int
):
    tensors = {
        "wide": ("F32", [10], 40),
        "narrow": ("BF16", [2, 5], 20),
        "q": ("I8", [10], 10),
        "f8": ("F8_E4M3", [3], 3),
    }
    write_model(tmp_path, LLAMA | extra, tensors)
    assert needs(tmp_path, dtype=dtype).weights_bytes == expected
    assert needs(tmp_path, dtype=dtype, devices=2).weights_bytes == (expected + 1) // 2


@pytest.mark.parametrize(
    ("config", "per_1000_tokens"),
    [
        pytest.param(LLAMA, 131_072_000, id="grouped queries"),
        pytest.param(LLAMA | {"num_key_value_heads": None}, 524_288_000, id="a KV head for each head"),
        pytest.param(LLAMA | {"head_dim": 64}, 65_536_000, id="its own head size"),
        pytest.param(LLAMA | {"head_dim": 128, "v_head_dim": 64}, 98_304_000, id="narrower values"),
        pytest.param({"text_config": LLAMA, "hidden_size": 7}, 131_072_000, id="nested"),
        pytest.param({"thinker_config": {"text_config": LLAMA}}, 131_072_000, id="nested twice"),
        pytest.param({"n_layer": 12, "n_head": 12, "n_embd": 768}, 36_864_000, id="names of GPT-2"),
        pytest.param(LLAMA | {"num_key_value_heads": None, "multi_query": True}, 16_384_000, id="one KV head"),
        pytest.param(DEEPSEEK, 70_272_000, id="latent"),
        pytest.param(LLAMA | {"sliding_window": 100}, 13_107_200, id="all layers slide"),
        pytest.param(LLAMA | {"sliding_window": 4096}, 131_072_000, id="within the window"),
        pytest.param(LLAMA | {"sliding_window": 100, "use_sliding_window": False}, 131_072_000, id="no window"),
        pytest.param(GEMMA, 4096 * (5 * 512 + 1000), id="some layers slide"),
        pytest.param(GEMMA | {"num_kv_shared_layers": 2}, 4096 * 4 * 512, id="layers share a cache"),
        pytest.param(GEMMA | {"layer_types": ["linear_attention"] * 5 + ["attention"]}, 4_096_000, id="one of six"),
        pytest.param(LLAMA | {"attn_layer_period": 8}, 0, id="hybrid"),
        pytest.param(LLAMA | {"mamba_d_state": 16}, 0, id="hybrid with Mamba"),
        pytest.param(LLAMA | {"global_head_dim": 512}, 0, id="uneven layers"),
        pytest.param(LLAMA | {"is_encoder_decoder": True}, 0, id="encoder and decoder"),
        pytest.param({"state_size": 16, "num_hidden_layers": 24, "hidden_size": 768}, 0, id="no attention"),
        pytest.param({}, 0, id="empty"),
    ],
)
def test_the_kv_cache_follows_the_config(tmp_path: Path, config: dict[str, object], per_1000_tokens: int):
    write_model(tmp_path, config)
    assert needs(tmp_path).kv_cache_bytes == per_1000_tokens
    assert needs(tmp_path, dtype="float32").kv_cache_bytes == 2 * per_1000_tokens


@pytest.mark.parametrize(
    ("config", "devices", "share"),
    [(LLAMA, 4, 1 / 4), (LLAMA, 16, 1 / 8), (DEEPSEEK, 8, 1)],
    ids=["split", "at least one head", "a latent is not split"],
)
def test_kv_heads_are_split_over_devices(tmp_path: Path, config: dict[str, object], devices: int, share: float):
    write_model(tmp_path, config)
    assert needs(tmp_path, devices=devices).kv_cache_bytes == needs(tmp_path).kv_cache_bytes * share


def test_without_a_length_the_sequence_is_the_longest_of_the_model(tmp_path: Path):
    write_model(tmp_path, LLAMA)
    assert needs(tmp_path, tokens=None).context_tokens == 131_072
    assert needs(tmp_path, tokens=None).kv_cache_bytes == 16 * GIB
    write_model(tmp_path, LLAMA | {"max_position_embeddings": None})
    assert needs(tmp_path, tokens=None).kv_cache_bytes == 0


@pytest.mark.parametrize("value", ["32", -1, 0, 1.5, True, None, [32], {"a": 1}, 2**40, 10**300])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_a_value_that_is_no_count_leaves_the_kv_cache_out(tmp_path: Path, name: str, value: object):
    write_model(tmp_path, LLAMA | {name: value})
    found = needs(tmp_path)
    assert (found.kv_cache_bytes, found.weights_bytes) == (0, 8)


@pytest.mark.parametrize("kinds", [["full_attention"], [1] * 32, [["full_attention"]] * 32, [None] * 32])
def test_layer_types_that_make_no_sense_leave_the_kv_cache_out(tmp_path: Path, kinds: list[object]):
    write_model(tmp_path, LLAMA | {"layer_types": kinds})
    assert needs(tmp_path).kv_cache_bytes == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "JSON cannot be read"),
        (b"[]", r"its JSON is \[\], expected an object"),
        (b'{"a":' * 50_000, "JSON cannot be read"),
        (b" " * (16 * MIB + 1), "is larger than 16777216 bytes"),
    ],
    ids=["empty", "no object", "deep", "large"],
)
def test_a_damaged_config_is_refused_by_name(tmp_path: Path, text: bytes, problem: str):
    (write_model(tmp_path, {}) / "config.json").write_bytes(text)
    with pytest.raises(ModelLoadError, match=rf"config\.json .*{problem}"):
        needs(tmp_path)


def test_the_overhead_grows_with_the_models_width_and_with_adapters(tmp_path: Path):
    plain = needs(write_model(tmp_path, {})).overhead_bytes
    assert plain == 512 * MIB
    assert needs(write_model(tmp_path, {"vocab_size": 1000})).overhead_bytes == plain + 64 * 1000 * 4
    wide = {"hidden_size": 100, "intermediate_size": 200}
    assert needs(write_model(tmp_path, wide), tokens=10).overhead_bytes == plain + 10 * 600 * 2
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("BF16", [20, 10], 400),
        "model.layers.0.mlp.experts": ("BF16", [3, 20, 10], 1200),
        "model.layers.0.norm.weight": ("BF16", [10], 20),
        "model.embed_tokens.weight": ("BF16", [5, 10], 100),
        "visual.blocks.0.attn.weight": ("BF16", [5, 10], 100),
    }
    write_model(tmp_path, {}, tensors)
    found = forecast(tmp_path, dtype="bfloat16", context_tokens=10, lora_rank=8, loras=2)
    assert found is not None
    assert found.overhead_bytes == plain + 2 * (30 + 3 * 30) * 8 * 2
    on_host = forecast(tmp_path, dtype="bfloat16", context_tokens=10, on_gpu=False)
    assert on_host is not None
    assert on_host.overhead_bytes == 768 * MIB


def test_enough_free_memory_passes():
    need = MemoryForecast(14 * GIB, GIB, GIB, context_tokens=8192)
    require_gpu_memory(need, [gpu(0, 16), gpu(1, 79)], what="the model")
    require_gpu_memory(need, [], what="the model")
    require_gpu_memory(need, [gpu(0, 0, 0)], what="the model")
    require_host_memory(need, 16 * GIB, what="the model")
    assert need.total_bytes == 16 * GIB


def test_too_little_gpu_memory_is_refused_with_all_numbers():
    need = MemoryForecast(round(14.2 * GIB), round(0.5 * GIB), round(0.7 * GIB), context_tokens=8192)
    full = gpu(0, 3.1, 79.6, MemoryHolder(4711, round(70.2 * GIB), "python"))
    with pytest.raises(NotEnoughGpuMemoryError) as caught:
        require_gpu_memory(need, [full], what="'org/model'")
    assert caught.value.message == (
        "'org/model' needs 15.4 GiB on the GPU (weights 14.2, one sequence of 8192 tokens 0.5, the rest 0.7), "
        "free are 3.1 GiB: GPU 0 (NVIDIA H100): 3.1 of 79.6 GiB free; pid 4711 (python) holds 70.2 GiB"
    )
    assert "spec.model.vllm.max_model_len" in caught.value.hint
    failure = verdict_on(caught.value).failure
    assert (failure.reason, failure.retryable) == ("gpu_oom", False)


def test_only_the_gpus_with_too_little_are_named():
    need = MemoryForecast(10 * GIB, 0, GIB)
    gpus = [gpu(0, 9), gpu(1, 40), gpu(2, 5)]
    with pytest.raises(NotEnoughGpuMemoryError, match=r"on each of 3 GPUs \(weights 10\.0, the rest 1\.0\)") as caught:
        require_gpu_memory(need, gpus, what="the model")
    assert "free are 5.0 GiB: GPU 0 (NVIDIA H100): 9.0" in caught.value.message
    assert "GPU 2" in caught.value.message
    assert "GPU 1" not in caught.value.message


def test_too_little_host_memory_is_refused_and_may_be_tried_again():
    need = MemoryForecast(10 * GIB, 0, GIB)
    with pytest.raises(NotEnoughHostMemoryError, match=r"needs 11\.0 GiB of .*available are 4\.0 GiB") as caught:
        require_host_memory(need, 4 * GIB, what="the model")
    failure = verdict_on(caught.value).failure
    assert (failure.reason, failure.retryable) == ("host_oom", True)


@pytest.mark.parametrize(
    ("asked", "free", "value"),
    [(0.9, 79.5, 0.9), (0.9, 51, 0.63), (1.0, 79.5, 0.98), (0.2, 20, 0.2), (0.9, 24.5, 0.3), (0.2, 17, 0.2)],
)
def test_the_utilization_is_what_fits_beside_other_processes(asked: float, free: float, value: float):
    found = utilization_for([gpu(0, 79.5), gpu(1, free, 80, MemoryHolder(7, None, "x"))], asked)
    assert found.value == value
    assert (found.note == "") == (value == asked)
    assert found.value * 80 <= free - 0.5  # the CUDA context comes first


def test_a_lowered_utilization_is_told_with_the_numbers():
    found = utilization_for([gpu(1, 50.1, 79.6, MemoryHolder(7, 29 * GIB, "x"))], 0.9)
    assert found.note == (
        "gpu_memory_utilization lowered from 0.90 to 0.62: "
        "GPU 1 (NVIDIA H100): 50.1 of 79.6 GiB free; pid 7 (x) holds 29.0 GiB"
    )


@pytest.mark.parametrize(("asked", "free", "least"), [(0.9, 20, "0.30"), (0.2, 10, "0.20"), (0.9, 0, "0.30")])
def test_less_than_the_floor_is_refused(asked: float, free: float, least: str):
    with pytest.raises(NotEnoughGpuMemoryError, match=rf"expected {least} or more: GPU 0 .*{free:.1f} of 80\.0 GiB"):
        utilization_for([gpu(0, free)], asked)


def test_devices_that_do_not_count_their_memory_leave_the_utilization_alone():
    assert utilization_for([], 0.9).value == 0.9
    assert utilization_for([gpu(0, 0, 0)], 0.9).value == 0.9


@pytest.mark.model
def test_the_forecast_is_what_a_loaded_model_holds(tmp_path: Path):
    import torch
    import transformers

    folder = make_tiny_model(tmp_path)
    need = needs(folder, dtype="bfloat16", tokens=40)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert need.weights_bytes == sum(value.nbytes for value in model.parameters())
    cache = model(torch.ones(1, 40, dtype=torch.long), use_cache=True).past_key_values
    assert need.kv_cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
