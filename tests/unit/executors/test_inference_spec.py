import pytest
from pydantic import ValidationError

from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration
from executors.task_spec import unknown_keys


def spec_dict(**sections: object) -> dict[str, object]:
    return {
        "taskType": "inference",
        "model": {"source": {"identifier": "acme/tiny-lm"}},
        "data": {"type": "list", "items": ["2+2?"]},
        **sections,
    }


def errors_of(value: dict[str, object]) -> dict[tuple[int | str, ...], str]:
    with pytest.raises(ValidationError) as caught:
        InferenceSpec.model_validate(value)
    return {error["loc"]: error["msg"] for error in caught.value.errors()}


def test_defaults_are_those_of_the_wire():
    spec = InferenceSpec.model_validate(spec_dict())
    options = spec.inference
    assert (options.temperature, options.top_p, options.top_k, options.token_limit) == (0.7, 0.95, None, 512)
    assert (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (options.stop, options.seed, options.chat, options.greedy) == ((), None, False, False)
    assert (options.n, options.logprobs, options.guided, options.resume) == (1, None, None, False)
    assert spec.model.adapters == ()
    assert spec.postprocess.jsonl_export is None
    assert (spec.data.split, spec.data.seed, spec.data.shuffle) == ("train", 42, False)
    assert (spec.shard.total, spec.shard.index, spec.shard.contiguous) == (1, 0, True)
    assert spec.model.transformers.device_map is None
    assert spec.model.transformers.dtype == "auto"
    assert unknown_keys(spec) == []


@pytest.mark.parametrize("key", ["system_prompt", "systemPrompt"])
def test_both_spellings_of_the_system_prompt(key: str):
    spec = InferenceSpec.model_validate(spec_dict(inference={key: "Be brief."}))
    assert spec.inference.system_prompt == "Be brief."
    assert unknown_keys(spec) == []


def test_max_new_tokens_wins():
    spec = InferenceSpec.model_validate(spec_dict(inference={"max_tokens": 5, "max_new_tokens": 9}))
    assert spec.inference.token_limit == 9


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0, "do_sample": True}, True),
        ({"do_sample": False}, True),
        ({"temperature": 0.1}, False),
    ],
)
def test_when_generation_is_greedy(options: dict[str, object], *, greedy: bool):
    assert InferenceSpec.model_validate(spec_dict(inference=options)).inference.greedy is greedy


@pytest.mark.parametrize(("stop", "expected"), [("END", ("END",)), (["a", "", "b"], ("a", "b")), ("", ()), (None, ())])
def test_stop_is_a_string_or_a_list(stop: object, expected: tuple[str, ...]):
    assert InferenceSpec.model_validate(spec_dict(inference={"stop": stop})).inference.stop == expected


@pytest.mark.parametrize(
    ("given", "dtype"), [("fp16", "float16"), ("BF16", "bfloat16"), ("fp32", "float32"), ("float16", "float16")]
)
def test_short_names_of_dtypes(given: str, dtype: str):
    spec = spec_dict(model={"source": {"identifier": "a/b"}, "transformers": {"dtype": given}})
    assert InferenceSpec.model_validate(spec).model.transformers.dtype == dtype


def test_null_counts_as_absent():
    spec = InferenceSpec.model_validate(
        spec_dict(
            checkpoint=None,
            inference={"temperature": None, "stop": None},
            data={"type": None, "items": ["a"], "metadata": None},
        )
    )
    assert spec.inference.temperature == 0.7
    assert spec.data.type == "list"


def test_leftovers_of_other_stages_are_tolerated():
    spec = InferenceSpec.model_validate(
        spec_dict(
            data={"type": "list", "items": ["a"], "url": "org/set", "column": "text"},
            training={"learning_rate": 1},
            model={
                "source": {"identifier": "a/b"},
                "vllm": {"tensor_parallel_size": 8},
                "config": {"fp16": True},
                "adapters": [],
            },
            parallel={"enabled": True},
        )
    )
    assert unknown_keys(spec) == []


@pytest.mark.parametrize("model", [None, {}, {"source": {}}, {"source": {"identifier": "  "}}])
def test_a_missing_model_is_refused_with_its_full_path(model: dict[str, object] | None):
    errors = errors_of(spec_dict(model=model))
    assert list(errors) == [("model", "source", "identifier")]
    assert "is missing" in errors["model", "source", "identifier"]


@pytest.mark.parametrize("model", [None, {}, {"source": {}}, {"source": {"identifier": " "}}])
def test_a_checkpoint_needs_no_base_model(model: dict[str, object] | None):
    spec = InferenceSpec.model_validate(
        spec_dict(model=model, checkpoint={"load": {"url": "http://u:p@h/final_model.tar.gz?key=s", "taskId": None}})
    )
    assert spec.model_name == "final_model.tar.gz"
    (request,) = spec.inputs()
    assert (request.name, request.kind, request.url) == (
        "checkpoint.load",
        "checkpoint",
        "http://u:p@h/final_model.tar.gz?key=s",
    )


