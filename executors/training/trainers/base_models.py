"""Loads what is to be trained: a model's tokenizer, configuration and weights.

The weights that a trainer changes are held in float32, also with `fp16` and `bf16`: these compute in 16 bits, but a
small learning rate times a gradient is lost when it is added to a 16-bit weight. Weights that stay as they are (the
base model of a LoRA adapter) are held in 16 bits then, on a GPU.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError, ExecutorError, MissingLibraryError, ModelLoadError
from executors.model_spec import CHECKPOINT, CheckpointSection
from executors.safetensors_headers import INDEX_NAME, read_headers
from executors.tokenizer_check import check_tokenizer_config
from executors.training.trainers.lora_setup import (
    adapter_to_continue,
    attach_adapter,
    check_adapter,
    check_target_modules,
    lora_config,
)
from executors.weights_source import WeightsSource, find_weights, hub_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from executors.training.training_run import TrainingRun

__all__ = [
    "context_tokens",
    "find_trainable",
    "load_causal_lm",
    "load_classifier",
    "load_config",
    "load_tokenizer",
    "lora_config",
]

_INSTALL_HINT: Final = "Install the extra on the worker: uv sync --inexact --extra training."
_PAD_TOKENS: Final = (
    "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>",
)  # fmt: skip
"""Tokens with which models fill up rows, the best first."""

_MOST_NAMED: Final = 3


def find_trainable(run: TrainingRun) -> WeightsSource:
    """Find the weights to train, without reading them; those of the base model where an adapter is continued.

    Raises:
        BadSpecError: quantised weights (GGUF), an adapter for a kind that trains whole weights, or a path that cannot
            be used.
        ModelLoadError: the checkpoint has vanished.
    """
    spec = run.spec
    if adapter_to_continue(run):
        if not spec.model.source.identifier:
            raise BadSpecError(
                "spec.checkpoint.load is a LoRA adapter; expected its base model in spec.model.source.identifier"
            )
        spec = spec.model_copy(update={"checkpoint": CheckpointSection()})
    source = find_weights(spec, run.policy, run.inputs)
    if source.gguf_file:
        field = "spec.model.source.identifier" if spec.checkpoint.load is None else "spec.checkpoint.load"
        raise BadSpecError(
            f"{field} is the GGUF file {source.gguf_file!r}; quantised weights cannot be trained",
            hint="Name the model in its ordinary form: a folder with config.json, or a hub name.",
        )
    return source


def load_tokenizer(run: TrainingRun) -> Any:  # noqa: ANN401 - transformers.PreTrainedTokenizerBase
    """Load the tokenizer; it has a token that fills up rows, a distinct one where the vocabulary has any.

    Raises:
        BadSpecError: see `find_trainable`.
        MissingLibraryError: a library is not installed.
        ModelLoadError: it is not found or not readable.
    """
    source = find_trainable(run)
    base = source.base or source
    adapter = adapter_to_continue(run)
    with _as_load_errors(run, source):
        import transformers

        if adapter and (adapter / "tokenizer_config.json").is_file():
            trusted = run.spec.trusts_remote_code and run.policy.allow_remote_code
            check_tokenizer_config(str(adapter))
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trusted)
        else:
            options = hub_options(run.spec, run.policy, base)
            check_tokenizer_config(base.location, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(base.location, **options)
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        distinct = next((token for token in _PAD_TOKENS if token in known and token != tokenizer.eos_token), None)
        tokenizer.pad_token = distinct or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ModelLoadError(
                f"the tokenizer of {run.spec.model_name!r} has neither a pad token nor an end token; rows of different "
                "lengths cannot be filled up",
                hint="Set pad_token or eos_token in its tokenizer_config.json.",
            )
        if run.is_first and distinct is None and run.job.kind in {"reward", "ppo"}:
            run.tell.warn(
                f"the tokenizer has no pad token, so {tokenizer.eos_token!r}, with which texts end, fills up rows too: "
                "a classifier cannot tell the one from the other"
            )
    return tokenizer


def load_config(run: TrainingRun) -> Any:  # noqa: ANN401 - transformers.PretrainedConfig
    """Load the model's configuration.

    Raises:
        BadSpecError: see `find_trainable`.
        MissingLibraryError: a library is not installed.
        ModelLoadError: it is not found or not readable.
    """
    source = find_trainable(run)
    whole = source.base if source.weights_file and source.base else source
    with _as_load_errors(run, source):
        import transformers

        return transformers.AutoConfig.from_pretrained(whole.location, **hub_options(run.spec, run.policy, whole))


def context_tokens(config: Any) -> int | None:  # noqa: ANN401 - transformers.PretrainedConfig
    """How many tokens a model can take in; None where its configuration does not say."""
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def load_causal_lm(run: TrainingRun, tokenizer: Any) -> Any:  # noqa: ANN401 - transformers.PreTrainedModel
    """Load the language model to train.

    Args:
        run: the run.
        tokenizer: its tokenizer.

    Returns:
        The model; where the task continues a LoRA adapter, a `peft.PeftModel` whose adapter is trainable.

    Raises:
        BadSpecError: see `find_trainable`; QLoRA without a GPU; an adapter of another model.
        MissingLibraryError: a library is not installed.
        ModelLoadError: not found, not readable, incomplete, or no language model.
    """
    return _load(run, tokenizer, "AutoModelForCausalLM", lambda _model, _key: False)


def load_classifier(run: TrainingRun, tokenizer: Any, labels: int = 1) -> Any:  # noqa: ANN401 - as above
    """Load the model to train with a score head, which is a new one where the weights have none.

    Args:
        run: the run.
        tokenizer: its tokenizer.
        labels: how many scores the head gives.

    Raises:
        BadSpecError: as `load_causal_lm`.
        MissingLibraryError: a library is not installed.
        ModelLoadError: not found, not readable, incomplete, or of a kind that takes no score head.
    """

    def belongs_to_head(model: Any, key: str) -> bool:  # noqa: ANN401 - transformers.PreTrainedModel
        return not key.startswith(f"{model.base_model_prefix}.")

    return _load(run, tokenizer, "AutoModelForSequenceClassification", belongs_to_head, num_labels=labels)


def _load(
    run: TrainingRun,
    tokenizer: Any,  # noqa: ANN401 - heavy types
    auto_class: str,
    may_be_new: Callable[[Any, str], bool],
    **more: object,
) -> Any:  # noqa: ANN401
    source = find_trainable(run)
    adapter = adapter_to_continue(run)
    if adapter:
        check_adapter(run, adapter, source)
    with _as_load_errors(run, source):
        import transformers

        config = load_config(run)
        options = {**_weight_options(run), **_as_stored(run, config), **more}
        if source.weights_file:
            options["config"] = config
            config.transformers_weights = source.weights_file
            for key in more:
                setattr(config, key, options.pop(key))
            if auto_class == "AutoModelForCausalLM":
                options["generation_config"] = _generation_config(run, source, config)
        if run.spec.uses_lora and not adapter:
            _check_structure(run, auto_class, config, source)
        if source.stamp and (Path(source.location) / INDEX_NAME).exists():
            read_headers(Path(source.location))  # refuses an index that names files elsewhere
        transformers.set_seed(run.spec.training.seed)  # new weights are the same in each run and on each rank
        model, told = getattr(transformers, auto_class).from_pretrained(
            source.location, **hub_options(run.spec, run.policy, source), **options, output_loading_info=True
        )
    _check_complete(run, [key for key in told["missing_keys"] if not may_be_new(model, key)])
    _check_vocabulary(run, model, tokenizer)
    _tidy_configs(run, model, tokenizer)
    if auto_class == "AutoModelForSequenceClassification":
        _widen_head(model)
    return attach_adapter(run, model, adapter) if adapter else model


def _widen_head(model: Any) -> None:  # noqa: ANN401 - transformers.PreTrainedModel
    """Hold a score head in float32: it is trained, also where the weights before it are frozen in 16 bits."""

    def fit(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401 - torch.nn.Module
        dtype = next(head.parameters()).dtype  # TRL may have changed it
        return tuple(each.to(dtype) for each in inputs) if dtype.is_floating_point else inputs

    for name, head in model.named_children():
        if name != model.base_model_prefix and next(head.parameters(), None) is not None:
            head.float().register_forward_pre_hook(fit)


def _check_structure(run: TrainingRun, auto_class: str, config: Any, source: WeightsSource) -> None:  # noqa: ANN401
    """Find target modules that the model does not have before its weights load."""
    import torch
    import transformers

    code = hub_options(run.spec, run.policy, source)["trust_remote_code"]
    try:
        with torch.device("meta"):
            bare = getattr(transformers, auto_class).from_config(copy.deepcopy(config), trust_remote_code=code)
    except Exception:  # noqa: BLE001 - some models cannot be made without weights; `lora_config` looks at the whole one
        return
    check_target_modules(run, bare)


def _generation_config(run: TrainingRun, source: WeightsSource, config: Any) -> Any:  # noqa: ANN401 - heavy types
    """That of the base model, for weights that come alone."""
    import transformers

    base = source.base or source
    try:
        return transformers.GenerationConfig.from_pretrained(base.location, **hub_options(run.spec, run.policy, base))
    except OSError:  # many models have no such file
        return transformers.GenerationConfig.from_model_config(config)


def _check_complete(run: TrainingRun, missing: list[str]) -> None:
    if missing:  # they would be random
        named = ", ".join(sorted(missing)[:_MOST_NAMED])
        raise ModelLoadError(
            f"{_title(run)} lacks {len(missing)} of the model's weights: {named}"
            + ("…" * (len(missing) > _MOST_NAMED)),
            hint="Check that the weights are whole and belong to the configuration beside them.",
        )


def _check_vocabulary(run: TrainingRun, model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - heavy types
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelLoadError(
            f"{_title(run)}: its tokenizer knows {len(tokenizer)} tokens, and its weights have embeddings for {rows}",
            hint="Check that tokenizer and weights belong together.",
        )


def _tidy_configs(run: TrainingRun, model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - heavy types
    """Name the pad token, and drop sampling values with which the model could not be saved."""
    import transformers

    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    kept = getattr(model, "generation_config", None)  # classifiers have none
    if kept is None:
        return
    try:
        kept.validate(strict=True)
    except ValueError as error:
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id
        )
        run.tell.log("warning", f"the model's generation_config.json is not valid and is left out: {_cut(error)}")


def _weight_options(run: TrainingRun) -> dict[str, object]:
    """What decides type and place of the weights."""
    import torch

    training = run.spec.training
    frozen = run.spec.uses_lora
    dtype = torch.float32
    if frozen and not run.job.use_cpu and (training.bf16 or training.fp16):
        dtype = torch.bfloat16 if training.bf16 else torch.float16
    options: dict[str, object] = {"dtype": dtype}
    lora = run.spec.lora
    if frozen and lora is not None and lora.load_in_4bit:
        options |= _four_bits(run)
    return options


def _four_bits(run: TrainingRun) -> dict[str, object]:
    if run.spec.training.fp16:
        raise BadSpecError(
            "spec.lora.load_in_4bit and spec.training.fp16 are both true; adapters on 4-bit weights train in bfloat16",
            hint="Use spec.training.bf16.",
        )
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # Quantised weights cannot be moved to a GPU later; each rank has one of its own.
    return {"dtype": torch.bfloat16, "quantization_config": config, "device_map": {"": run.rank}}


def _as_stored(run: TrainingRun, config: Any) -> dict[str, object]:  # noqa: ANN401 - transformers.PretrainedConfig
    """How weights are loaded that come quantised: they keep their type, and only an adapter on them can be trained."""
    if getattr(config, "quantization_config", None) is None:
        return {}
    if not run.spec.uses_lora:
        raise BadSpecError(
            f"{_title(run)} has quantised weights (quantization_config in its config.json), which cannot be trained",
            hint="Train a LoRA adapter (lora_sft, or a section lora), or name the model in its ordinary form.",
        )
    if run.spec.lora is not None and run.spec.lora.load_in_4bit:
        raise BadSpecError(f"spec.lora.load_in_4bit is true, but {_title(run)} has quantised weights already")
    return {"dtype": "auto"}


@contextmanager
def _as_load_errors(run: TrainingRun, source: WeightsSource) -> Iterator[None]:
    try:
        import torch
        import transformers  # noqa: F401 - a missing library is told here
    except ImportError as error:
        raise MissingLibraryError(f"training needs torch and transformers: {error}", hint=_INSTALL_HINT) from error
    try:
        yield
    except ImportError as error:
        raise MissingLibraryError(
            f"loading {run.spec.model_name!r} needs a library that is not installed: {error}", hint=_INSTALL_HINT
        ) from error
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, ExecutorError):
        raise
    except Exception as error:  # from_pretrained raises many kinds, and each is about the model
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ModelLoadError(
            f"{_title(run)} cannot be loaded: {type(error).__name__}: {_cut(error)}", hint=_hint(source, error)
        ) from error


def _title(run: TrainingRun) -> str:
    load = run.spec.checkpoint.load
    if load is not None and CHECKPOINT in run.inputs and not adapter_to_continue(run):
        return f"spec.checkpoint.load {load.shown_name!r}"
    return f"spec.model.source.identifier {run.spec.model.source.identifier!r}"


def _hint(source: WeightsSource, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "This model runs Python code of its author; allow that with WORKER_ALLOW_REMOTE_CODE=1 at the worker."
    if source.stamp:
        return "Check that the files are whole and belong to a text model that Transformers knows."
    return (
        "Check the name and the revision; a gated model needs HF_TOKEN at the worker; without network (HF_HUB_OFFLINE) "
        "only models in the local cache work. A folder of your own must lie below WORKER_ALLOWED_ROOTS."
    )


def _cut(error: Exception, longest: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[:longest]}…"
