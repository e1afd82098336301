"""Which checkpoint a run continues from; nothing heavy is needed for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from executors.contract import EnginePolicy
from executors.errors import BadSpecError
from executors.model_spec import CHECKPOINT
from executors.training.saving import run_checkpoints
from executors.training.saving.run_checkpoints import (
    COMPLETE_FILE,
    identity_of,
    last_complete,
    mark_complete,
    prepare_resume,
)
from executors.training.spec.trainer_specs import SPEC_TYPES, TrainingSpec
from executors.training.spec.training_data_spec import JSONL

Damage = Callable[[Path], None]


def spec_of(kind: str = "sft", **sections: object) -> TrainingSpec:
    base = {"model": {"source": {"identifier": "acme/tiny"}}, "data": {"prompts": ["a", "b"]}}
    return SPEC_TYPES[kind].model_validate({"taskType": kind, **base, **sections})


def tensors_file(size: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def make_checkpoint(folder: Path, step: int, *, identity: str | None = "mine") -> Path:
    """A checkpoint as a trainer writes it; with None for the identity it stays without a mark."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(tensors_file())
    (checkpoint / "optimizer.pt").write_bytes(b"state" * 100)
    (checkpoint / "shards" / "0.bin").write_bytes(b"shard")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if identity is not None:
        mark_complete(checkpoint, identity, step)
    return checkpoint


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_furthest_whole_checkpoint_is_found(tmp_path: Path):
    for step in (2, 9, 10):  # by number: as text, 9 comes after 10
        make_checkpoint(tmp_path, step)
    found = last_complete(tmp_path, "mine")
    assert found is not None
    assert (found.step, found.path) == (10, tmp_path / "checkpoint-10")


def test_without_a_folder_there_is_none(tmp_path: Path):
    assert last_complete(tmp_path / "nothing", "mine") is None


