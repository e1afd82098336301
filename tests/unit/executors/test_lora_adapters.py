"""LoRA adapters before they reach an engine: what is found, what is refused and why, what fits a base model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_files import make_adapter
from model_files import make_tiny_model

from executors.errors import BadSpecError, ModelLoadError
from executors.input_spec import AdapterEntry
from executors.lora.lora_adapters import (
    Adapter,
    AdapterEngine,
    AdapterSet,
    check_base,
    check_rank,
    find_adapters,
    identity,
    label_of,
)
from executors.safetensors_headers import INDEX_NAME, TensorFacts, read_headers

pytestmark = pytest.mark.model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture(scope="session")
def made_once(model_dir: Path) -> Path:
    return make_adapter(model_dir, model_dir.parent / "adapter")


@pytest.fixture
def folder(made_once: Path, tmp_path: Path) -> Path:
    """An adapter of rank 4 for q_proj and v_proj, to be spoiled."""
    return Path(shutil.copytree(made_once, tmp_path / "adapter"))


def entry(**keys: object) -> AdapterEntry:
    return AdapterEntry.model_validate({"path": "x", **keys})


def find(folder: Path, engine: AdapterEngine = "vllm", **keys: object) -> AdapterSet:
    return find_adapters([entry(**keys)], {"model.adapters[0]": folder}, engine=engine)


def the_one(folder: Path, **keys: object) -> Adapter:
    (adapter,) = find(folder, **keys).runtime
    return adapter


def configure(folder: Path, **keys: object) -> None:
    """Change keys of the adapter's configuration; `...` takes one away."""
    config = {**json.loads((folder / CONFIG).read_text()), **keys}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the adapter's tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_each_entry_finds_its_folder(folder: Path):
    entries = [entry(name="a"), entry(type="ia3"), entry(apply="merge", scale=-0.5), entry(id=7)]
    found = find_adapters(entries, {f"model.adapters[{place}]": folder for place in (0, 2, 3)}, engine="vllm")
    assert [(each.name, each.place, each.scale) for each in found.runtime] == [("a", 0, 1.0), ("7", 3, 1.0)]
    assert [(each.name, each.place, each.scale) for each in found.merged] == [("lora_2", 2, -0.5)]
    assert found.warnings == ("spec.model.adapters[1] is of type 'ia3' and is skipped; only 'lora' is known",)
    assert label_of(found.runtime) == "a + 7"
    first = found.runtime[0]
    assert (first.folder, first.rank, len(first.modules), first.extras) == (folder, 4, 4, ())
    assert [name for name, _, _ in first.stamp] == [CONFIG, WEIGHTS]
    assert first.stamp[1][1] == (folder / WEIGHTS).stat().st_size


def test_nothing_asked_nothing_found():
    assert find_adapters([], {}, engine="vllm") == AdapterSet((), (), ())


def test_a_name_stands_for_one_adapter(folder: Path):
    inputs = {f"model.adapters[{place}]": folder for place in range(2)}
    with pytest.raises(BadSpecError, match="the name 'a' more than once"):
        find_adapters([entry(name="a"), entry(name="a", apply="merge")], inputs, engine="vllm")


