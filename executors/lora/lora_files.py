"""Finds the LoRA adapters of a task, and refuses before anything heavy loads what the engine cannot apply.

An adapter is a folder as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`. It changes the output
of some modules of its base model by `scaling · B · A`. Both files come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from executors.errors import BadSpecError, ModelLoadError
from executors.input_spec import AdapterEntry
from executors.lora.lora_config import LoraConfig, check_name, read_config, refuse, shown
from executors.safetensors_headers import INDEX_NAME, TensorFacts, read_headers

AdapterEngine = Literal["vllm", "transformers"]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""

_FACTOR_SUFFIX: Final = re.compile(r"\.(?:lora_(?P<kind>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_BASE_COPY: Final = ".base_layer.weight"  # PEFT saves embeddings that it has adapted once more, unchanged
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_CONVERT_HINT: Final = "Merge the adapter into its model where it was trained, and give the merged folder."


@dataclass(frozen=True)
class LoraModule:
    """One module that an adapter changes.

    Attributes:
        name: as in the base model.
        suffixes: ends of the names of its tensors A and B.
        tensors: their names in the file.
        rank: columns of B, rows of A.
        inputs: columns of A; for an embedding the number of tokens.
        outputs: rows of B.
        scaling: the factor on `B · A` without the entry's `scale`.
    """

    name: str
    suffixes: tuple[str, str]
    tensors: tuple[str, str]
    rank: int
    inputs: int
    outputs: int
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter, checked.

    Attributes:
        name: the entry's name, or `lora_<place>`.
        place: where its entry stands in `model.adapters`.
        folder: holds its two files.
        scale: factor on its effect.
        rank: the highest rank of its modules.
        stamp: name, size and change time of its files.
        modules: what it changes; empty if that does not follow from the names of its tensors (`target_parameters`).
        base_model: the base model that it names; empty if it names none.
        extras: what it has beside A and B. With any, it can only act alone and with scale 1.
        plain_targets: the names that pick its modules; None if more than names picks them.
        fan_in_fan_out: whether the base model's weights are stored as [inputs, outputs].
        has_base_copies: whether its file also holds weights of the base model, which are to be left alone.
        has_expressions: whether its configuration picks the modules by regular expressions.
        has_idle_ranks: whether its configuration names a higher rank than any of its modules has.
    """

    name: str
    place: int
    folder: Path
    scale: float
    rank: int
    stamp: tuple[tuple[str, int, int], ...]
    modules: tuple[LoraModule, ...]
    base_model: str
    extras: tuple[str, ...]
    plain_targets: tuple[str, ...] | None
    fan_in_fan_out: bool
    has_base_copies: bool
    has_expressions: bool = False
    has_idle_ranks: bool = False

    @property
    def title(self) -> str:
        """How error texts call it."""
        return _title(self.name, self.place)

    @property
    def named_targets(self) -> tuple[str, ...]:
        """The modules to name to PEFT, where its configuration is not to be trusted with that; else empty."""
        return tuple(module.name for module in self.modules) if self.has_expressions or self.has_idle_ranks else ()


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of a task.

    Attributes:
        runtime: act together while the task runs.
        merged: to be merged into the weights, in this order.
        warnings: what was skipped.
    """

    runtime: tuple[Adapter, ...]
    merged: tuple[Adapter, ...]
    warnings: tuple[str, ...]


def find_adapters(
    entries: Sequence[AdapterEntry],
    inputs: Mapping[str, Path],
    *,
    engine: AdapterEngine,
    only: Literal["runtime", "merge"] | None = None,
) -> AdapterSet:
    """Find and check the adapters that a spec names, without reading their weights.

    Args:
        entries: the spec's `model.adapters`.
        inputs: what the daemon has found or fetched: a folder for `model.adapters[<place>]` of each LoRA entry.
        engine: who applies the runtime adapters. Merging is the same for both.
        only: look at those that are applied in this way, and at no others.

    Raises:
        BadSpecError: no LoRA adapter, incomplete, damaged, a name used twice, or of a kind that cannot be applied.
        ModelLoadError: its files have vanished.
    """
    found: dict[str, list[Adapter]] = {"runtime": [], "merge": []}
    warnings = []
    for place, entry in enumerate(entries):
        if entry.type != "lora":
            kind = shown(entry.type)
            warnings.append(f"spec.model.adapters[{place}] is of type {kind} and is skipped; only 'lora' is known")
            continue
        if only not in {None, entry.apply}:
            continue
        key = f"model.adapters[{place}]"
        if key not in inputs:
            raise RuntimeError(f"spec.{key} is a LoRA adapter, but the daemon gave the engine no files for it")
        use = "merge" if entry.apply == "merge" else engine
        found[entry.apply].append(_read_adapter(entry, place, inputs[key], use))
    twice = [
        name for name, count in Counter(each.name for all_ in found.values() for each in all_).items() if count > 1
    ]
    if twice:
        raise BadSpecError(f"spec.model.adapters has the name {twice[0]!r} more than once; each needs one of its own")
    for together in found.values():
        _check_company(together)
    return AdapterSet(tuple(found["runtime"]), tuple(found["merge"]), tuple(warnings))


def combined_rank(adapters: Sequence[Adapter]) -> int:
    """The rank of the adapters' sum; 0 without any."""
    if len(adapters) < 2:
        return sum(adapter.rank for adapter in adapters)
    ranks: Counter[str] = Counter()
    for adapter in adapters:
        ranks.update({module.name: module.rank for module in adapter.modules})
    return max(ranks.values())


