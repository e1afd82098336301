import subprocess
import sys

import pytest

from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration


def key(source: dict[str, object] | None = None, options: dict[str, object] | None = None, **sections: object) -> str:
    spec = InferenceSpec.model_validate(
        {
            "model": {"source": {"identifier": "acme/tiny-lm", **(source or {})}, "transformers": options or {}},
            "data": {"items": ["a"]},
            **sections,
        }
    )
    return TextGeneration.engine_key(spec)


@pytest.mark.parametrize(
    "other",
    [
        key({"identifier": "acme/other"}),
        key({"revision": "v2"}),
        key({"gguf_file": "x.gguf"}),
        key({"trust_remote_code": True}),
        key(options={"dtype": "bf16"}),
        key(options={"device_map": "cpu"}),
        key(options={"load_in_8bit": True}),
        key(options={"load_in_4bit": True}),
        key(options={"use_flash_attention_2": True}),
        key(enforce_cpu=True),
        key(resources={"hardware": {"gpu": {"count": 0}}}),
    ],
)
def test_whatever_changes_the_loaded_model_changes_the_key(other: str):
    assert other != key()


@pytest.mark.parametrize(
    "same",
    [
        key(data={"items": ["b"]}),
        key(inference={"temperature": 0, "system_prompt": "x"}),
        key(options={"dtype": "auto", "low_cpu_mem_usage": False}),
        key(resources={"hardware": {"gpu": {"count": 2}}}),
    ],
)
def test_whatever_does_not_change_it_keeps_the_engine(same: str):
    assert same == key()


def key_with(*adapters: dict[str, object]) -> str:
    return key(model={"source": {"identifier": "acme/tiny-lm"}, "adapters": list(adapters)})


def test_runtime_adapters_keep_the_engine():
    assert key_with({"path": "/a"}, {"path": "/b", "scale": 0.5}) == key_with()
    assert key_with({"type": "ia3", "apply": "merge"}) == key_with()


def test_merged_adapters_change_the_loaded_model():
    keys = [
        key_with(),
        key_with({"path": "/a", "apply": "merge"}),
        key_with({"path": "/a", "apply": "merge", "scale": 0.5}),
        key_with({"path": "/b", "apply": "merge"}),
        key_with({"path": "/a", "apply": "merge"}, {"path": "/b", "apply": "merge"}),
    ]
    assert len(set(keys)) == len(keys)
    secret = key_with({"url": "http://u:secret-1@h/a", "apply": "merge", "headers": {"X-Key": "secret-2"}})
    assert "secret" not in secret


def test_equal_dtypes_and_devices_share_a_key():
    assert key(options={"dtype": "fp16"}) == key(options={"dtype": "float16"})
    assert key(options={"device_map": "cpu"}) == key(enforce_cpu=True)


def test_the_gpu_limit_counts_where_a_model_is_spread():
    limited = {"hardware": {"gpu": {"count": 2}}}
    assert key(options={"device_map": "auto"}, resources=limited) != key(options={"device_map": "auto"})


def test_the_daemon_can_import_the_executor_cheaply():
    code = (
        "import sys, executors.inference.on_transformers.text_generation\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pandas', 'jinja2', 'peft', 'xgrammar'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
