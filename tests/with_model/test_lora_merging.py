"""LoRA adapters on a real model: run by PEFT, combined into one, and merged; each must say the same."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from adapter_files import make_adapter

from executors.errors import BadSpecError, ModelLoadError
from executors.inference.on_transformers.transformers_adapters import RuntimeAdapters
from executors.input_spec import AdapterEntry
from executors.lora.lora_adapters import Adapter, find_adapters, ready_adapter
from executors.lora.lora_merging import merge_into, write_merged_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

pytestmark = pytest.mark.model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
SCALED = [
    [("plain", 1.0)],
    [("plain", 0.5)],
    [("plain", -1.0)],
    [("patterns", 1.0)],
    [("patterns", 0.3)],
    [("plain", 1.0), ("stable", 1.0)],
    [("stable", -1.0), ("patterns", 0.25)],
    [("plain", 0.7), ("stable", 1.0), ("patterns", -0.5)],
    [("lower_layer", 1.0), ("plain", 0.5)],
]


@pytest.fixture(scope="module")
def adapter_dirs(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, object]] = {
        "plain": {},
        "stable": {"rank": 3, "alpha": 5, "seed": 2, "targets": ("q_proj", "o_proj", "down_proj"), "rslora": True},
        "patterns": {
            "rank": 3,
            "seed": 3,
            "targets": ("q_proj", "up_proj"),
            "rank_pattern": {"layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"up_proj": 3},
        },
        "lower_layer": {"rank": 2, "seed": 4, "layers_to_transform": [0]},
        "dora": {"seed": 5, "use_dora": True},
    }
    return {name: make_adapter(tiny_dir, home / name, **keys) for name, keys in kinds.items()}


def found(folders: Sequence[Path], scales: Sequence[float] = (), apply: str = "runtime") -> tuple[Adapter, ...]:
    entries = [
        AdapterEntry.model_validate({"path": "x", "scale": scale, "apply": apply, "name": f"{folder.name}_{place}"})
        for place, (folder, scale) in enumerate(zip(folders, scales or [1.0] * len(folders), strict=True))
    ]
    inputs = {f"model.adapters[{place}]": folder for place, folder in enumerate(folders)}
    adapters = find_adapters(entries, inputs, engine="transformers")
    return adapters.runtime + adapters.merged


def load(folder: Path) -> PreTrainedModel:
    import transformers

    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    import torch

    with torch.no_grad():
        answer: Tensor = model(torch.tensor([[1, 5, 9, 33, 70, 12]])).logits
    return answer


def by_peft(base: Path, folders: Sequence[Path], scales: Sequence[float]) -> Tensor:
    """What PEFT itself says, with all adapters active at once."""
    import peft
    from peft.tuners.lora import LoraLayer

    model = peft.PeftModel.from_pretrained(load(base), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), str(number))
    model.base_model.set_adapter([str(number) for number in range(len(folders))])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for number, scale in enumerate(scales):
                layer.set_scale(str(number), scale)
    return logits(model)


def same(left: Tensor, right: Tensor) -> bool:
    return left.allclose(right, rtol=1e-4, atol=1e-5)


def names_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def rewritten(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    tensors = load_file(to / WEIGHTS)
    change(tensors)
    save_file(tensors, to / WEIGHTS)
    return to


@pytest.mark.parametrize("scaled", SCALED, ids=lambda scaled: "+".join(f"{name}*{scale}" for name, scale in scaled))
def test_runtime_combined_and_merged_say_the_same(
    scaled: list[tuple[str, float]], adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path
):
    folders, scales = [adapter_dirs[name] for name, _ in scaled], [scale for _, scale in scaled]
    wanted = by_peft(tiny_dir, folders, scales)
    assert not same(wanted, logits(load(tiny_dir)))
    ready = ready_adapter(found(folders, scales), tmp_path)
    assert ready is not None
    assert same(by_peft(tiny_dir, [ready.folder], [1.0]), wanted)
    merged = merge_into(load(tiny_dir), found(folders, scales, apply="merge"))
    assert same(logits(merged), wanted)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not hasattr(merged, "peft_config")


def test_scale_zero_has_no_effect(adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path):
    ready = ready_adapter(found([adapter_dirs["plain"]], [0.0]), tmp_path)
    assert ready is not None
    assert same(by_peft(tiny_dir, [ready.folder], [1.0]), logits(load(tiny_dir)))


def test_one_unscaled_adapter_stays_where_it_is(adapter_dirs: dict[str, Path], tmp_path: Path):
    ready = ready_adapter(found([adapter_dirs["patterns"]]), tmp_path)
    assert ready is not None
    assert (ready.folder, ready.rank, ready.label) == (adapter_dirs["patterns"], 6, "patterns_0")
    assert not names_below(tmp_path)
    assert ready_adapter([], tmp_path) is None


def reconfigured(folder: Path, to: Path, **keys: object) -> Path:
    shutil.copytree(folder, to)
    (to / CONFIG).write_text(json.dumps({**json.loads((to / CONFIG).read_text()), **keys}))
    return to


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ranks_of_no_module_take_no_room(adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path, scale: float):
    plain = adapter_dirs["plain"]
    idle = reconfigured(plain, tmp_path / "idle", rank_pattern={"matches_nothing": 16_384})
    ready = ready_adapter(found([idle], [scale]), tmp_path)
    assert ready is not None
    assert ready.rank == 4
    assert (ready.folder / WEIGHTS).stat().st_size <= (plain / WEIGHTS).stat().st_size + 1000
    wanted = by_peft(tiny_dir, [plain], [scale])
    assert same(by_peft(tiny_dir, [ready.folder], [1.0]), wanted)
    assert same(logits(merge_into(load(tiny_dir), found([idle], [scale], apply="merge"))), wanted)


def test_nothing_is_written_above_the_limit(adapter_dirs: dict[str, Path], tmp_path: Path):
    both = found([adapter_dirs["plain"], adapter_dirs["stable"]])
    with pytest.raises(BadSpecError, match="have rank 7, above the limit of 6"):
        ready_adapter(both, tmp_path, max_rank=6)
    assert not names_below(tmp_path)
    ready = ready_adapter(both, tmp_path, max_rank=7)
    assert ready is not None
    assert ready.rank == 7


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": r"(?:.*?(?:self_attn).*?(?:q_proj|v_proj).*?)"},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": r".*\.o_proj"},
        {"exclude_modules": r"((a+)+)+b|(model\.)*([a-z.0-9_]+)+!"},
    ],
    ids=str,
)
def test_expressions_never_reach_peft(
    keys: dict[str, object], adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path
):
    plain = adapter_dirs["plain"]
    folder = reconfigured(plain, tmp_path / "copy", **keys)
    wanted = by_peft(tiny_dir, [plain], [1.0])
    assert same(logits(merge_into(load(tiny_dir), found([folder], apply="merge"))), wanted)
    ready = ready_adapter(found([folder]), tmp_path)
    assert ready is not None
    model = load(tiny_dir)
    with RuntimeAdapters(model).applied(ready):
        assert same(logits(model), wanted)


def test_the_digest_follows_files_and_scales(adapter_dirs: dict[str, Path], tmp_path: Path):
    plain, stable = adapter_dirs["plain"], adapter_dirs["stable"]
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    changed = rewritten(plain, tmp_path / "changed", lambda tensors: tensors[f"{Q_PROJ}.lora_A.weight"].mul_(2))

    def digest(folders: list[Path], *scales: float) -> str:
        ready = ready_adapter(found(folders, scales), tmp_path)
        assert ready is not None
        return ready.digest

    assert digest([plain]) == digest([copy], 1.0)
    assert digest([plain, stable], 0.5, 1.0) == digest([stable, copy], 1.0, 0.5)
    several = [digest([plain]), digest([plain], 0.5), digest([changed]), digest([plain, stable])]
    several += [digest([plain, stable], 0.5, 1.0), digest([plain, stable], 1.0, 0.5), digest([stable])]
    assert len(set(several)) == len(several)


def test_a_combined_adapter_is_made_once_and_whole(adapter_dirs: dict[str, Path], tmp_path: Path):
    both = found([adapter_dirs["plain"], adapter_dirs["stable"]])
    first = ready_adapter(both, tmp_path)
    assert first is not None
    assert (first.rank, first.label) == (7, "plain_0 + stable_1")
    assert names_below(tmp_path / "_lora_cache") == [first.digest]
    assert names_below(first.folder) == [CONFIG, WEIGHTS]
    config = json.loads((first.folder / CONFIG).read_text())
    assert (config["r"], config["target_modules"]) == (7, ["down_proj", "o_proj", "q_proj", "v_proj"])
    written = (first.folder / WEIGHTS).stat()
    again = ready_adapter(both, tmp_path)
    assert again == first
    assert (first.folder / WEIGHTS).stat().st_ino == written.st_ino


def test_nothing_half_made_is_left(adapter_dirs: dict[str, Path], tmp_path: Path):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_B.weight"][0, 0] = float("nan")

    broken = rewritten(adapter_dirs["plain"], tmp_path / "broken", spoil)
    with pytest.raises(ModelLoadError, match=r"not finite numbers, in model\.layers\.0\.self_attn\.q_proj"):
        ready_adapter(found([broken], [0.5]), tmp_path)
    tensors_of_another_model = rewritten(
        adapter_dirs["plain"],
        tmp_path / "wide",
        lambda tensors: tensors.update({key: value.repeat(1, 2) for key, value in tensors.items() if "lora_A" in key}),
    )
    with pytest.raises(BadSpecError, match=r"belong to different models: .* weights of \[32, (32|64)\] in one"):
        ready_adapter(found([adapter_dirs["plain"], tensors_of_another_model]), tmp_path)
    gone = found([Path(shutil.copytree(adapter_dirs["plain"], tmp_path / "gone"))], [0.5])
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(ModelLoadError, match="has vanished"):
        ready_adapter(gone, tmp_path)
    assert not names_below(tmp_path / "_lora_cache")


def test_a_write_that_fails_leaves_no_folder(
    adapter_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: Path, __: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    scaled = found([adapter_dirs["plain"]], [0.5])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            ready_adapter(scaled, tmp_path)
    assert not names_below(tmp_path / "_lora_cache")
    ready = ready_adapter(scaled, tmp_path)
    assert ready is not None
    assert names_below(ready.folder) == [CONFIG, WEIGHTS]


def test_the_wider_of_two_types_is_kept(adapter_dirs: dict[str, Path], tmp_path: Path):
    import torch
    from safetensors.torch import load_file

    def narrow(to: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
        return lambda tensors: tensors.update({key: value.to(to) for key, value in tensors.items()})

    brain = rewritten(adapter_dirs["plain"], tmp_path / "brain", narrow(torch.bfloat16))
    half = rewritten(adapter_dirs["stable"], tmp_path / "half", narrow(torch.float16))
    for folders, module, wanted in (
        ([brain], "q_proj", torch.bfloat16),
        ([brain, half], "v_proj", torch.bfloat16),
        ([brain, half], "q_proj", torch.float32),
        ([brain, adapter_dirs["stable"]], "q_proj", torch.float32),
    ):
        ready = ready_adapter(found(folders, [0.3] * len(folders)), tmp_path)
        assert ready is not None
        tensors = load_file(ready.folder / WEIGHTS)
        assert {value.dtype for key, value in tensors.items() if module in key} == {wanted}


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_are_adapted_without_a_copy_of_the_base(tiny_dir: Path, tmp_path: Path, target: str):
    """Tied embeddings come apart when one of them gets merged into, and the saved model keeps both."""
    from safetensors.torch import load_file

    tied = load(tiny_dir)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    folder = make_adapter(tmp_path / "tied", tmp_path / "adapter", targets=("q_proj", target))
    assert any("base_layer" in key for key in load_file(folder / WEIGHTS))
    wanted = by_peft(tmp_path / "tied", [folder], [1.0])
    ready = ready_adapter(found([folder]), tmp_path)
    assert ready is not None
    assert not any("base_layer" in key for key in load_file(ready.folder / WEIGHTS))
    assert same(by_peft(tmp_path / "tied", [ready.folder], [1.0]), wanted)
    adapters = found([folder], apply="merge")
    assert same(logits(merge_into(load(tmp_path / "tied"), adapters)), wanted)
    written = write_merged_model(str(tmp_path / "tied"), {}, str(tiny_dir), adapters, tmp_path / "merged")
    assert same(logits(load(written)), wanted)


def test_what_is_more_than_a_and_b_is_merged_too(adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path):
    dora = adapter_dirs["dora"]
    wanted = by_peft(tiny_dir, [dora], [1.0])
    assert not same(wanted, logits(load(tiny_dir)))
    assert same(logits(merge_into(load(tiny_dir), found([dora], apply="merge"))), wanted)
    ready = ready_adapter(found([dora]), tmp_path)
    assert ready is not None
    assert ready.folder == dora


def test_nothing_to_merge_changes_nothing(tiny_dir: Path):
    model = load(tiny_dir)
    assert merge_into(model, []) is model


def test_merging_refuses_what_does_not_fit(adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path):
    import torch

    plain = adapter_dirs["plain"]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_B.weight"][0, 0] = float("nan")

    def deepen(tensors: dict[str, Tensor]) -> None:
        for factor in ("lora_A", "lora_B"):
            key = f"{Q_PROJ}.{factor}.weight"
            tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()

    def thin_out(tensors: dict[str, Tensor]) -> None:
        for factor in ("lora_A", "lora_B"):
            del tensors[f"{Q_PROJ}.{factor}.weight"]

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_A.weight"] = torch.zeros(4, 64)

    for number, (change, told) in enumerate(
        [
            (spoil, "NaN"),
            (deepen, "changes 5 modules, of which the model has 4"),
            (thin_out, "missing adapter keys"),
            (widen, "size mismatch"),
        ]
    ):
        broken = rewritten(plain, tmp_path / str(number), change)
        with pytest.raises(ModelLoadError, match=rf"spec\.model\.adapters\[0\] '{number}_0' .*{told}") as caught:
            merge_into(load(tiny_dir), found([broken], apply="merge"))
        assert len(str(caught.value)) < 700
        assert "\n" not in str(caught.value)


def test_a_merged_model_is_a_model_of_its_own(adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path):
    import torch
    import transformers

    folders = [adapter_dirs["plain"], adapter_dirs["stable"]]
    target = tmp_path / "out" / "_merged_vllm_model"
    target.mkdir(parents=True)
    (target / "left_by_a_killed_try").write_text("x")
    adapters = found(folders, [1.0, 0.5], apply="merge")
    assert write_merged_model(str(tiny_dir), {}, str(tiny_dir), adapters, target) == target
    assert "left_by_a_killed_try" not in names_below(target)
    assert same(logits(load(target)), by_peft(tiny_dir, folders, [1.0, 0.5]))
    kept = transformers.GenerationConfig.from_pretrained(target)
    assert (kept.eos_token_id, kept.temperature) == (load(tiny_dir).generation_config.eos_token_id, None)
    tokens = [
        transformers.AutoTokenizer.from_pretrained(folder)("a short text").input_ids for folder in (tiny_dir, target)
    ]
    assert tokens[0] == tokens[1]
    write_merged_model(str(tiny_dir), {"dtype": torch.bfloat16}, str(tiny_dir), adapters, target)
    assert load(target).dtype == torch.bfloat16


def test_a_merged_model_is_written_whole_or_not_at_all(
    adapter_dirs: dict[str, Path], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "merged"
    adapters = found([adapter_dirs["plain"]], apply="merge")
    with pytest.raises(ModelLoadError, match=r"with 'plain_0' merged into it cannot be made: .*nowhere"):
        write_merged_model(str(tiny_dir), {}, str(tmp_path / "nowhere"), adapters, target)
    assert not target.exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.0 GiB on the disk, free are 0\.0") as caught:
        write_merged_model(str(tiny_dir), {}, str(tiny_dir), adapters, target)
    assert caught.value.errno == errno.ENOSPC
    assert not target.exists()
