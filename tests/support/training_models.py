"""Models to train in tests, and a training run in this process, as one rank does it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from executors.contract import EnginePolicy, JsonObject, LogLevel
from executors.training.monitoring.training_callbacks import train_to_end
from executors.training.rows.training_rows import read_rows
from executors.training.saving.final_model import save_final
from executors.training.trainers.trainer_building import build_trainer
from executors.training.training_job import ResumePoint, TrainingJob
from executors.training.training_run import BuiltTrainer, TrainingRun

CONTEXT: Final = 256
"""Tokens that fit into the tiny models."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tiny_tokenizer(*, chat: bool = True) -> Any:  # noqa: ANN401 - a heavy type
    """A tokenizer that knows each byte, with `<end>` and `<pad>`, and with a chat template if wanted."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer  # noqa: PLC0415 - comes with an extra

    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator(
        ["a short text"], vocab_size=258, special_tokens=["<end>", "<pad>"], show_progress=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters._tokenizer, eos_token="<end>", pad_token="<pad>", model_max_length=CONTEXT
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_llama(folder: Path, *, chat: bool = True, seed: int = 1, hidden: int = 64) -> Path:
    """Save a random Llama of two layers with its tokenizer; its context is 256 tokens."""
    import torch
    import transformers

    tokenizer = make_tiny_tokenizer(chat=chat)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,  # so that frozen weights, too, are of some use
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@dataclass
class RecordingRankReport:
    """Keeps what a rank tells.

    Attributes:
        steps: step and total of each progress report.
        metrics: the metrics of each progress report.
        logged: "level: text".
        warnings: what goes into the result.
    """

    steps: list[tuple[int, int]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def progress(self, step: int, total: int, metrics: dict[str, float], message: str = "") -> None:
        del message
        self.steps.append((step, total))
        self.metrics.append(dict(metrics))

    def log(self, level: LogLevel, text: str) -> None:
        self.logged.append(f"{level}: {text}")

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class RunMaker(Protocol):
    """The fixture `make_run`."""

    def __call__(
        self,
        kind: str,
        out_dir: Path | None = None,
        *,
        model: Path | str | dict[str, object] | None = None,
        inputs: dict[str, Path] | None = None,
        resume: ResumePoint | None = None,
        **sections: object,
    ) -> TrainingRun: ...


def run_for(
    kind: str,
    sent_spec: JsonObject,
    out_dir: Path,
    *,
    roots: tuple[Path, ...],
    inputs: dict[str, Path] | None = None,
    resume: ResumePoint | None = None,
) -> TrainingRun:
    """What the only rank of a task on the CPU works with.

    Args:
        kind: the kind of training.
        sent_spec: the spec, as a user sends it.
        out_dir: made if it does not exist.
        roots: folders from which the task may read.
        inputs: what the daemon has found or fetched.
        resume: the checkpoint to continue from.
    """
    from executors.training.spec.trainer_specs import SPEC_TYPES  # noqa: PLC0415 - light users of this module need no specs

    (out_dir / "artifacts").mkdir(parents=True, exist_ok=True)
    spec = SPEC_TYPES[kind].model_validate(sent_spec)
    job = TrainingJob(
        kind=kind,
        task_id="task",
        sent_spec=sent_spec,
        out_dir=out_dir,
        policy=EnginePolicy(allowed_roots=roots),
        inputs=inputs or {},
        resume=resume,
        identity="identity of the test",
        batch_size=spec.training.batch_size,
        gradient_accumulation_steps=spec.training.gradient_accumulation_steps,
        ranks=1,
        use_cpu=True,
    )
    return TrainingRun(job=job, spec=spec, rank=0, world_size=1, tell=RecordingRankReport())


def build(run: TrainingRun, *, scratch: Path | None = None) -> BuiltTrainer:
    """Read the rows and make the trainer, callbacks included."""
    return build_trainer(run, read_rows(run, scratch or Path(tempfile.mkdtemp(prefix="scratch-", dir=run.job.out_dir))))


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        run: what it worked with.
        built: its trainer, trained.
        folder: what was saved; None if nothing was.
        losses: the training loss of each log entry, oldest first.
    """

    run: TrainingRun
    built: BuiltTrainer
    folder: Path | None
    losses: list[float]

    @property
    def steps(self) -> int:
        """The steps of the run, those before a resume included."""
        return int(self.built.trainer.state.global_step)

    @property
    def warnings(self) -> list[str]:
        """The warnings for the result."""
        tell = self.run.tell
        assert isinstance(tell, RecordingRankReport)
        return tell.warnings


def train(run: TrainingRun, *callbacks: object) -> Trained:
    """Do what a rank does: rows, trainer, training, saving.

    Args:
        run: the run.
        callbacks: of the test, beside those that each run has.
    """
    built = build(run)
    for callback in callbacks:
        built.trainer.add_callback(callback)
    train_to_end(run, built)
    save_final(run, built)
    folder = run.job.out_dir / built.folder
    losses = [entry["loss"] for entry in built.trainer.state.log_history if "loss" in entry]
    return Trained(run, built, folder if folder.is_dir() else None, losses)


def load_saved(folder: Path) -> tuple[Any, Any]:
    """A saved model and its tokenizer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def stop_after(step: int) -> object:
    """A callback that ends a training after so many steps, as if its process had been stopped there."""
    import transformers

    class StopAfter(transformers.TrainerCallback):
        def on_step_end(self, args: object, state: Any, control: Any, **_: object) -> None:  # noqa: ANN401 - heavy types
            del args
            control.should_training_stop = state.global_step >= step

    return StopAfter()


def answer(model: Any, tokenizer: Any, prompt: str, *, most: int = 60) -> str:  # noqa: ANN401 - heavy types
    """What a model says next, choosing the likeliest token each time, up to its end token."""
    import torch

    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text