def test_the_base_models_name_is_the_results_name():
    spec = InferenceSpec.model_validate(spec_dict(checkpoint={"load": {"path": "/x"}}))
    assert spec.model_name == "acme/tiny-lm"


def test_without_a_checkpoint_there_are_no_inputs():
    for load in ({}, {"checkpoint": {}}, {"checkpoint": {"load": None}}):
        assert InferenceSpec.model_validate(spec_dict(**load)).inputs() == ()


def test_an_empty_checkpoint_is_refused_and_never_the_base_model():
    errors = errors_of(spec_dict(checkpoint={"load": {"path": None, "type": "local"}}))
    assert list(errors) == [("checkpoint", "load")]
    assert "expected at least one of path, taskId and url" in errors["checkpoint", "load"]


def test_a_checkpoint_is_part_of_the_engine_key():
    def key(**load: object) -> str:
        section = {"checkpoint": {"load": load}} if load else {}
        return TextGeneration.engine_key(InferenceSpec.model_validate(spec_dict(**section)))

    keys = [key(), key(path="/x"), key(taskId="a"), key(url="http://h/a"), key(url="http://h/a", sha256="0" * 64)]
    assert len(set(keys)) == len(keys)
    assert key(url="http://h/a") == key(url="http://h/a", headers={"X-Key": "s"}, timeoutSec=9)
    assert "secret-1" not in key(url="http://u:secret-1@h/a?k=secret-1")


def test_a_wrong_item_is_named_by_its_index():
    errors = errors_of(spec_dict(data={"items": ["a", "b", 3]}))
    assert errors == {("data", "items", 2): "expected a string, or a list of messages with role and content"}


def test_a_wrong_message_is_named():
    errors = errors_of(spec_dict(data={"items": [[{"role": "user"}]]}))
    assert list(errors) == [("data", "items", 0, "messages", 0, "content")]


def test_what_is_not_built_yet_is_refused():
    errors = errors_of(spec_dict(data={"jsonl": {"path": "x"}}))
    assert list(errors) == [("data",)]
    assert "not supported" in errors["data",]


def test_adapters_are_inputs_by_their_places():
    adapters = [{"path": "/a"}, {"type": "ia3"}, {"url": "http://h/b.zip", "apply": "merge"}]
    spec = InferenceSpec.model_validate(spec_dict(model={"source": {"identifier": "a/b"}, "adapters": adapters}))
    assert [(request.name, request.kind) for request in spec.inputs()] == [
        ("model.adapters[0]", "adapter"),
        ("model.adapters[2]", "adapter"),
    ]
    assert spec.wants_runtime_adapters


@pytest.mark.parametrize("adapters", [[], [{"type": "ia3"}], [{"path": "/a", "apply": "merge"}]])
def test_when_no_adapter_is_wanted_at_run_time(adapters: list[object]):
    spec = InferenceSpec.model_validate(spec_dict(model={"source": {"identifier": "a/b"}, "adapters": adapters}))
    assert not spec.wants_runtime_adapters


def test_an_adapter_that_names_nothing_is_refused_by_its_place():
    model = {"source": {"identifier": "a/b"}, "adapters": [{"path": "/a"}, {"name": "x"}]}
    assert list(errors_of(spec_dict(model=model))) == [("model", "adapters", 1)]


def test_an_export_is_checked_with_the_spec():
    export = {"path": "out.jsonl", "fields": {"answer": "output"}}
    spec = InferenceSpec.model_validate(spec_dict(postprocess={"jsonl_export": export}))
    assert spec.postprocess.jsonl_export is not None
    errors = errors_of(spec_dict(postprocess={"jsonl_export": {**export, "path": "../x"}}))
    assert list(errors) == [("postprocess", "jsonl_export", "path")]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"type": "list", "items": []}, "'items' is missing or empty"),
        ({"type": "dataset"}, "'url' is missing or empty"),
        ({"type": "graph_template"}, "'template' is missing or empty"),
        ({"type": "list", "items": ["a"], "metadata": [{}, {}]}, "'metadata' has 2 entries, expected 1"),
        ({"split": "train"}, "has no 'type'"),
    ],
)
def test_incomplete_data_is_refused(data: dict[str, object], part: str):
    assert part in errors_of(spec_dict(data=data))[("data",)]


def test_a_shard_outside_the_total_is_refused():
    assert "expected 0 to 1" in errors_of(spec_dict(shard={"total": 2, "index": 2}))[("shard",)]


def test_two_quantisations_are_refused():
    options = {"load_in_8bit": True, "load_in_4bit": True}
    errors = errors_of(spec_dict(model={"source": {"identifier": "a/b"}, "transformers": options}))
    assert "at most one" in errors["model", "transformers"]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"max_tokens": 0}, {"top_k": -2}, {"seed": -1}],
)
def test_impossible_sampling_values_are_refused(options: dict[str, object]):
    assert list(errors_of(spec_dict(inference=options))) == [("inference", next(iter(options)))]


def test_a_url_is_no_model_name_and_points_to_the_checkpoint():
    source = {"source": {"identifier": "https://user:secret@host/model"}}
    errors = errors_of(spec_dict(model=source))
    assert "checkpoint.load" in errors["model", "source", "identifier"]
