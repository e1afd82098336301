"""Tells by names and shapes, before anything is loaded, that a LoRA adapter belongs to another base model.

Only what is certain counts: names differ between a model's files and its modules in memory (prefixes, joined
projections), and where they leave a doubt, the engine decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NoReturn

from executors.errors import BadSpecError
from executors.lora.lora_files import Adapter, LoraModule
from executors.safetensors_headers import TensorFacts

_WEIGHT: Final = ".weight"
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})  # others may be packed
_WELL_KNOWN: Final = frozenset({"q_proj", "qkv_proj", "c_attn", "query_key_value"})
"""Projections of attention in models whose files name the modules as Transformers does."""

_SHARED: Final = frozenset({"lm_head", "embed_tokens"})  # one of them is often missing in the files, as it is the other

_Layer = tuple[str, str]  # what comes before and after the number of a layer
_Place = tuple[str, str, str]  # prefix, layer's number, the rest


def check_base(adapter: Adapter, base: Mapping[str, TensorFacts], base_name: str) -> None:
    """Make sure that an adapter may belong to a base model.

    Args:
        adapter: the adapter.
        base: facts of the base model's tensors; empty: nothing is checked.
        base_name: what error texts call the base model.

    Raises:
        BadSpecError: a module has other shapes in the base model, or does not exist there.
    """
    if not base:
        return
    weights = _by_rest(base)
    for module in adapter.modules:
        _check_module(adapter, module, base_name, weights)
    known = {name.split(".")[-2] for name in base if "." in name}
    wanted = {module.name.rpartition(".")[2] for module in adapter.modules} - _SHARED
    if wanted and known.isdisjoint(wanted) and not known.isdisjoint(_WELL_KNOWN):
        _refuse(adapter, base_name, f"it changes modules named {_listed(wanted)}, and that model has none of them")


def _by_rest(base: Mapping[str, TensorFacts]) -> dict[str, dict[str, dict[str, TensorFacts]]]:
    """The base's weights by what follows the layer's number, then by prefix, then by number."""
    found: dict[str, dict[str, dict[str, TensorFacts]]] = defaultdict(lambda: defaultdict(dict))
    for name, facts in base.items():
        prefix, number, rest = _split(name)
        found[rest][prefix][number] = facts
    return found


def _split(name: str) -> _Place:
    """Cut a name at its first number, which is that of the layer: `model.layers`, `3`, `mlp.up_proj.weight`."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdecimal() and len(part) < 6), None)
    return ("", "", name) if at is None else (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :]))


def _check_module(
    adapter: Adapter, module: LoraModule, base_name: str, weights: Mapping[str, Mapping[str, Mapping[str, TensorFacts]]]
) -> None:
    prefix, number, rest = _split(module.name + _WEIGHT)
    by_prefix = weights.get(rest, {})
    # The same list of layers may stand at different depths: model.layers, language_model.model.layers.
    prefixes = [each for each in by_prefix if each == prefix] or [
        each for each in by_prefix if each.rpartition(".")[2] == prefix.rpartition(".")[2]
    ]
    if len(prefixes) != 1:
        return
    layers = by_prefix[prefixes[0]]
    if number not in layers:
        existing = {each for all_ in weights.values() for each in all_.get(prefixes[0], {})}
        if number and number not in existing:
            last = max((int(each) for each in existing), default=0)
            _refuse(
                adapter,
                base_name,
                f"it changes {module.name}, and that model's last layer is {prefixes[0]}.{last}",
            )
        return
    facts = layers[number]
    shape = (module.outputs, module.inputs)
    # Embeddings and some layers are stored the other way round.
    if facts.dtype in _FLOATS and len(facts.shape) == 2 and sorted(facts.shape) != sorted(shape):
        _refuse(
            adapter,
            base_name,
            f"in {module.name} its lora_A is [{module.rank}, {module.inputs}] and its lora_B "
            f"[{module.outputs}, {module.rank}], which fits weights of {[*shape]}, and that model's are "
            f"{[*facts.shape]}",
        )


def _refuse(adapter: Adapter, base_name: str, problem: str) -> NoReturn:
    made_for = f"{adapter.base_model!r}" if adapter.base_model else "a base model that it does not name"
    raise BadSpecError(
        f"{adapter.title} does not belong to the model {base_name!r}: {problem}. The adapter was made for {made_for}.",
        hint="Give the adapter's own base model in spec.model.source, or an adapter of this model.",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5])
