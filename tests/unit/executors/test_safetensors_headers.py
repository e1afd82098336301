"""Headers of safetensors files: real ones against the library, and hostile ones."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize  # noqa: TID253 - a test process may be heavy

from executors.errors import ModelLoadError
from executors.safetensors_headers import INDEX_NAME, TensorFacts, read_headers, read_json_object

Entry = dict[str, object]


def save(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> Path:
    """Write a file with the library: name → dtype and shape."""
    import torch
    from safetensors.torch import save_file

    values = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in tensors.items()}
    save_file(values, file, metadata={"format": "pt"})
    return file


def raw_file(header: object, data: int = 0, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(begin: int, end: int, dtype: str = "I8", shape: list[int] | None = None) -> Entry:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_facts_are_those_the_library_wrote(tmp_path: Path):
    tensors = {
        "a.weight": ("float32", [2, 3]),
        "b": ("bfloat16", [5]),
        "scalar": ("int64", []),
        "empty": ("float16", [0, 7]),
        "q": ("float8_e4m3fn", [4]),
        "flags": ("bool", [3]),
    }
    file = save(tmp_path / "model.safetensors", tensors)
    assert read_headers(tmp_path) == {
        "a.weight": TensorFacts("F32", (2, 3), 24, file),
        "b": TensorFacts("BF16", (5,), 10, file),
        "scalar": TensorFacts("I64", (), 8, file),
        "empty": TensorFacts("F16", (0, 7), 0, file),
        "q": TensorFacts("F8_E4M3", (4,), 4, file),
        "flags": TensorFacts("BOOL", (3,), 3, file),
    }


@pytest.mark.parametrize("names", [[], ["pytorch_model.bin", "model.gguf", "._model.safetensors"]])
def test_a_folder_without_such_files_has_no_tensors(tmp_path: Path, names: list[str]):
    for name in names:
        (tmp_path / name).write_bytes(b"something else")
    assert read_headers(tmp_path) == {}
    assert read_headers(tmp_path / "missing") == {}


def test_without_an_index_all_files_of_the_folder_itself_count(tmp_path: Path):
    (tmp_path / "checkpoint-1").mkdir()
    for name in ("one", "two", "checkpoint-1/old"):
        save(tmp_path / f"{name}.safetensors", {name: ("int8", [1])})
    assert set(read_headers(tmp_path)) == {"one", "two"}


def test_the_makers_own_copy_of_the_weights_does_not_count_twice(tmp_path: Path):
    save(tmp_path / "consolidated.safetensors", {"tok_embeddings.weight": ("int8", [1])})
    assert set(read_headers(tmp_path)) == {"tok_embeddings.weight"}
    save(tmp_path / "model.safetensors", {"embed_tokens.weight": ("int8", [1])})
    assert set(read_headers(tmp_path)) == {"embed_tokens.weight"}


def test_an_index_names_the_files_and_says_which_copy_counts(tmp_path: Path):
    save(tmp_path / "1.safetensors", {"a": ("int8", [1]), "b": ("int8", [1])})
    save(tmp_path / "2.safetensors", {"b": ("int8", [2])})
    save(tmp_path / "other.safetensors", {"c": ("int8", [1])})
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    found = read_headers(tmp_path)
    assert {name: facts.nbytes for name, facts in found.items()} == {"a": 1, "b": 2}


def test_files_may_be_links_as_in_the_cache_of_a_hub(tmp_path: Path):
    blob = save(tmp_path / "blob", {"a": ("int8", [1])})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert set(read_headers(tmp_path / "snapshot")) == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "missing.safetensors"}, r"missing\.safetensors is missing"),
        ({"a": "../out.safetensors"}, "names the file '../out.safetensors', expected one in the same folder"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": ""}, "names the file ''"),
        ({"a": "x\0"}, r"names the file 'x\\x00'"),
        ({"a": "x" * 5000}, "names the file 'x{79}…"),
        ({"a": 7}, "names the file 7"),
        ({"a": {"b": []}}, "names the file an object"),
        ({"a": "sub"}, "sub is not a regular file"),
        ({}, "has no weight_map"),
        ([["a", "b"]], "has no weight_map"),
        ({str(n): f"{n}.safetensors" for n in range(10_001)}, "names more than 10000 files"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map: object, problem: str):
    (tmp_path / "sub").mkdir()
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelLoadError, match=problem):
        read_headers(tmp_path)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="is not a regular file"):
        read_headers(tmp_path)


def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path: Path):
    whole = save(tmp_path / "whole", {"a": ("float32", [2]), "b": ("int8", [3])}).read_bytes()
    file = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors .*(cut off|damaged|no safetensors file)"):
            read_headers(tmp_path)
    file.write_bytes(whole)
    assert set(read_headers(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (raw_file({"a": entry(0, 4)}, 4, length=2**64 - 1), "a header of 18446744073709551615 bytes"),
        (raw_file({}, length=100_000_001), "expected at most 100000000"),
        (raw_file({"a": entry(0, 4)}, 4, length=1000), "its header alone says 1008"),
        (b"PK\x03\x04" + bytes(60), "no safetensors file|damaged"),
        (raw_file(b""), "JSON cannot be read"),
        (raw_file(b"\xff\xfe{}"), "JSON cannot be read"),
        (raw_file(b"[" * 100_000), "JSON cannot be read"),
        (raw_file(b'{"a":' * 100_000), "JSON cannot be read"),
        (raw_file(b'{"a":' + b"9" * 5000 + b"}"), "JSON cannot be read"),
        (raw_file(b"[" + b"0," * 4_000_001 + b"0]"), "more than 4000000 JSON values"),
        (raw_file(b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "a key comes twice"),
        (raw_file([]), r"its JSON is \[\], expected an object"),
        (raw_file({"a": 5}), "tensor 'a' is 5, expected an object"),
        (raw_file({"x" * 5000: 5}), "tensor 'x{79}… is 5"),
        (raw_file({"\ud800\n": 5}), r"tensor '\\ud800\\n' is 5"),
        (raw_file({"a": {}}), "has the dtype None"),
        (raw_file({"a": entry(0, 0) | {"dtype": ["I8"] * 9999}}), r"has the dtype \[str, str"),
        (raw_file({"a": entry(0, 1) | {"shape": "1"}}, 1), "has the shape '1'"),
        (raw_file({"a": entry(0, 1) | {"shape": [True]}}, 1), r"has the shape \[bool\]"),
        (raw_file({"a": entry(0, 1) | {"shape": [-1]}}, 1), r"has the shape \[-1\]"),
        (raw_file({"a": entry(0, 1) | {"shape": [1.0]}}, 1), r"has the shape \[float\]"),
        (raw_file({"a": entry(0, 1) | {"shape": [2**63]}}, 1), "has the shape .*expected a list of sizes"),
        (raw_file({"a": entry(0, 1, shape=[2**62] * 64)}, 1), "but 1 bytes"),
        (raw_file({"a": entry(0, 4, "F32", [2])}, 4), r"has the shape \[2\] of 'F32' but 4 bytes"),
        (raw_file({"a": entry(0, 1, "F4", [3])}, 1), r"of 'F4' but 1 bytes"),
        (raw_file({"a": entry(0, 1) | {"data_offsets": [1, 0]}}, 1), "has the offsets"),
        (raw_file({"a": entry(0, 1) | {"data_offsets": [-1, 0]}}, 1), "has the offsets"),
        (raw_file({"a": entry(0, 1) | {"data_offsets": [1]}}, 1), "has the offsets"),
        (raw_file({"a": entry(0, 9)}, 8), "cut off: tensor 'a' ends at byte 9 of the data, which has 8"),
        (raw_file({"a": entry(0, 4), "b": entry(2, 6)}, 6), "tensor 'b' begins at byte 2 of the data, expected 4"),
        (raw_file({"a": entry(0, 4), "b": entry(0, 4)}, 4), "tensor 'b' begins at byte 0 of the data, expected 4"),
        (raw_file({"a": entry(0, 4), "b": entry(5, 6)}, 6), "tensor 'b' begins at byte 5 of the data, expected 4"),
        (raw_file({"a": entry(0, 4)}, 9), "its tensors cover 4 bytes, its data has 9"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_hostile_file_is_refused_with_a_short_text(tmp_path: Path, content: bytes, problem: str):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match=problem) as caught:
        read_headers(tmp_path)
    assert caught.value.message.startswith(str(file))
    assert len(caught.value.message) < len(str(file)) + 400
    with pytest.raises(SafetensorError):  # nothing is refused that the library would take
        deserialize(content)


def test_a_tensor_of_more_dimensions_than_any_library_has_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(raw_file({"a": entry(0, 1, shape=[1] * 65)}, 1))
    with pytest.raises(ModelLoadError, match=r"has the shape \[1, 1.*expected a list of sizes"):
        read_headers(tmp_path)


def test_a_dtype_of_the_future_is_left_to_the_library(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(raw_file({"a": entry(0, 3, "F3", [8])}, 3))
    assert read_headers(tmp_path)["a"] == TensorFacts("F3", (8,), 3, tmp_path / "model.safetensors")


@pytest.mark.parametrize("bits", [(4, "F4", 2), (6, "F6_E2M3", 4)])
def test_elements_smaller_than_a_byte_are_counted_in_bits(tmp_path: Path, bits: tuple[int, str, int]):
    width, dtype, elements = bits
    size = width * elements // 8
    (tmp_path / "model.safetensors").write_bytes(raw_file({"a": entry(0, size, dtype, [elements])}, size))
    assert read_headers(tmp_path)["a"].nbytes == size


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: file.mkdir(), "is not a regular file"),
        (lambda file: file.symlink_to("nowhere"), "is missing"),
        (lambda file: file.write_bytes(b"{" + b" " * 100 + b"}"), "is larger than 100 bytes"),
        (lambda file: file.write_bytes(b"null"), "its JSON is None, expected an object"),
    ],
)
def test_a_json_file_of_another_form_is_refused(tmp_path: Path, make: Callable[[Path], None], problem: str):
    make(tmp_path / "config.json")
    with pytest.raises(ModelLoadError, match=problem):
        read_json_object(tmp_path / "config.json", size_limit=100)
