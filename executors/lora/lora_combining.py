"""Makes one LoRA adapter of several that act together, or of a scaled one: engines apply one at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from executors.errors import BadSpecError, ModelLoadError
from executors.lora.lora_files import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Adapter,
    LoraModule,
    check_rank,
    combined_rank,
    label_of,
)

if TYPE_CHECKING:
    from torch import Tensor

_HIGHEST_RANK: Final = 512  # also the highest that vLLM can be told to allow
_CACHE: Final = "_lora_cache"
_FORM: Final = "1"
"""Counts the ways in which adapters have been combined; part of each digest."""


@dataclass(frozen=True)
class ReadyAdapter:
    """An adapter that an engine can load as it is.

    Attributes:
        folder: a PEFT adapter with the whole effect, scales included.
        digest: equal for equal files and scales, whatever their folders and order: a name for engines to keep it under.
        rank: the rank that the engine must allow.
        label: the names of its adapters, for people.
        named_targets: see `Adapter.named_targets`.
    """

    folder: Path
    digest: str
    rank: int
    label: str
    named_targets: tuple[str, ...] = ()


def ready_adapter(adapters: Sequence[Adapter], scratch: Path, *, max_rank: int = _HIGHEST_RANK) -> ReadyAdapter | None:
    """Make one adapter with the effect of all of them.

    A single adapter with scale 1 stays where it is, if its files are in order. Anything else is written below
    `scratch/_lora_cache`, whole or not at all, and found there the next time. It is exact up to rounding.

    Args:
        adapters: those that act together; none gives None.
        scratch: a folder to write to.
        max_rank: the highest rank that the engine allows.

    Raises:
        BadSpecError: adapters of different base models, or above the limit together.
        ModelLoadError: weights that are not finite, or cannot be read.
    """
    if not adapters:
        return None
    check_rank(adapters, max_rank)  # before anything of that size is made
    digests = {adapter.place: _digest_of(adapter) for adapter in adapters}
    # The sum does not depend on the order, so neither does its digest.
    ordered = sorted(adapters, key=lambda each: digests[each.place])
    digest = hashlib.sha256("\n".join([_FORM, *sorted(digests.values())]).encode()).hexdigest()
    rank, label = combined_rank(adapters), label_of(adapters)
    (first, *more) = ordered
    if not more and (first.extras or (first.scale == 1 and not (first.has_base_copies or first.has_idle_ranks))):
        return ReadyAdapter(first.folder, digest, rank, label, first.named_targets)
    folder = scratch / _CACHE / digest
    if not folder.is_dir():
        _write(folder, _config(ordered, rank), _combine(ordered, rank))
    return ReadyAdapter(folder, digest, rank, label)


def _digest_of(adapter: Adapter) -> str:
    files = (_digest_of_file(adapter.folder / name, size, changed) for name, size, changed in adapter.stamp)
    return ":".join([*files, repr(float(adapter.scale))])


@functools.lru_cache(maxsize=256)
def _digest_of_file(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file in a known state; tasks name the same adapters again and again."""
    del size, changed  # part of the cache's key
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ModelLoadError(f"the adapter file {file} has vanished", hint="Send the task again.") from error


def _scaling(adapters: Sequence[Adapter]) -> float:
    """The factor that all modules have in common, which then need not be multiplied in; else 1."""
    factors = {adapter.scale * module.scaling for adapter in adapters for module in adapter.modules}
    return factors.pop() if len(factors) == 1 else 1.0


def _config(adapters: Sequence[Adapter], rank: int) -> dict[str, object]:
    plain = [adapter.plain_targets for adapter in adapters]
    if all(targets is not None for targets in plain):
        targets = {target for each in plain for target in each or ()}
    else:
        targets = {module.name for adapter in adapters for module in adapter.modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters[0].base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank * _scaling(adapters),
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(adapter.fan_in_fan_out for adapter in adapters),
    }


def _combine(adapters: Sequence[Adapter], rank: int) -> dict[str, Tensor]:
    """A stacked and B side by side, each module filled up with zeros to the same rank."""
    import torch

    common = _scaling(adapters)
    parts: dict[str, list[tuple[LoraModule, Tensor, Tensor]]] = {}
    for adapter in adapters:
        tensors = _load(adapter)
        for module in adapter.modules:
            factor_a, factor_b = (tensors[name] for name in module.tensors)
            factor = adapter.scale * module.scaling
            if factor != common:
                wide = torch.promote_types(factor_b.dtype, torch.float32)
                factor_b = (factor_b.to(wide) * factor).to(factor_b.dtype)
            if not (factor_a.isfinite().all() and factor_b.isfinite().all()):
                raise ModelLoadError(f"{adapter.title} has weights that are not finite numbers, in {module.name}")
            parts.setdefault(module.name, []).append((module, factor_a, factor_b))
    combined = {}
    for name, pieces in parts.items():
        module = pieces[0][0]
        for other, _, _ in pieces:
            if (other.suffixes, other.inputs, other.outputs) != (module.suffixes, module.inputs, module.outputs):
                raise BadSpecError(
                    f"spec.model.adapters: the adapters {label_of(adapters)!r} belong to different models: {name} has "
                    f"weights of [{module.outputs}, {module.inputs}] in one and [{other.outputs}, {other.inputs}] in "
                    "another"
                )
        factors_a, factors_b = [piece[1] for piece in pieces], [piece[2] for piece in pieces]
        dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in (*factors_a, *factors_b)))
        missing = rank - sum(piece[0].rank for piece in pieces)
        factors_a.append(torch.zeros(missing, module.inputs))
        factors_b.append(torch.zeros(module.outputs, missing))
        combined[PREFIX + name + module.suffixes[0]] = torch.cat([each.to(dtype) for each in factors_a], dim=0)
        combined[PREFIX + name + module.suffixes[1]] = torch.cat([each.to(dtype) for each in factors_b], dim=1)
    return combined


def _load(adapter: Adapter) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(adapter.folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise ModelLoadError(f"{adapter.title}: {adapter.folder} has vanished", hint="Send the task again.") from error
    except SafetensorError as error:
        raise ModelLoadError(f"{adapter.title} cannot be read: {error}", hint="Get the file anew.") from error
    return tensors


def _write(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        # Not save_file: its error for a full disk is no OSError.
        (unfinished / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another task has made the same one meanwhile.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