def check_rank(adapters: Sequence[Adapter], max_rank: int) -> None:
    """Make sure that an engine has room for adapters that act together.

    Raises:
        BadSpecError: their rank is above the limit.
    """
    rank = combined_rank(adapters)
    if rank <= max_rank:
        return
    if len(adapters) == 1:
        what = f"{adapters[0].title} has rank {rank}"
    else:
        each = ", ".join(f"{adapter.name!r} ({adapter.rank})" for adapter in adapters)
        what = f"spec.model.adapters: the adapters {each} act together and have rank {rank}"
    raise BadSpecError(
        f"{what}, above the limit of {max_rank}",
        hint="On vLLM, raise spec.model.vllm.max_lora_rank (at most 512), or merge an adapter (apply: merge).",
    )


def name_targets(config: Any, modules: Sequence[str]) -> None:  # noqa: ANN401 - a peft.LoraConfig
    """Have PEFT change these modules and no others, whatever an adapter's configuration says; if there are any."""
    if modules:
        config.target_modules = set(modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def label_of(adapters: Sequence[Adapter]) -> str:
    """The adapters' names for people: `a`, or `a + b`."""
    return " + ".join(adapter.name for adapter in adapters)


def identity(entries: Sequence[AdapterEntry]) -> str:
    """Digest of all that decides which adapters get merged, in order; empty if none. It holds no secret."""
    asked = [
        (entry.request("").model_dump(mode="json", exclude={"headers", "timeout_sec", "with_token"}), entry.scale)
        for entry in entries
        if entry.type == "lora" and entry.apply == "merge"
    ]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest() if asked else ""


def _read_adapter(entry: AdapterEntry, place: int, folder: Path, use: str) -> Adapter:
    name = entry.name or f"lora_{place}"
    title = _title(name, place)
    try:
        stamp = _check_files(title, folder)
        config = read_config(title, folder / CONFIG_FILE)
        tensors = {key: facts for key, facts in read_headers(folder).items() if facts.file.name == WEIGHTS_FILE}
    except FileNotFoundError as error:
        raise ModelLoadError(f"{title}: {folder} has vanished", hint="Send the task again.") from error
    except ModelLoadError as error:
        raise BadSpecError(f"{title} cannot be used: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise BadSpecError(f"{title} cannot be read: {error}") from error
    factors, copies, others = _sort_tensors(title, tensors)
    extras = [*config.extras]
    foreign = [key for key in others if not config.explains(key)] + (copies if extras else [])
    if foreign:
        extras.append(f"the tensor {shown(foreign[0])}")
    _check_kind(title, config, extras, use)
    if use != "vllm":
        for key in factors:
            if not key.startswith(PREFIX):
                refuse(title, f"has the tensor {shown(key)}; expected names that begin with {PREFIX!r}")
    if config.target_parameters and config.expressions:
        key = config.expressions[0]
        refuse(title, f"has {key} {shown(getattr(config, key))} beside target_parameters; expected a list of names")
    modules = () if config.target_parameters else _pair_factors(title, config, factors)
    rank = max((module.rank for module in modules), default=config.declared_rank)
    return Adapter(
        name=name,
        place=place,
        folder=folder,
        scale=entry.scale,
        rank=rank,
        stamp=stamp,
        modules=modules,
        base_model=config.base_model_name_or_path or "",
        extras=tuple(extras),
        plain_targets=config.plain_targets,
        fan_in_fan_out=config.fan_in_fan_out,
        has_base_copies=bool(copies),
        has_expressions=bool(config.expressions),
        has_idle_ranks=config.declared_rank > rank,
    )


def _check_files(title: str, folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Make sure that both files are there and are the folder's own, and return their stamps."""
    if not (folder / CONFIG_FILE).exists():
        folder.stat()  # tells a folder that is gone from one without the file
        refuse(title, f"has no {CONFIG_FILE}; expected the folder of a LoRA adapter as PEFT saves it")
    if not (folder / WEIGHTS_FILE).exists():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        if pickles:
            refuse(
                title,
                f"has its weights in {pickles[0]}, a pickle, which may run code when it is opened; "
                f"expected {WEIGHTS_FILE}",
                hint="Convert it: load it with PEFT where it is trusted, and save it with safe_serialization=True.",
            )
        refuse(title, f"has no {WEIGHTS_FILE}")
    if (folder / INDEX_NAME).exists():
        refuse(title, f"holds a whole model as well ({INDEX_NAME}); expected the adapter alone")
    home = folder.resolve()
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.resolve().is_relative_to(home):
            refuse(title, f"has {shown(entry.name)} as a link to something outside its folder; expected files")
    facts = ((name, (folder / name).stat()) for name in (CONFIG_FILE, WEIGHTS_FILE))
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in facts)


def _sort_tensors(
    title: str, tensors: Mapping[str, TensorFacts]
) -> tuple[dict[str, TensorFacts], list[str], list[str]]:
    """Return the factors A and B, the names of copies of base weights, and the names of all the rest."""
    factors: dict[str, TensorFacts] = {}
    copies, others = [], []
    for key, facts in tensors.items():
        if facts.dtype not in _FLOATS:
            refuse(title, f"has the tensor {shown(key)} of type {facts.dtype}; expected {', '.join(sorted(_FLOATS))}")
        matched = _FACTOR_SUFFIX.search(key)
        if matched and matched.end() == len(key):
            factors[key] = facts
        elif key.endswith(_BASE_COPY):
            copies.append(key)
        else:
            others.append(key)
    if not factors:
        refuse(title, f"has no LoRA weights in {WEIGHTS_FILE}; expected tensors such as …q_proj.lora_A.weight")
    return factors, copies, others


def _check_kind(title: str, config: LoraConfig, extras: list[str], use: str) -> None:
    if config.unknown_variants:
        key = config.unknown_variants[0]
        refuse(title, f"is of a kind that this version does not apply ({key} is set)", hint=_CONVERT_HINT)
    if config.changes_base:
        refuse(
            title,
            f"has init_lora_weights {shown(config.init_lora_weights)}, with which its base model's weights change too",
            hint="Convert it to an ordinary adapter: PEFT's save_pretrained, path_initial_model_for_weight_conversion.",
        )
    if use == "vllm":
        refused = [each for each in extras if each != "target_parameters"]
    elif use == "transformers":  # these would stay in the base model after the task
        refused = [each for each in extras if each == "bias" or each.startswith("the tensor")]
    else:
        refused = []
    if refused:
        refuse(
            title,
            f"has more than A and B ({refused[0]}), which cannot be applied at run time here",
            hint="Merge it: set apply: merge in its entry.",
        )


def _check_company(adapters: list[Adapter]) -> None:
    for adapter in adapters:
        if adapter.extras and (len(adapters) > 1 or adapter.scale != 1):
            company = f"has scale {adapter.scale:g}" if adapter.scale != 1 else "does not stand alone"
            refuse(
                adapter.title,
                f"has more than A and B ({adapter.extras[0]}), but {company}; such an adapter acts only alone and with "
                "scale 1",
                hint=_CONVERT_HINT,
            )


def _pair_factors(title: str, config: LoraConfig, factors: Mapping[str, TensorFacts]) -> tuple[LoraModule, ...]:
    halves: dict[str, dict[str, str]] = {}
    for key in factors:
        matched = _FACTOR_SUFFIX.search(key)
        if matched:
            name = key[: matched.start()].removeprefix(PREFIX)
            kind = matched["kind"] or matched["embedding"]
            if kind in halves.setdefault(name, {}):
                refuse(title, f"is damaged: {shown(name)} has lora_{kind} twice")
            halves[name][kind] = key
    modules = []
    for name, keys in halves.items():
        check_name(title, name, WEIGHTS_FILE)
        if set(keys) != {"A", "B"}:
            refuse(title, f"is incomplete: {shown(name)} has lora_{next(iter(keys))} but not its counterpart")
        key_a, key_b = keys["A"], keys["B"]
        shape_a, shape_b = factors[key_a].shape, factors[key_b].shape
        wanted = config.rank_of(name)
        if not (len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1] == wanted):
            refuse(
                title,
                f"is damaged: {shown(name)} has lora_A {[*shape_a]} and lora_B {[*shape_b]}; "
                f"expected [{wanted}, inputs] and [outputs, {wanted}], because {CONFIG_FILE} says rank {wanted}",
            )
        suffixes = tuple(key.removeprefix(PREFIX).removeprefix(name) for key in (key_a, key_b))
        scaling = config.scaling_of(name)
        if wanted > max(shape_a[1], shape_b[0]):
            refuse(title, f"has rank {wanted} in {shown(name)}, more than its weights have rows or columns")
        modules.append(
            LoraModule(name, (suffixes[0], suffixes[1]), (key_a, key_b), wanted, shape_a[1], shape_b[0], scaling)
        )
    return tuple(modules)


def _title(name: str, place: int) -> str:
    return f"spec.model.adapters[{place}] {name!r}"
