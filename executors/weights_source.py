"""Where a model's weights lie, told from the spec without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from executors.contract import EnginePolicy
from executors.errors import BadSpecError, ModelLoadError
from executors.local_paths import confine, find_local
from executors.model_spec import CHECKPOINT, ModelTaskSpec

_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
)
_MOST_NAMED = 5


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from.

    Attributes:
        location: a hub name, or the absolute folder.
        gguf_file: the quantised file inside it; None for ordinary weights.
        stamp: name, size and change time of each local file, to notice weights that were written anew;
            empty for the hub.
        weights_file: the file inside it that holds weights and nothing else; None if the folder is a whole model.
        base: what lacks here (tokenizer, configuration of a lone weights file) comes from there; None: nothing lacks.
    """

    location: str
    gguf_file: str | None
    stamp: tuple[tuple[str, int, int], ...]
    weights_file: str | None = None
    base: WeightsSource | None = None


def find_weights(spec: ModelTaskSpec, policy: EnginePolicy, inputs: Mapping[str, Path]) -> WeightsSource:
    """Find the weights that a spec names, without reading them.

    Args:
        spec: the spec.
        policy: holds the allowed roots.
        inputs: what the daemon has found or fetched; with `checkpoint.load` in the spec it holds `CHECKPOINT`.

    Raises:
        BadSpecError: the path is missing, not allowed, or a folder in which the GGUF file is not clear; a checkpoint
            that is no model.
        ModelLoadError: the checkpoint has vanished.
    """
    if spec.checkpoint.load is None:
        return _find_named(spec, policy)
    if CHECKPOINT not in inputs:
        raise RuntimeError("spec.checkpoint.load is set, but the daemon gave the engine no files for it")
    try:
        return _find_checkpoint(spec, policy, inputs[CHECKPOINT])
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"spec.checkpoint.load: {inputs[CHECKPOINT]} has vanished", hint="Send the task again."
        ) from error


def _find_checkpoint(spec: ModelTaskSpec, policy: EnginePolicy, found: Path) -> WeightsSource:
    field = "spec.checkpoint.load"
    files = [found] if found.is_file() else sorted(path for path in found.iterdir() if path.is_file())
    names = {path.name for path in files}
    if "adapter_config.json" in names:
        raise BadSpecError(
            f"{field} is a LoRA adapter ({found.name!r} holds adapter_config.json); expected whole weights",
            hint="Name its base model in spec.model.source, and the adapter in spec.model.adapters.",
        )
    if found.is_dir() and "config.json" in names:
        base = None if names & _TOKENIZER_FILES else _base_of(spec, policy, f"{field} has no tokenizer files")
        return WeightsSource(str(found), None, _stamp(files), base=base)
    weights = [path for path in files if path.suffix.lower() in {".gguf", ".safetensors"}]
    if len(weights) != 1:
        what = ", ".join(path.name for path in weights or files[:_MOST_NAMED]) or "nothing"
        raise BadSpecError(
            f"{field} is {found.name!r}, which holds {what}; "
            "expected a folder with config.json, or one .gguf or .safetensors file",
            hint="Give spec.checkpoint.load.subdir where the model lies deeper in an archive.",
        )
    (file,) = weights
    if file.suffix.lower() == ".gguf":
        return WeightsSource(str(file.parent), file.name, _stamp([file]))
    base = _base_of(spec, policy, f"{field} is the file {file.name!r} alone, without config.json")
    if base.gguf_file or base.weights_file:
        raise BadSpecError(
            f"{field} is the file {file.name!r} alone; spec.model.source is a .gguf file, which cannot complete it",
            hint="Name the model in its ordinary form in spec.model.source.identifier.",
        )
    return WeightsSource(str(file.parent), None, _stamp([file]), weights_file=file.name, base=base)


def _base_of(spec: ModelTaskSpec, policy: EnginePolicy, what_lacks: str) -> WeightsSource:
    if not spec.model.source.identifier:
        raise BadSpecError(f"{what_lacks}; expected spec.model.source.identifier to name the model it belongs to")
    return _find_named(spec, policy)


def _find_named(spec: ModelTaskSpec, policy: EnginePolicy) -> WeightsSource:
    source = spec.model.source
    field = "spec.model.source.identifier"
    local = find_local(source.identifier, field, policy)
    if local is None:
        return WeightsSource(location=source.identifier, gguf_file=source.gguf_file, stamp=())
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise BadSpecError(f"{field} is the file {str(local)!r}; expected a folder with a model, or a .gguf file")
        return WeightsSource(location=str(local.parent), gguf_file=local.name, stamp=_stamp([local]))
    if source.gguf_file:
        chosen = confine(local / source.gguf_file, "spec.model.source.gguf_file", policy)
        return WeightsSource(location=str(chosen.parent), gguf_file=chosen.name, stamp=_stamp([chosen]))
    files = [path for path in local.iterdir() if path.is_file()]
    if any(path.name == "config.json" for path in files):
        return WeightsSource(location=str(local), gguf_file=None, stamp=_stamp(files))
    quantised = sorted(path.name for path in files if path.suffix.lower() == ".gguf")
    if len(quantised) != 1:
        found = f"the files {', '.join(quantised)}" if quantised else "neither config.json nor a .gguf file"
        raise BadSpecError(
            f"{field} is the folder {str(local)!r}, which has {found}; expected config.json or one .gguf file",
            hint="Name one of several .gguf files in spec.model.source.gguf_file.",
        )
    return WeightsSource(location=str(local), gguf_file=quantised[0], stamp=_stamp(files))


def _stamp(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    facts = ((path.name, path.stat()) for path in sorted(files))
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in facts)


def hub_options(spec: ModelTaskSpec, policy: EnginePolicy, source: WeightsSource) -> dict[str, object]:
    """What tells Transformers which files, and whether the model's own code may run."""
    # Many task files ask for remote code without need, so the wish alone is no reason to refuse them.
    where: dict[str, object] = {"trust_remote_code": spec.trusts_remote_code and policy.allow_remote_code}
    if spec.model.source.revision and not source.stamp:
        where["revision"] = spec.model.source.revision
    if source.gguf_file:
        where["gguf_file"] = source.gguf_file
    return where
