"""`training.trl`: which fields of TRL's configuration classes a task may set, and what else it has to set instead.

A field passes if it is a number or a switch, or one of the listed words, lists and objects. Nothing passes that makes
the trainer run code, read files or call hosts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Final, NoReturn

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from executors.errors import BadSpecError
from executors.secret_masking import shown, without_secrets

_TRL: Final = "spec.training.trl"

_SET_INSTEAD: Final[dict[str, str]] = {
    **{
        name: f"spec.training.{name}"
        for name in (
            "beta", "bf16", "ddp_find_unused_parameters", "deepspeed", "fp16", "fsdp", "gradient_accumulation_steps",
            "gradient_checkpointing", "kl_coef", "learning_rate", "logging_steps", "max_steps", "num_generations",
            "num_mini_batches", "num_train_epochs", "packing", "report_to", "save_steps", "save_strategy",
            "save_total_limit", "seed", "warmup_steps",
        )
    },
    "auto_find_batch_size": "spec.training.oom_retry",
    "data_seed": "spec.training.seed",
    "dataset_text_field": "spec.data.text_field",
    "fsdp_config": "spec.training.fsdp",
    "logging_strategy": "spec.training.logging_steps",
    "max_completion_length": "spec.generation.max_new_tokens",
    "max_length": "spec.training.max_seq_length",
    "model_init_kwargs": "spec.model.source",
    "num_ppo_epochs": "spec.training.ppo_epochs",
    "per_device_train_batch_size": "spec.training.batch_size",
    "project": "spec.training.report_to",
    "push_to_hub": "spec.output.destination",
    "response_length": "spec.generation.max_new_tokens",
    "resume_from_checkpoint": "spec.training.resume_from_path",
    "reward_model_path": "spec.reward_model.identifier",
    "reward_weights": "weight in each of spec.reward_functions",
    "sft_model_path": "spec.model.source.identifier",
    "stop_token": "spec.generation.stop",
    "stop_token_id": "spec.generation.stop",
    "temperature": "spec.generation.temperature",
    "total_episodes": "spec.training.steps",
    "trust_remote_code": "spec.model.source.trust_remote_code",
    "use_cpu": "spec.enforce_cpu",
}  # fmt: skip
_SET_INSTEAD_BY_PREFIX: Final = {"hub_": "spec.output.destination", "trackio_": "spec.training.report_to"}

_WORKERS_OWN: Final = frozenset(
    {
        "batch_size", "dataset_kwargs", "disable_tqdm", "do_eval", "do_predict", "do_train", "enable_jit_checkpoint",
        "ignore_data_skip", "load_best_model_at_end", "local_batch_size", "local_mini_batch_size", "local_rank",
        "logging_nan_inf_filter", "log_completions", "log_completions_hub_repo", "micro_batch_size",
        "mini_batch_size", "model_adapter_name", "num_generations_eval", "num_sample_generations",
        "num_total_batches", "output_dir", "parallelism_config", "per_device_eval_batch_size",
        "prediction_loss_only", "ref_adapter_name", "remove_unused_columns",
        "restore_callback_states_from_checkpoint", "save_on_each_node", "save_only_model", "use_transformers_paged",
        "use_transformers_continuous_batching", "use_vllm", "world_size",
    }
)  # fmt: skip
_WORKERS_OWN_PREFIXES: Final = ("eval_", "vllm_")

_WORDS: Final = frozenset(
    {
        "cache_implementation", "dataloader_multiprocessing_context", "ddp_backend", "debug", "f_divergence_type",
        "importance_sampling_level", "include_num_input_tokens_seen", "kl_estimator", "length_column_name",
        "log_level", "log_level_replica", "loss_type", "lr_scheduler_type", "multi_objective_aggregation", "optim",
        "optim_args", "optim_target_modules", "packing_strategy", "run_name", "scale_rewards", "torch_compile_mode",
        "train_sampling_strategy", "truncation_mode",
    }
)  # fmt: skip
_TOKENS: Final = frozenset({"eos_token", "pad_token"})
_LISTS: Final = frozenset({"loss_type", "loss_weights", "label_names", "optim_target_modules"})
_OBJECTS: Final = frozenset(
    {
        "accelerator_config", "chat_template_kwargs", "generation_kwargs", "gradient_checkpointing_kwargs",
        "liger_kernel_config", "lr_scheduler_kwargs",
    }
)  # fmt: skip
_GENERATION_SET_INSTEAD: Final = frozenset(
    {
        "do_sample", "eos_token_id", "max_length", "max_new_tokens", "max_time", "num_return_sequences", "stop_strings",
        "temperature",
    }
)  # fmt: skip
_WORD: Final = re.compile(r"[\w .,:=+-]{1,200}")
_LONGEST_TOKEN: Final = 100
_MOST: Final = {"dataloader_num_workers": 64, "dataset_num_proc": 64}

_PRECISIONS: Final = {"fp16": "bf16", "bf16": "fp16"}


@dataclass(frozen=True)
class TrlFields:
    """The fields of one of TRL's configuration classes.

    Attributes:
        config_type: the class, a dataclass.
        ours: what this worker gives to it.
    """

    config_type: type
    ours: Mapping[str, object]

    def accept(self, given: Mapping[str, JsonValue]) -> dict[str, Any]:
        """Return what of `training.trl` goes to the configuration; a null is absent.

        Raises:
            BadSpecError: a field that the class does not have, that is not for tasks to set, that says something else
                than the spec's own key for it, or whose value is of a wrong type.
        """
        known: dict[str, Field[Any]] = {each.name: each for each in fields(self.config_type) if each.init}
        accepted: dict[str, Any] = {}
        for name, value in given.items():
            if value is None:
                continue
            if name not in known:
                self._refuse_unknown(name, known)
            if self._says_the_same(known[name], value):
                continue
            self._refuse_what_is_ours(name, value)
            _check_harmless(name, value)
            if name == "generation_kwargs" and isinstance(value, dict):
                _check_generation(value)
            accepted[name] = _typed(known[name], value)
        return accepted

    def _refuse_unknown(self, name: str, known: Mapping[str, object]) -> NoReturn:
        near = difflib.get_close_matches(name, known, n=3)
        raise BadSpecError(
            f"{_TRL} has the key {shown(name)}, which TRL's {self.config_type.__name__} does not know"
            + (f"; near it are {', '.join(near)}" if near else ""),
            hint=f"Only fields of {self.config_type.__name__} may stand in {_TRL}.",
        )

    def _says_the_same(self, field: Field[Any], value: JsonValue) -> bool:
        effective = self.ours.get(field.name, field.default)
        return (
            effective is not MISSING and effective == value and isinstance(effective, bool) == isinstance(value, bool)
        )

    def _refuse_what_is_ours(self, name: str, value: JsonValue) -> None:
        other = _PRECISIONS.get(name)
        if other and value is True and self.ours.get(other):
            raise BadSpecError(
                f"spec.training.{other} and {_TRL}.{name} are both true; expected at most one of fp16 and bf16"
            )
        own_key = _SET_INSTEAD.get(name) or next(
            (key for prefix, key in _SET_INSTEAD_BY_PREFIX.items() if name.startswith(prefix)), None
        )
        if own_key:
            ours = self.ours.get(name)
            but = "" if ours is None else f", but {own_key} makes it {_shown(name, ours)}"
            raise BadSpecError(f"{_TRL}.{name} is {_shown(name, value)}{but}; set {own_key} instead")
        if name in _WORKERS_OWN or name.startswith(_WORKERS_OWN_PREFIXES):
            raise BadSpecError(f"{_TRL}.{name} is not for tasks to set: the worker decides it", hint="Remove the key.")


def is_plain(value: object) -> bool:
    """Whether a value is a switch, a finite number or a word that names no file and no host."""
    if isinstance(value, str):
        return bool(_WORD.fullmatch(value))
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _check_harmless(name: str, value: JsonValue) -> None:
    if isinstance(value, str):
        fine = is_plain(value) if name in _WORDS else name in _TOKENS and 0 < len(value) <= _LONGEST_TOKEN
    elif isinstance(value, list):
        fine = name in _LISTS and all(is_plain(each) for each in value)
    elif isinstance(value, dict):
        fine = name in _OBJECTS and all(each is None or is_plain(each) for each in value.values())
    else:
        fine = is_plain(value)
    if not fine:
        raise BadSpecError(
            f"{_TRL}.{name} is {_shown(name, value)}, which is not for tasks to set: "
            "it could make the trainer run code, open files or call hosts",
            hint="Numbers, switches and the plain words of TRL's own options may be set.",
        )
    if isinstance(value, int) and value > _MOST.get(name, value):
        raise BadSpecError(f"{_TRL}.{name} is {value}; expected at most {_MOST[name]}")


def _check_generation(value: Mapping[str, JsonValue]) -> None:
    if refused := sorted(_GENERATION_SET_INSTEAD & value.keys()):
        raise BadSpecError(
            f"{_TRL}.generation_kwargs.{refused[0]} is not for tasks to set; set spec.generation instead"
        )


def _typed(field: Field[Any], value: JsonValue) -> object:
    if isinstance(field.type, str):  # pragma: no cover - no class of TRL has its types as text
        return value
    try:
        adapter = TypeAdapter(field.type, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:  # pragma: no cover - then the class itself has to check it
        return value
    candidates: list[object] = [value, [value]] if isinstance(value, str) else [value]
    for candidate in candidates:  # a list of words may be given as one word
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return candidate
    expected = getattr(field.type, "__name__", None) if isinstance(field.type, type) else None
    raise BadSpecError(f"{_TRL}.{field.name} is {_shown(field.name, value)}; expected {expected or field.type}")


def _shown(name: str, value: Any) -> str:  # noqa: ANN401 - a JSON value, or a setting of ours
    """A value for an error text, without secrets."""
    masked = without_secrets({name: value})
    inner = masked[name] if isinstance(masked, dict) else masked
    return shown(inner) if isinstance(inner, str) else shown(str(inner)).strip("'\"")