def delete_a_file(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def cut_a_file(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 10)


def delete_an_inner_file(folder: Path) -> None:
    (folder / "shards" / "0.bin").unlink()


def delete_the_mark(folder: Path) -> None:
    (folder / COMPLETE_FILE).unlink()


def cut_the_mark(folder: Path) -> None:
    os.truncate(folder / COMPLETE_FILE, 20)


def put_another_mark(folder: Path) -> None:
    mark_complete(folder, "another run", 4)


def put_a_link(folder: Path) -> None:
    outside = folder.parent.parent / "outside.bin"
    outside.write_bytes((folder / "optimizer.pt").read_bytes())
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to(outside)


def name_a_file_outside(folder: Path) -> None:
    mark = json.loads((folder / COMPLETE_FILE).read_text())
    mark["files"]["../../" + folder.parent.name + "/checkpoint-2/optimizer.pt"] = 500
    (folder / COMPLETE_FILE).write_text(json.dumps(mark))


def write_nonsense(folder: Path) -> None:
    (folder / COMPLETE_FILE).write_text('{"identity": "mine", "step": "4", "files": []}')


@pytest.mark.parametrize(
    "damage",
    [
        delete_a_file, cut_a_file, delete_an_inner_file, delete_the_mark, cut_the_mark, put_another_mark, put_a_link,
        name_a_file_outside, write_nonsense,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_a_cut_off_checkpoint_is_passed_over_and_removed(tmp_path: Path, damage: Damage):
    checkpoints = tmp_path / "run" / "checkpoints"
    make_checkpoint(checkpoints, 2)
    damage(make_checkpoint(checkpoints, 4))
    found = last_complete(checkpoints, "mine")
    assert found is not None
    assert found.step == 2
    decision = prepare_resume(tmp_path / "run", "mine", spec_of(), EnginePolicy())
    assert decision.point == found
    assert "checkpoint-4" in decision.note
    assert names_in(checkpoints) == ["checkpoint-2"]


def test_a_whole_folder_moved_to_another_step_does_not_count(tmp_path: Path):
    make_checkpoint(tmp_path, 4).rename(tmp_path / "checkpoint-40")
    assert last_complete(tmp_path, "mine") is None


def test_only_checkpoints_are_removed(tmp_path: Path):
    checkpoints = tmp_path / "checkpoints"
    make_checkpoint(checkpoints, 3, identity=None)
    (checkpoints / "final_model").mkdir()
    (checkpoints / "checkpoint-best").mkdir()
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 5)
    (checkpoints / "checkpoint-5").symlink_to(elsewhere)
    decision = prepare_resume(tmp_path, "mine", spec_of(), EnginePolicy())
    assert decision.point is None
    assert names_in(checkpoints) == ["checkpoint-best", "final_model"]
    assert (elsewhere / "optimizer.pt").exists()


def test_resume_never_starts_anew(tmp_path: Path):
    make_checkpoint(tmp_path / "checkpoints", 3)
    decision = prepare_resume(tmp_path, "mine", spec_of(training={"resume": "never"}), EnginePolicy())
    assert decision.point is None
    assert "never" in decision.note
    assert names_in(tmp_path / "checkpoints") == []


def test_a_checkpoint_of_ones_own_wins_over_the_one_that_is_named(tmp_path: Path):
    named = make_checkpoint(tmp_path / "other", 7, identity=None)
    spec = spec_of(training={"resume_from_path": str(named)})
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    first = prepare_resume(tmp_path / "run", "mine", spec, policy)
    assert first.point is not None
    assert (first.point.path, first.point.step) == (named, 7)
    own = make_checkpoint(tmp_path / "run" / "checkpoints", 9)
    second = prepare_resume(tmp_path / "run", "mine", spec, policy)
    assert second.point is not None
    assert second.point.path == own


def test_the_checkpoint_that_is_named_stays_though_it_is_of_another_run(tmp_path: Path):
    checkpoints = tmp_path / "run" / "checkpoints"
    named = make_checkpoint(checkpoints, 7, identity="an earlier run")
    make_checkpoint(checkpoints, 8, identity="an earlier run")
    spec = spec_of(training={"resume_from_path": str(named)})
    decision = prepare_resume(tmp_path / "run", "mine", spec, EnginePolicy(allowed_roots=(tmp_path,)))
    assert decision.point is not None
    assert decision.point.path == named
    assert names_in(checkpoints) == ["checkpoint-7"]


def cut_the_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 60)


def cut_the_state(folder: Path) -> None:
    os.truncate(folder / "trainer_state.json", 5)


@pytest.mark.parametrize("identity", ["any", None], ids=["marked", "unmarked"])
@pytest.mark.parametrize("damage", [delete_a_file, cut_the_weights, cut_the_state], ids=lambda damage: damage.__name__)
def test_a_named_checkpoint_that_was_cut_off_is_refused(tmp_path: Path, damage: Damage, identity: str | None):
    named = make_checkpoint(tmp_path, 7, identity=identity)
    damage(named)
    spec = spec_of(training={"resume_from_path": str(named)})
    with pytest.raises(BadSpecError, match="resume_from_path") as caught:
        prepare_resume(tmp_path / "run", "mine", spec, EnginePolicy(allowed_roots=(tmp_path,)))
    assert "checkpoint" in caught.value.hint


@pytest.mark.parametrize("kind", ["sft", "lora_sft"])
def test_an_adapter_alone_is_a_start_for_lora_sft_only(tmp_path: Path, kind: str):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    spec = spec_of(kind, training={"resume_from_path": str(tmp_path / "adapter")})
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    if kind == "lora_sft":
        assert prepare_resume(tmp_path / "run", "mine", spec, policy).point is None
    else:
        with pytest.raises(BadSpecError, match=r"trainer_state\.json") as caught:
            prepare_resume(tmp_path / "run", "mine", spec, policy)
        assert "checkpoint.load" in caught.value.hint


def test_a_path_outside_the_allowed_folders_is_refused(tmp_path: Path):
    named = make_checkpoint(tmp_path / "outside", 7)
    spec = spec_of(training={"resume_from_path": str(named)})
    with pytest.raises(BadSpecError, match="outside"):
        prepare_resume(tmp_path / "run", "mine", spec, EnginePolicy(allowed_roots=(tmp_path / "run",)))


def test_a_full_disk_leaves_a_checkpoint_without_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_checkpoint(tmp_path, 3, identity=None)

    def no_room(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        mark_complete(folder, "mine", 3)
    assert last_complete(tmp_path, "mine") is None
    assert not [name for name in names_in(folder) if "complete" in name]


SAME = [
    {"training": {"resume": "never"}},
    {"training": {"save_steps": 7, "logging_steps": 3, "save_total_limit": 5, "oom_retry": True}},
    {"training": {"visible_devices": [1], "primary_gpu": 1, "allow_multi_gpu": False, "report_to": ["tensorboard"]}},
    {"output": {"destination": {"path": "elsewhere"}}},
    {"_upstreamResults": {"before": {"result": 1}}},
]
OTHER = [
    {"training": {"learning_rate": 1e-3}},
    {"training": {"batch_size": 8}},
    {"training": {"max_steps": 5}},
    {"training": {"trl": {"weight_decay": 0.1}}},
    {"training": {"deepspeed": {"zero_optimization": {"stage": 2}}}},
    {"data": {"prompts": ["a", "c"]}},
    {"model": {"source": {"identifier": "acme/other"}}},
]


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_does_not_decide_the_weights_does_not_change_the_identity(change: dict[str, object]):
    assert identity_of(spec_of(**change), {}) == identity_of(spec_of(), {})


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_what_decides_the_weights_changes_the_identity(change: dict[str, object]):
    assert identity_of(spec_of(**change), {}) != identity_of(spec_of(), {})


def test_another_number_of_processes_is_another_run():
    """A step takes another number of rows then, so that steps cannot be counted on."""
    assert identity_of(spec_of(), {}, ranks=2) != identity_of(spec_of(), {})


def test_the_kind_changes_the_identity():
    assert identity_of(spec_of("lora_sft"), {}) != identity_of(spec_of("sft"), {})


def test_files_count_by_their_content_not_by_their_place(tmp_path: Path):
    def identity(place: str, text: str) -> str:
        file = tmp_path / place / "data.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        model = tmp_path / place / "model"
        model.mkdir(exist_ok=True)
        (model / "model.safetensors").write_bytes(tensors_file())
        data = {"jsonl": {"url": f"https://host/{place}", "headers": {"Authorization": place}}}
        load = {"type": "http", "url": f"https://host/{place}/model", "headers": {"Authorization": place}}
        return identity_of(spec_of(data=data, checkpoint={"load": load}), {JSONL: file, CHECKPOINT: model})

    assert identity("one", "a") == identity("two", "a")
    assert identity("one", "a") != identity("two", "b")


def test_a_model_on_this_worker_counts_by_its_content(tmp_path: Path):
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    spec = spec_of(model={"source": {"identifier": str(tmp_path / "model")}})
    weights.write_bytes(tensors_file(8))
    first = identity_of(spec, {}, policy)
    assert identity_of(spec, {}, policy) == first
    weights.write_bytes(tensors_file(16))
    assert identity_of(spec, {}, policy) != first


@pytest.mark.parametrize("inner", ["global_step7/states.pt", "pytorch_model_fsdp_0/.metadata", ".metadata"])
def test_a_named_checkpoint_whose_reader_unpickles_is_for_workers_that_allow_code(tmp_path: Path, inner: str):
    named = make_checkpoint(tmp_path, 7, identity=None)
    (named / inner).parent.mkdir(exist_ok=True)
    (named / inner).write_bytes(b"pickle")
    spec = spec_of(training={"resume_from_path": str(named), "fsdp": True})
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    with pytest.raises(BadSpecError, match="may run code when it is read"):
        prepare_resume(tmp_path / "run", "mine", spec, policy)
    allowed = policy.model_copy(update={"allow_remote_code": True})
    point = prepare_resume(tmp_path / "run", "mine", spec, allowed).point
    assert point is not None
    assert point.path == named


@pytest.mark.parametrize("step", [10**30, -1, True, 1.5, "7", None])
def test_a_named_checkpoint_must_say_a_number_of_steps(tmp_path: Path, step: object):
    named = make_checkpoint(tmp_path, 7, identity=None)
    (named / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    spec = spec_of(training={"resume_from_path": str(named)})
    with pytest.raises(BadSpecError, match="expected a number of steps"):
        prepare_resume(tmp_path / "run", "mine", spec, EnginePolicy(allowed_roots=(tmp_path,)))


def test_a_folder_of_too_many_files_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_checkpoints, "_MOST_FILES", 3)
    policy = EnginePolicy(allowed_roots=(tmp_path,))
    spec = spec_of(data={"dataset_name": "."})
    for name in "abc":
        (tmp_path / name).write_text(name)
    assert identity_of(spec, {}, policy)
    (tmp_path / "d").write_text("d")
    with pytest.raises(BadSpecError, match="more than 3 files"):
        identity_of(spec, {}, policy)


def test_of_much_data_only_a_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However many files there are: whoever names the folder of all results must not keep the worker busy for hours."""
    limit = 64 * 2**20
    monkeypatch.setattr(run_checkpoints, "_READ_WHOLE", limit)
    for number in range(4):
        with (tmp_path / f"{number}.bin").open("wb") as file:
            file.truncate(limit - 1)
    spec, policy = spec_of(data={"dataset_name": "."}), EnginePolicy(allowed_roots=(tmp_path,))
    first = identity_of(spec, {}, policy)
    before = _read_so_far()
    assert identity_of(spec, {}, policy) == first
    assert _read_so_far() - before < limit + 2**20
    with (tmp_path / "2.bin").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert identity_of(spec, {}, policy) != first


def test_a_link_to_a_file_without_end_is_not_read(tmp_path: Path):
    endless = Path("/proc/sys/kernel/random/uuid")  # of size 0, and other text each time
    (tmp_path / "rows.json").symlink_to(endless)
    spec, policy = spec_of(data={"dataset_name": "."}), EnginePolicy(allowed_roots=(tmp_path,))
    assert endless.read_text() != endless.read_text()
    assert identity_of(spec, {}, policy) == identity_of(spec, {}, policy)


def _read_so_far() -> int:
    """Bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])
