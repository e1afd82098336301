"""The model card, `README.md`, of a trained model."""

from __future__ import annotations

import json
import re
from collections.abc import Sized
from typing import Final

from executors.training.spec.training_data_spec import JSONL
from executors.training.training_results import library_versions
from executors.training.training_run import BuiltTrainer, TrainingRun

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_LIMITS: Final = (
    "The license of the base model was not looked at. It, and the terms of the data, apply to these weights too. "
    "They have not been evaluated beyond the metrics of the training."
)
_METHODS: Final = {
    "sft": "supervised fine-tuning",
    "lora_sft": "supervised fine-tuning of a LoRA adapter",
    "dpo": "direct preference optimisation (DPO)",
    "ppo": "proximal policy optimisation (PPO)",
    "grpo": "group relative policy optimisation (GRPO)",
    "reward": "reward model training on pairs of answers",
}


def model_card(run: TrainingRun, built: BuiltTrainer) -> str:
    """The text of the card, with the YAML head that model hubs read."""
    base = run.spec.model.source.identifier
    state = built.trainer.state
    what = "A LoRA adapter" if built.adapter else "A model"
    sections = [
        _head(run, built, base),
        f"# {built.folder.rpartition('/')[2]}",
        f"{what} made by {_METHODS[run.job.kind]}, starting from {_code(run.spec.model_name)}.",
        "## Training",
        _table({"steps": state.global_step, "epochs": f"{state.epoch or 0:.3g}", **_options(run, built)}),
        "## Data",
        _data(run, built),
        "## Libraries",
        _table(library_versions()),
        "## License and limits",
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _head(run: TrainingRun, built: BuiltTrainer, base: str) -> str:
    pipeline = "text-classification" if run.job.kind == "reward" else "text-generation"
    tags = [run.job.kind.replace("_", "-"), "trl", *(["lora"] if built.adapter else [])]
    lines = [f"library_name: {'peft' if built.adapter else 'transformers'}", f"pipeline_tag: {pipeline}"]
    if _HUB_NAME.fullmatch(base):
        lines.append(f"base_model: {json.dumps(base)}")  # a JSON string is a YAML string too
    dataset = run.spec.data.dataset_name or ""
    if JSONL not in run.inputs and _HUB_NAME.fullmatch(dataset):
        lines.append(f"datasets: [{json.dumps(dataset)}]")
    return "\n".join(["---", *lines, f"tags: [{', '.join(tags)}]", "---"])


def _options(run: TrainingRun, built: BuiltTrainer) -> dict[str, object]:
    options, job, lora = run.spec.training, run.job, run.spec.lora
    shown: dict[str, object] = {
        "learning rate": f"{options.learning_rate:g}",
        "warmup steps": options.warmup_steps,
        "examples in one step": job.batch_size * job.gradient_accumulation_steps * run.world_size,
        "of these on one device at once": job.batch_size,
        "processes": run.world_size,
        "longest sequence": options.max_seq_length,
        "precision": "bf16" if options.bf16 else "fp16" if options.fp16 else "fp32",
        "seed": options.seed,
    }
    if built.adapter and lora:
        shown["LoRA"] = (
            f"rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on {', '.join(lora.target_modules)}"
        )
    return shown


def _data(run: TrainingRun, built: BuiltTrainer) -> str:
    rows = getattr(built.trainer, "train_dataset", None)
    count = f"{len(rows)} rows of " if isinstance(rows, Sized) else ""
    data = run.spec.data
    if JSONL in run.inputs:
        return f"{count}a JSONL file that came with the task."
    if data.dataset_name:
        config = f", configuration {_code(data.config_name)}" if data.config_name else ""
        return f"{count}{_code(data.dataset_name)}{config}, split {_code(data.split)}."
    return f"{count}data that stood in the task itself."


def _table(entries: dict[str, object] | dict[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in entries.items())]
    )


def _cell(value: object) -> str:
    return _printable(str(value)).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    """Text from a spec as code, on one line and without what would end the code."""
    return f"`{_printable(text.replace('`', ''))}`"


def _printable(text: str) -> str:
    """On one line, without characters that steer a terminal or change the direction of writing."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