def test_the_daemon_must_have_found_it(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no files for it"):
        find_adapters([entry()], {}, engine="vllm")
    with pytest.raises(ModelLoadError, match=r"spec\.model\.adapters\[0\] 'lora_0': .* has vanished"):
        find(tmp_path / "gone")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"peft_type": "IA3"}, "is no LoRA adapter: .* peft_type 'IA3'; expected 'LORA'"),
        ({"peft_type": ...}, "peft_type None"),
        ({"r": 0}, "r is 0: input should be greater than 0"),
        ({"r": "4"}, "r is '4': input should be a valid integer"),
        ({"r": True}, "r is True"),
        ({"r": 10**9}, "r is 1000000000"),
        ({"r": ...}, "r is missing"),
        ({"lora_alpha": [1]}, r"lora_alpha is \[1\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": {"a": 1}}, "target_modules"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj is 0"),
        ({"rank_pattern": {"q_proj": "x" * 500}}, r"rank_pattern\.q_proj is 'x{80}'"),
        ({"alpha_pattern": {"(": 1}}, r"the pattern '\(' in alpha_pattern; expected names of modules"),
        ({"rank_pattern": {"(a+)+b": 4}}, r"the pattern '\(a\+\)\+b' in rank_pattern"),
        ({"rank_pattern": {r"\d+\d+x": 4}}, "in rank_pattern"),
        ({"rank_pattern": {"a" * 1001: 4}}, "in rank_pattern"),
        (
            {"rank_pattern": {f"a{number}": 4 for number in range(1001)}},
            "1001 patterns in rank_pattern; expected at most",
        ),
        ({"target_modules": ["q_proj", "(a+)+b"]}, r"the name '\(a\+\)\+b' in target_modules; expected up to 500"),
        ({"exclude_modules": ["(a+)+b"]}, "in exclude_modules"),
        ({"modules_to_save": ["(a+)+b"]}, "in modules_to_save"),
        ({"trainable_token_indices": {"(a+)+b": [1]}}, "in trainable_token_indices"),
        ({"target_modules": "(a+)+b", "target_parameters": ["x"]}, "target_modules .* beside target_parameters"),
        (
            {"layers_pattern": "(a+)+b", "target_parameters": ["x"], "target_modules": []},
            "layers_pattern .* beside target_parameters",
        ),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"rank_pattern": {"q_proj": 8}}, r"lora_A \[4, 32\] and lora_B \[32, 4\]; .* says rank 8"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "its base model's weights change too"),
    ],
)
def test_a_wrong_configuration_is_refused(folder: Path, keys: dict[str, object], told: str):
    configure(folder, **keys)
    for apply in ("runtime", "merge"):
        with pytest.raises(BadSpecError, match=rf"spec\.model\.adapters\[0\] 'lora_0' .*{told}"):
            find(folder, apply=apply)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "JSON cannot be read"),
        (b"[1]", "expected an object"),
        (b'{"r": ' + b"[" * 100_000, "JSON cannot be read"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "JSON cannot be read"),
        (b'"' + b"x" * 2_000_000, "larger than 1000000 bytes"),
        (b"\xff\xfe", "JSON cannot be read"),
    ],
)
def test_a_hostile_configuration_is_refused(folder: Path, text: bytes, told: str):
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(BadSpecError, match=told):
        find(folder)


