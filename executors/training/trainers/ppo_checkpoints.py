"""Checkpoints of PPO, from which a run goes on as if it had never stopped: TRL's trainer has none of its own."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError
from executors.training.saving.run_checkpoints import COMPLETE_FILE, TRAINER_STATE

if TYPE_CHECKING:
    import torch

_VALUE_MODEL: Final = "value_model.safetensors"
_OPTIMIZER: Final = "optimizer.pt"
_SCHEDULER: Final = "scheduler.pt"
_SCALER: Final = "scaler.pt"
_NAME: Final = re.compile(r"checkpoint-(\d+)", re.ASCII)


def write_checkpoint(trainer: Any, folder: Path) -> None:  # noqa: ANN401 - a type of a heavy library
    """Write all that decides how the run goes on; every rank calls it.

    Args:
        trainer: of `executors.training.trainers.ppo_trainer`, between two steps.
        folder: becomes `checkpoint-<step>`; only what stands in it when all ranks are back is whole.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_random_states(), folder / _random_file(trainer.accelerator.process_index))
    if trainer.accelerator.is_main_process:
        trainer.save_model(str(folder))
        value_weights = {name: weight.detach().contiguous() for name, weight in _trained(trainer.value_model).items()}
        save_file(value_weights, folder / _VALUE_MODEL)
        torch.save(trainer.optimizer.state_dict(), folder / _OPTIMIZER)
        torch.save(trainer.lr_scheduler.state_dict(), folder / _SCHEDULER)
        if trainer.accelerator.scaler is not None:
            torch.save(trainer.accelerator.scaler.state_dict(), folder / _SCALER)
        trainer.state.save_to_json(str(folder / TRAINER_STATE))
        _remove_old(folder.parent, trainer.args.save_total_limit)
    trainer.accelerator.wait_for_everyone()


def restore_checkpoint(trainer: Any, folder: Path) -> Any:  # noqa: ANN401 - types of heavy libraries
    """Put a trainer where it was when it wrote a checkpoint.

    Returns:
        The trainer's state of that moment.

    Raises:
        BadSpecError: the checkpoint is none of PPO, or of another model or other options.
    """
    from safetensors.torch import load_file

    lacking = [name for name in (_VALUE_MODEL, _OPTIMIZER, _SCHEDULER, TRAINER_STATE) if not (folder / name).is_file()]
    if lacking:
        raise BadSpecError(
            f"{folder} cannot be resumed by ppo: it lacks {', '.join(lacking)}; expected a checkpoint of ppo",
            hint="To start from its weights alone, use checkpoint.load.",
        )
    try:
        _restore_policy(trainer.policy_model, folder)
        _copy_into(_trained(trainer.value_model), load_file(folder / _VALUE_MODEL))
        trainer.optimizer.load_state_dict(_load(folder / _OPTIMIZER))
        trainer.lr_scheduler.load_state_dict(_load(folder / _SCHEDULER))
        if trainer.accelerator.scaler is not None and (folder / _SCALER).is_file():
            trainer.accelerator.scaler.load_state_dict(_load(folder / _SCALER))
        state = type(trainer.state).load_from_json(str(folder / TRAINER_STATE))
    except (ValueError, KeyError, TypeError) as error:  # what the libraries say where names or shapes differ
        raise BadSpecError(
            f"{folder} does not fit this task: {error}",
            hint="Resume with the model, the lora section and the options of the run that wrote it.",
        ) from error
    states = folder / _random_file(trainer.accelerator.process_index)
    if states.is_file():  # not where there were fewer ranks
        _restore_random_states(_load(states))
    return state


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _restore_policy(policy: Any, folder: Path) -> None:  # noqa: ANN401 - a type of a heavy library
    import peft
    from safetensors.torch import load_file

    if isinstance(policy, peft.PeftModel):
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError("it holds whole weights, not an adapter")
        known = peft.get_peft_model_state_dict(policy)
        _copy_into(known, load_file(folder / "adapter_model.safetensors"))
        return
    # The library reads its own files: names in them may differ from those in memory.
    saved = type(policy).from_pretrained(folder, dtype=policy.dtype, local_files_only=True)
    _copy_into(policy.state_dict(), saved.state_dict())


def _copy_into(known: dict[str, Any], saved: dict[str, Any]) -> None:
    import torch

    if known.keys() != saved.keys():
        odd = sorted(known.keys() ^ saved.keys())
        raise ValueError(f"{len(odd)} weights are in one of them only, such as {odd[0]!r}")
    with torch.no_grad():
        for name, weight in known.items():
            if weight.shape != saved[name].shape:
                raise ValueError(f"{name!r} is {tuple(saved[name].shape)}, not {tuple(weight.shape)}")
            weight.copy_(saved[name])


def _load(file: Path) -> Any:  # noqa: ANN401 - whatever was saved
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _random_file(rank: int) -> str:
    return f"random_state-{rank}.pt"


def _random_states() -> dict[str, object]:
    """The states of all random numbers, in types that can be read without unpickling anything else."""
    import numpy as np
    import torch

    version, numbers, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()  # noqa: NPY002 - TRL draws from the global one
    name, keys, position, has_gauss, cached = of_numpy
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    import numpy as np
    import torch

    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))  # noqa: NPY002 - TRL draws from the global one
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _remove_old(checkpoints: Path, limit: int | None) -> None:
    """Keep the newest checkpoints, and the newest that is marked as whole in any case."""
    if not limit:
        return
    named = ((_NAME.fullmatch(folder.name), folder) for folder in checkpoints.iterdir())
    newest_first = [folder for _, folder in sorted(((int(m[1]), folder) for m, folder in named if m), reverse=True)]
    whole = next((folder for folder in newest_first if (folder / COMPLETE_FILE).is_file()), None)
    for folder in newest_first[limit:]:
        if folder != whole:
            (folder / COMPLETE_FILE).unlink(missing_ok=True)  # first: what is removed in part must not look whole
            shutil.rmtree(folder)
