"""Reward models: sequence classifiers that score what a model wrote, with a tokenizer of their own."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from executors.contract import EnginePolicy
from executors.errors import BadSpecError, MissingLibraryError, ModelLoadError
from executors.local_paths import find_local
from executors.tokenizer_check import check_tokenizer_config
from executors.training.trainers.ppo_batches import Prompt

if TYPE_CHECKING:
    import torch

    from executors.training.spec.trainer_specs import RewardModelOptions

_FIELD: Final = "spec.reward_model"
_LONGEST_TEXT: Final = 400
_AT_ONCE: Final = 16
"""Texts that are scored together."""
_ROOM: Final = 1.5
"""A classifier needs so many times the memory of its weights."""


@dataclass
class TextScorer:
    """A classifier that is ready to score.

    Attributes:
        model: in evaluation mode.
        tokenizer: the classifier's own.
        positive: number of the label whose logit counts.
        negative: number of the label whose logit is taken off; None for no label.
        scale: factor on the score.
        max_length: tokens of prompt and completion together; the beginning of longer ones is cut off.
        adds_end: whether an end token belongs behind the text.
        dtype: type of the weights on a GPU; on a CPU it is float32.
    """

    model: Any
    tokenizer: Any
    positive: int
    negative: int | None
    scale: float
    max_length: int
    adds_end: bool
    dtype: Any

    @property
    def device(self) -> str:
        """Where the classifier is, for example `cpu` or `cuda:0`."""
        return str(self.model.device)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Score completions.

        Args:
            prompts: what the completions go on from: texts, or conversations whose next message they are.
            completions: one for each prompt.
        """
        import torch

        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for begin in range(0, len(texts), _AT_ONCE):
            part = texts[begin : begin + _AT_ONCE]
            encoded = self.tokenizer(
                part,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                add_special_tokens=not self._has_template(prompts),
            ).to(self.model.device)
            with torch.no_grad():
                logits = self.model(**encoded).logits.float()
            chosen = logits[:, self.positive]
            if self.negative is not None:
                chosen = chosen - logits[:, self.negative]
            scores += (chosen * self.scale).tolist()
        return scores

    def place(self, device: object, kept_free: int = 0) -> None:
        """Move the classifier to a GPU if it fits into what is free there; else it stays where it is.

        Args:
            device: where the policy is trained.
            kept_free: bytes that the training still needs there.
        """
        import torch

        target = torch.device(device)
        if target.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(target)
        weights = sum(weight.numel() for weight in self.model.parameters()) * self.dtype.itemsize
        if weights * _ROOM + kept_free <= free:
            self.model.to(device=target, dtype=self.dtype)

    def _has_template(self, prompts: Sequence[Prompt]) -> bool:
        return bool(prompts) and not isinstance(prompts[0], str) and self.tokenizer.chat_template is not None

    def _text(self, prompt: Prompt, completion: str) -> str:
        if not isinstance(prompt, str):
            if self.tokenizer.chat_template is not None:
                messages = [*prompt, {"role": "assistant", "content": completion}]
                rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
                return rendered
            prompt = "".join(f"{message['content']}\n\n" for message in prompt)
        end = self.tokenizer.eos_token if self.adds_end else ""
        text = prompt + completion
        return text if text.endswith(end) else text + end