def test_a_huge_configuration_is_not_read(folder: Path):
    with (folder / CONFIG).open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BadSpecError, match="larger than"):
        find(folder)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path):
    (folder / WEIGHTS).rename(tmp_path / "weights")
    with pytest.raises(BadSpecError, match=rf"has no {WEIGHTS}"):
        find(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(BadSpecError, match=r"adapter_model\.bin, a pickle.*may run code") as caught:
        find(folder)
    assert "safe_serialization" in caught.value.hint
    (folder / CONFIG).unlink()
    with pytest.raises(BadSpecError, match=rf"has no {CONFIG}"):
        find(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path):
    (folder / WEIGHTS).rename(folder / "own")
    (folder / WEIGHTS).symlink_to("own")
    assert the_one(folder).rank == 4
    (folder / WEIGHTS).unlink()
    (folder / "own").rename(tmp_path / "outside")
    (folder / WEIGHTS).symlink_to(tmp_path / "outside")
    with pytest.raises(BadSpecError, match=rf"has '{WEIGHTS}' as a link to something outside"):
        find(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_is_not_waited_for(folder: Path, name: str):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadSpecError, match="not a regular file"):
        find(folder)


def test_damaged_weights_are_refused(folder: Path):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(BadSpecError, match=rf"cannot be used: .*{WEIGHTS} is cut off"):
        find(folder)
    (folder / WEIGHTS).write_bytes(whole)
    rewrite(folder, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"))
    with pytest.raises(BadSpecError, match=r"incomplete: 'model\.layers\.0\.self_attn\.q_proj' has lora_A but not"):
        find(folder)
    (folder / WEIGHTS).write_bytes(whole)
    short = f"{Q_PROJ}.lora_A.weight".removeprefix("base_model.model.")
    rewrite(folder, lambda tensors: tensors.update({short: tensors[f"{Q_PROJ}.lora_A.weight"].clone()}))
    with pytest.raises(BadSpecError, match="has lora_A twice"):
        find(folder)
    (folder / WEIGHTS).write_bytes(whole)
    rewrite(folder, lambda tensors: tensors.update({key: value.long() for key, value in tensors.items()}))
    with pytest.raises(BadSpecError, match="of type I64"):
        find(folder)
    rewrite(folder, lambda tensors: tensors.clear())
    with pytest.raises(BadSpecError, match="has no LoRA weights"):
        find(folder)
    (folder / INDEX_NAME).write_text("{}")
    with pytest.raises(BadSpecError, match="holds a whole model as well"):
        find(folder)


def test_names_without_the_usual_prefix_are_for_vllm(folder: Path):
    def shorten(tensors: dict[str, object]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    rewrite(folder, shorten)
    assert the_one(folder).modules[0].name.startswith("model.layers.0")
    for engine, apply in (("transformers", "runtime"), ("vllm", "merge")):
        with pytest.raises(BadSpecError, match=r"expected names that begin with 'base_model\.model\.'"):
            find_adapters([entry(apply=apply)], {"model.adapters[0]": folder}, engine=engine)


@pytest.mark.parametrize(
    ("keys", "able"),
    [
        ({"use_dora": True}, {"transformers", "merge"}),
        ({"modules_to_save": ["lm_head"]}, {"transformers", "merge"}),
        ({"trainable_token_indices": [1]}, {"transformers", "merge"}),
        ({"lora_bias": True}, {"transformers", "merge"}),
        ({"bias": "all"}, {"merge"}),
        ({"target_parameters": ["q_proj.weight"]}, {"vllm", "transformers", "merge"}),
        ({"lora_alpha": 3.5, "init_lora_weights": "gaussian", "unheard_of": [1]}, {"vllm", "transformers", "merge"}),
    ],
)
def test_each_engine_gets_what_it_can_apply(folder: Path, keys: dict[str, object], able: set[str]):
    configure(folder, **keys)
    uses: list[tuple[str, AdapterEngine, str]] = [
        ("vllm", "vllm", "runtime"),
        ("transformers", "transformers", "runtime"),
        ("merge", "vllm", "merge"),
    ]
    for use, engine, apply in uses:
        if use in able:
            found = find(folder, engine, apply=apply)
            assert len(found.runtime + found.merged) == 1
        else:
            with pytest.raises(BadSpecError, match="cannot be applied at run time") as caught:
                find(folder, engine, apply=apply)
            assert "apply: merge" in caught.value.hint


def test_whole_weights_in_an_adapter_are_only_merged(folder: Path):
    import torch

    rewrite(folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))
    for engine in ("vllm", "transformers"):
        with pytest.raises(BadSpecError, match=r"\(the tensor 'base_model\.model\.lm_head\.weight'\)"):
            find(folder, engine)
    assert find(folder, apply="merge").merged[0].extras


def test_more_than_a_and_b_acts_alone(folder: Path, made_once: Path):
    configure(folder, use_dora=True)
    with pytest.raises(BadSpecError, match=r"\(use_dora\), but has scale 0\.5"):
        find(folder, "transformers", scale=0.5)
    inputs = {"model.adapters[0]": made_once, "model.adapters[1]": folder}
    with pytest.raises(BadSpecError, match=r"adapters\[1\] .*\(use_dora\), but does not stand alone"):
        find_adapters([entry(), entry()], inputs, engine="transformers")
    assert find_adapters([entry(apply="merge"), entry()], inputs, engine="transformers").runtime[0].extras


def test_ranks_add_up(folder: Path, model_dir: Path, tmp_path: Path):
    wide = make_adapter(model_dir, tmp_path / "wide", rank=6, targets=("q_proj", "o_proj"))
    inputs = {"model.adapters[0]": folder, "model.adapters[1]": wide}
    both = find_adapters([entry(name="a"), entry(name="b")], inputs, engine="vllm").runtime
    check_rank(both, 10)
    with pytest.raises(BadSpecError, match=r"'a' \(4\), 'b' \(6\) act together and have rank 10, above the limit of 8"):
        check_rank(both, 8)
    with pytest.raises(BadSpecError, match=r"adapters\[1\] 'b' has rank 6, above the limit of 4") as caught:
        check_rank(both[1:], 4)
    assert "spec.model.vllm.max_lora_rank" in caught.value.hint
    check_rank([], 0)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj|v_proj",
        r"layers\.\d+\.self_attn\.q_proj|v_proj",
        "^model.layers.[0-9]+\\.self_attn.q_proj",
        r".*\.q_proj",
    ],
)
def test_harmless_patterns_are_taken(folder: Path, pattern: str):
    configure(folder, alpha_pattern={pattern: 2})
    assert {module.scaling for module in the_one(folder).modules if "q_proj" in module.name} == {0.5}


