"""Writes the trained model or adapter, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

from executors.model_spec import CHECKPOINT
from executors.safetensors_headers import read_headers
from executors.training.saving.model_card import model_card
from executors.training.saving.run_checkpoints import sync_folder, sync_tree
from executors.training.training_run import BuiltTrainer, TrainingRun

_ADAPTER_CONFIG: Final = "adapter_config.json"
_PICKLES: Final = ("training_args.bin",)
"""Files that a trainer puts beside the weights; opening them runs code, and nobody needs them."""


def save_final(run: TrainingRun, built: BuiltTrainer) -> str:
    """Save the result of a run; all ranks call it.

    It holds the weights, the tokenizer with its chat template, and a model card. What an earlier run has left under the
    same name is replaced.

    Returns:
        The folder relative to the task's own; empty if `training.save_model` is false.

    Raises:
        OSError: it cannot be written; nothing of it is left then.
    """
    if not run.spec.training.save_model:
        return ""
    target = run.job.out_dir / built.folder
    partial = target.with_name(f".{target.name}.partial")
    if run.is_first:
        _clear(partial)
        partial.mkdir(parents=True)
    run.wait_for_all()
    _gather_shards(built)
    try:
        built.trainer.save_model(str(partial))
        if run.is_first:
            _complete(run, built, partial)
            _replace(target, partial)
    except BaseException:
        if run.is_first:  # half a model would take the room that the next try needs
            shutil.rmtree(partial, ignore_errors=True)
        raise
    run.wait_for_all()
    return built.folder


def drop_unfinished(out_dir: Path) -> None:
    """Remove what saving has left where it was cut off: it may be as large as the model, and nobody would see it."""
    for partial in (*out_dir.glob(".final_*.partial"), *out_dir.glob("checkpoints/.final_*.partial")):
        _clear(partial)


def _gather_shards(built: BuiltTrainer) -> None:
    """Let FSDP write whole weights, also where checkpoints hold a part of them for each rank."""
    accelerator = getattr(built.trainer, "accelerator", None)
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if accelerator else None
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")


def _complete(run: TrainingRun, built: BuiltTrainer, folder: Path) -> None:
    built.tokenizer.save_pretrained(str(folder))
    for name in _PICKLES:
        (folder / name).unlink(missing_ok=True)
    if not read_headers(folder):
        raise RuntimeError(f"the trainer has written no weights to {folder.name!r}")
    if built.adapter:
        _name_base(run, folder / _ADAPTER_CONFIG)
    (folder / "README.md").write_text(model_card(run, built), encoding="utf-8")
    sync_tree(folder)


def _name_base(run: TrainingRun, config_file: Path) -> None:
    """Let an adapter name its base as the task does, not by the folder in which this worker found it."""
    identifier = run.spec.model.source.identifier
    config = json.loads(config_file.read_text(encoding="utf-8"))
    loaded = str(config.get("base_model_name_or_path") or "")
    checkpoint = run.inputs.get(CHECKPOINT)
    if not identifier or (checkpoint and Path(loaded).is_relative_to(checkpoint)):
        return  # the base is what checkpoint.load has brought; it has no other name
    config["base_model_name_or_path"] = identifier
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _clear(path: Path) -> None:
    """Remove a folder, or a link to one without what lies behind it."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _replace(target: Path, new: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    _clear(old)
    if os.path.lexists(target):
        target.rename(old)
    new.rename(target)
    _clear(old)
    sync_folder(target.parent)
