import pytest
from pydantic import ValidationError

from executors.inference.inference_spec import InferenceSpec
from executors.inference.vllm_spec import VllmOptions
from executors.task_spec import unknown_keys


def options(**given: object) -> VllmOptions:
    return VllmOptions.model_validate(given)


def problem_of(**given: object) -> str:
    with pytest.raises(ValidationError) as caught:
        VllmOptions.model_validate(given)
    (error,) = caught.value.errors()
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def test_defaults():
    found = options()
    assert (found.tensor_parallel_size, found.gpu_memory_utilization, found.max_model_len) == (None, 0.9, None)
    assert (found.dtype, found.max_lora_rank, found.enforce_eager) == ("auto", 64, False)
    assert found.engine_arguments == {}


@pytest.mark.parametrize("absent", [None, 0, "auto", " AUTO "], ids=str)
def test_what_means_that_the_engine_chooses(absent: object):
    found = options(tensor_parallel_size=absent, max_model_len=absent)
    assert (found.tensor_parallel_size, found.max_model_len) == (None, None)


@pytest.mark.parametrize(
    ("given", "dtype"), [("half", "float16"), ("BF16", "bfloat16"), ("float", "float32"), ("auto", "auto")]
)
def test_short_names_of_dtypes(given: str, dtype: str):
    assert options(dtype=given).dtype == dtype


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel_size": -1},
        {"tensor_parallel_size": False},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.1},
        {"max_model_len": "long"},
        {"dtype": "int8"},
        {"max_lora_rank": 65},
        {"max_loras": 0},
        {"max_num_seqs": 0},
    ],
    ids=str,
)
def test_wrong_values_are_named(wrong: dict[str, object]):
    assert problem_of(**wrong).startswith(f"{next(iter(wrong))}:")


def test_arguments_of_the_engine_are_passed_on_without_a_warning():
    vllm = {"block_size": 32, "enable_prefix_caching": False, "kv_cache_dtype": "fp8", "swap_space": None}
    spec = InferenceSpec.model_validate(
        {"model": {"source": {"identifier": "a/b"}, "vllm": vllm}, "data": {"items": ["x"]}}
    )
    assert spec.model.vllm.engine_arguments == {
        "block_size": 32,
        "enable_prefix_caching": False,
        "kv_cache_dtype": "fp8",
    }
    assert unknown_keys(spec) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf_overrides", {"architectures": ["x"]}),
        ("worker_extension_cls", "os.system"),
        ("kv_cache_dtype", "../../etc"),
        ("kv_cache_dtype", ["fp8"]),
        ("speculative_config", {"model": "x"}),
    ],
)
def test_values_that_could_reach_beyond_the_engine_are_refused(name: str, value: object):
    assert f"'{name}' could make the engine run code" in problem_of(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_revision", "x"),
        ("data_parallel_size", 2),
        ("nnodes", 2),
        ("enable_lora", True),
        ("logprobs_mode", 1),
    ],
)
def test_arguments_that_the_worker_sets_itself_are_refused(name: str, value: object):
    assert f"'{name}' is not for tasks to set" in problem_of(**{name: value})


@pytest.mark.parametrize("name", ["Block-Size", "x y", "_x", "x" * 65])
def test_what_is_no_name_of_an_argument_is_refused(name: str):
    assert "is no name of an engine argument" in problem_of(**{name: 1})
