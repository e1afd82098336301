"""The part of a LoRA adapter's `adapter_config.json` that decides its effect. The file may come from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from executors.errors import BadSpecError
from executors.safetensors_headers import read_json_object

_SIZE_LIMIT: Final = 1_000_000
_RANK_LIMIT: Final = 65_536
_MOST_PROBLEMS: Final = 5
_LONGEST_SHOWN: Final = 80

_Number = TypeVar("_Number", int, float)

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")
_ALTERNATIVE: Final = r"\^?(?:\.\*\\\.)?(?:[A-Za-z0-9_.-]|\\[.-]|(?:\\d|\[0-9\])\+(?=\\\.|\||\Z))+"
_HARMLESS_PATTERN: Final = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*")
"""What PEFT itself writes as a pattern, and a little more. Nothing in it can be matched in many ways, so that a match
takes little time: numbers end at a dot, and there are no groups."""
_LONGEST_PATTERN: Final = 1000
_MOST_PATTERNS: Final = 1000
_MOST_NAMES: Final = 10_000
_LONGEST_NAME: Final = 500

_HARMLESS_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Initial values of A and B, which only matter for training. Others change the base model's weights as well."""


class LoraConfig(BaseModel):
    """What decides an adapter's effect; keys without influence on it are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: int = Field(gt=0, le=_RANK_LIMIT)
    lora_alpha: float
    target_modules: list[str] | str | None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(gt=0, le=_RANK_LIMIT)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: JsonValue = None
    arrow_config: JsonValue = None
    kasa_config: JsonValue = None
    layer_replication: JsonValue = None
    megatron_config: JsonValue = None
    monteclora_config: JsonValue = None
    use_bdlora: JsonValue = None
    use_qalora: JsonValue = None

    @property
    def unknown_variants(self) -> list[str]:
        """Keys of kinds of LoRA that no engine here applies."""
        keys = (
            "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
            "monteclora_config", "use_bdlora", "use_qalora",
        )  # fmt: skip
        return [key for key in keys if getattr(self, key)]

    @property
    def changes_base(self) -> bool:
        """Whether loading it would change the base model's own weights (PiSSA, OLoRA, CorDA, LoftQ)."""
        init = self.init_lora_weights
        return isinstance(init, str) and init.lower() not in _HARMLESS_INITS

    @property
    def extras(self) -> list[str]:
        """Keys of what it has beside A and B, or in another form."""
        keys = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
        return [*(key for key in keys if getattr(self, key)), *(["bias"] if self.bias != "none" else [])]

    @property
    def plain_targets(self) -> tuple[str, ...] | None:
        """The names of its modules, if nothing but these names picks the modules."""
        narrowed = self.exclude_modules or self.layers_to_transform is not None
        return None if narrowed or not isinstance(self.target_modules, list) else tuple(self.target_modules)

    @property
    def expressions(self) -> list[str]:
        """Keys that pick the modules by a regular expression, which may never come to an end."""
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        texts = {
            "target_modules": isinstance(self.target_modules, str),
            "exclude_modules": isinstance(self.exclude_modules, str),
            "layers_pattern": not all(_PLAIN_NAME.fullmatch(layer) for layer in layers if layer),
        }
        return [key for key, value in texts.items() if value]

    @property
    def declared_rank(self) -> int:
        """The highest rank that it names, for a module of the adapter or for none."""
        return max([self.r, *(self.rank_pattern or {}).values()])

    def rank_of(self, module: str) -> int:
        """The rank that a module must have."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """The factor on `B · A`."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def explains(self, tensor: str) -> bool:
        """Whether a tensor that is neither A nor B belongs to one of the extras."""
        saved = frozenset(self.modules_to_save or ())
        return (
            (self.use_dora and "lora_magnitude_vector" in tensor)
            or (self.lora_bias and tensor.endswith(".lora_B.bias"))
            or (self.bias != "none" and tensor.endswith(".bias"))
            or (bool(self.trainable_token_indices) and tensor.endswith(".trainable_tokens_delta"))
            or not saved.isdisjoint(tensor.split("."))
        )


def read_config(title: str, file: Path) -> LoraConfig:
    """Read and check the file.

    Args:
        title: what error texts call the adapter.
        file: its `adapter_config.json`.

    Raises:
        BadSpecError: of another kind than LoRA, or a value of a wrong type or out of range.
        ModelLoadError: too large, or no JSON object.
    """
    raw: dict[str, Any] = read_json_object(file, _SIZE_LIMIT)
    kind = raw.get("peft_type")
    if kind != "LORA":
        refuse(title, f"is no LoRA adapter: its {file.name} has the peft_type {shown(kind)}; expected 'LORA'")
    try:
        config = LoraConfig.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)[:_MOST_PROBLEMS]
        told = "; ".join(
            f"{_place(problem['loc'])} is missing"
            if problem["type"] == "missing"
            else f"{_place(problem['loc'])} is {shown(problem['input'])}: {problem['msg'].lower()}"
            for problem in problems
        )
        refuse(title, f"has a wrong {file.name}: {told}")
    _check_patterns(title, config)
    return config


def _check_patterns(title: str, config: LoraConfig) -> None:
    """Refuse whatever PEFT or vLLM would match as a regular expression, unless it is harmless."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key) or {}
        if len(patterns) > _MOST_PATTERNS:
            refuse(title, f"has {len(patterns)} patterns in {key}; expected at most {_MOST_PATTERNS}")
        for pattern in patterns:
            if len(pattern) > _LONGEST_PATTERN or not _HARMLESS_PATTERN.fullmatch(pattern):
                refuse(
                    title,
                    f"has the pattern {shown(pattern)} in {key}; expected names of modules, in which '\\d+' may stand "
                    "for a number and '|' between alternatives",
                )
    for key in ("target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices"):
        value = getattr(config, key)
        names = [] if isinstance(value, str) else [name for name in value or () if isinstance(name, str)]
        if len(names) > _MOST_NAMES:
            refuse(title, f"has {len(names)} names in {key}; expected at most {_MOST_NAMES}")
        for name in names:
            check_name(title, name, key)


def check_name(title: str, name: str, place: str) -> None:
    """Make sure that libraries can use a module's name within an expression.

    Raises:
        BadSpecError: it is too long, or holds other characters than names do.
    """
    if len(name) > _LONGEST_NAME or not _PLAIN_NAME.fullmatch(name):
        refuse(
            title,
            f"has the name {shown(name)} in {place}; expected up to {_LONGEST_NAME} letters, digits, '_', '.', '-'",
        )


def shown(value: object) -> str:
    """A stranger's value for an error's text: on one line, and short."""
    text = ascii(value[:_LONGEST_SHOWN]) if isinstance(value, str) else ascii(value)
    return text if len(text) <= 2 * _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def refuse(title: str, problem: str, *, hint: str = "") -> NoReturn:
    """Raise the error that tells what is wrong with an adapter."""
    raise BadSpecError(f"{title} {problem}", hint=hint)


def _by_pattern(patterns: Mapping[str, _Number] | None, module: str, otherwise: _Number) -> _Number:
    """What the first matching pattern says; it must match the name's end, from a dot on (as in PEFT)."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def _place(parts: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:_LONGEST_SHOWN] for part in parts[:3])