def load_scorer(options: RewardModelOptions, policy: EnginePolicy, device: object = "cpu") -> TextScorer:
    """Load a reward model; it goes to the GPU if it fits there, else to the CPU.

    Args:
        options: `reward_model` of the spec.
        policy: holds the allowed roots, and whether a model's own code may run.
        device: where the policy is trained.

    Raises:
        BadSpecError: a path that may not be read, or labels that the classifier does not have.
        MissingLibraryError: the model needs a library that is not installed.
        ModelLoadError: it is not found, not readable, or no classifier.
    """
    import transformers

    local = find_local(options.identifier, f"{_FIELD}.identifier", policy)
    name = str(local or options.identifier)
    where: dict[str, Any] = {"trust_remote_code": options.trust_remote_code and policy.allow_remote_code}
    if options.revision and local is None:
        where["revision"] = options.revision
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where)
        _require_classifier(config, options.identifier)
        positive, negative = _labels(options, config)
        check_tokenizer_config(name, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype="auto", output_loading_info=True, **where
        )
    except ImportError as error:
        raise MissingLibraryError(f"{_FIELD} {options.identifier!r} needs a missing library: {error}") from error
    except (MemoryError, BadSpecError, ModelLoadError):
        raise
    except Exception as error:  # from_pretrained raises many kinds, and each is about the model
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ModelLoadError(
            f"{_FIELD}.identifier {options.identifier!r} cannot be loaded: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:_LONGEST_TEXT]}",
            hint="Check the name and the revision; a gated model needs HF_TOKEN at the worker, and without network "
            "only models in the local cache work. A folder of your own must lie below WORKER_ALLOWED_ROOTS.",
        ) from error
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        _refuse(options.identifier, f"its files lack {len(missing)} of a classifier's weights, such as {missing[0]!r}")
    _prepare_padding(model, tokenizer)
    tokenizer.truncation_side = "left"
    stored = model.dtype
    model.float().eval().requires_grad_(requires_grad=False)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or options.max_length
    scorer = TextScorer(
        model=model,
        tokenizer=tokenizer,
        positive=positive,
        negative=negative,
        scale=options.scale,
        max_length=min(options.max_length, tokenizer.model_max_length, context),
        adds_end=_adds_end(tokenizer),
        dtype=stored,
    )
    scorer.place(device)
    return scorer


def _require_classifier(config: Any, name: str) -> None:  # noqa: ANN401 - a type of a heavy library
    known = config.architectures or []
    own_code = getattr(config, "auto_map", None) or {}
    if "AutoModelForSequenceClassification" in own_code:
        return
    if not any(each.endswith("ForSequenceClassification") for each in known):
        _refuse(name, f"its configuration names {', '.join(known) or 'no architecture'}")


def _refuse(name: str, why: str) -> NoReturn:
    raise ModelLoadError(
        f"{_FIELD}.identifier {name!r} is no classifier: {why}; expected a model for sequence classification",
        hint="Name a reward model or a text classifier, such as one that taskType reward has trained.",
    )


def _labels(options: RewardModelOptions, config: Any) -> tuple[int, int | None]:  # noqa: ANN401 - a heavy type
    names = {int(number): str(name) for number, name in config.id2label.items()}
    last = config.num_labels - 1
    if options.type == "classification":
        return _number(options.positive_label, "positive_label", names, last), None
    if config.num_labels < 2:
        raise BadSpecError(
            f"{_FIELD}.type is 'sentiment', but {options.identifier!r} has one label ({_listed(names)}); "
            "expected one with a positive and a negative label, or type 'classification'"
        )
    positive = _number(options.positive_label, "positive_label", names, _containing("POS", names))
    negative = _number(options.negative_label, "negative_label", names, _containing("NEG", names))
    if positive == negative:
        raise BadSpecError(
            f"{_FIELD}.positive_label and negative_label both mean {names[positive]!r}; "
            f"expected two of {_listed(names)}"
        )
    return positive, negative


def _number(wanted: str | int | None, key: str, names: Mapping[int, str], default: int | None) -> int:
    if wanted is None:
        if default is None:
            raise BadSpecError(
                f"{_FIELD}.{key} is missing, and no single label's name tells it; labels: {_listed(names)}"
            )
        return default
    folded = str(wanted).strip().casefold()
    for number, name in names.items():
        if name.casefold() == folded:
            return number
    if folded.isdecimal() and int(folded) in names:
        return int(folded)
    raise BadSpecError(f"{_FIELD}.{key} is {wanted!r}; expected one of the classifier's labels: {_listed(names)}")


def _containing(part: str, names: Mapping[int, str]) -> int | None:
    found = [number for number, name in names.items() if part in name.upper()]
    return found[0] if len(found) == 1 else None


def _listed(names: Mapping[int, str]) -> str:
    return ", ".join(f"{number}: {name}" for number, name in sorted(names.items()))


def _prepare_padding(model: torch.nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - a type of a heavy library
    """A decoder finds the last token of a text by its pad token, so both must agree on one."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id


def _adds_end(tokenizer: Any) -> bool:  # noqa: ANN401 - a type of a heavy library
    """Whether texts end with an end token that the tokenizer does not add itself, as TRL trains its reward models."""
    if tokenizer.eos_token is None:
        return False
    tokens = tokenizer("a")["input_ids"]
    return not tokens or tokens[-1] not in tokenizer.all_special_ids