def test_a_name_for_an_expression_is_refused(folder: Path):
    def rename(tensors: dict[str, object]) -> None:
        for factor in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{'a' * 501}.{factor}.weight"] = tensors.pop(f"{Q_PROJ}.{factor}.weight")

    rewrite(folder, rename)
    with pytest.raises(BadSpecError, match=rf"the name 'a{{80}}' in {WEIGHTS}"):
        find(folder)


def test_ranks_of_no_module_do_not_count(folder: Path):
    configure(folder, r=512, rank_pattern={"q_proj|v_proj": 4, "matches_nothing": 16_384})
    adapter = the_one(folder)
    assert (adapter.rank, adapter.has_idle_ranks) == (4, True)
    check_rank([adapter], 4)
    assert len(adapter.named_targets) == 4


def test_a_rank_beyond_the_weights_is_refused(folder: Path):
    import torch

    def widen(tensors: dict[str, object]) -> None:
        tensors[f"{Q_PROJ}.lora_A.weight"] = torch.zeros(9000, 1)
        tensors[f"{Q_PROJ}.lora_B.weight"] = torch.zeros(1, 9000)

    rewrite(folder, widen)
    configure(folder, rank_pattern={"layers.0.self_attn.q_proj": 9000})
    with pytest.raises(BadSpecError, match=r"rank 9000 in 'model\.layers\.0\.self_attn\.q_proj', more than"):
        find(folder)


def facts(*shape: int, dtype: str = "F32") -> TensorFacts:
    return TensorFacts(dtype, shape, 0, Path("x"))


def test_an_adapter_fits_its_own_model(folder: Path, model_dir: Path):
    adapter = the_one(folder)
    own = read_headers(model_dir)
    check_base(adapter, own, "tiny")
    check_base(adapter, {}, "tiny")
    deeper = {name.replace("model.", "language_model.model.", 1): value for name, value in own.items()}
    check_base(adapter, deeper, "tiny")
    packed = {name: facts(1, 7, dtype="U8") for name in own}
    check_base(adapter, packed, "tiny")


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.{}.self_attn.qkv.weight"],  # joined under a name nobody knows
        ["a.layers.{}.self_attn.q_proj.weight", "b.layers.{}.self_attn.q_proj.weight"],  # which of the two?
        ["model.layers.{}.attention.q_proj.weight"],  # renamed while loading?
    ],
)
def test_what_is_doubtful_is_left_to_the_engine(folder: Path, names: list[str]):
    adapter = the_one(folder)
    check_base(adapter, {name.format(layer): facts(5, 5) for name in names for layer in range(2)}, "x")
    assert adapter.modules


def test_an_adapter_of_another_model_is_refused(folder: Path, model_dir: Path):
    configure(folder, base_model_name_or_path="org/other")
    adapter = the_one(folder, name="a")
    own = read_headers(model_dir)
    wider = {name: facts(*(2 * size for size in value.shape)) for name, value in own.items()}
    told = (
        r"adapters\[0\] 'a' does not belong to the model 'wide': in model\.layers\.0\.self_attn\.q_proj its lora_A is "
        r"\[4, 32\] and its lora_B \[32, 4\], which fits weights of \[32, 32\], and that model's are \[64, 64\]\. "
        r"The adapter was made for 'org/other'"
    )
    with pytest.raises(BadSpecError, match=told):
        check_base(adapter, wider, "wide")
    shallow = {name: value for name, value in own.items() if "layers.1." not in name}
    with pytest.raises(BadSpecError, match=r"changes model\.layers\.1\..*last layer is model\.layers\.0"):
        check_base(adapter, shallow, "flat")
    other = {"transformer.h.0.attn.c_attn.weight": facts(32, 96)}
    with pytest.raises(BadSpecError, match="modules named q_proj, v_proj, and that model has none"):
        check_base(adapter, other, "gpt2")


def test_the_identity_tells_what_gets_merged():
    one = entry(apply="merge", url="http://host/a.tar.gz")
    same = entry(apply="merge", url="http://host/a.tar.gz", name="other", headers={"Authorization": "secret"})
    assert identity([one]) == identity([same]) == identity([entry(), one, entry(type="ia3")])
    assert identity([]) == identity([entry()]) == ""
    others = [
        entry(apply="merge", url="http://host/b.tar.gz"),
        entry(apply="merge", url="http://host/a.tar.gz", scale=2),
    ]
    assert len({identity([one]), *(identity([other]) for other in others), identity([one, *others])}) == 4
