"""LoRA adapters on a model that Transformers has loaded: put on for one task, and off again, without a reload."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError, MissingLibraryError
from executors.lora.lora_adapters import Adapter, ReadyAdapter, check_base, name_targets
from executors.safetensors_headers import TensorFacts, read_headers
from executors.weights_source import WeightsSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_KEPT: Final = 4
_WRONG_BASE_HINT: Final = "Check that it was trained for this model."


def check_adapters(adapters: Sequence[Adapter], source: WeightsSource, model_name: str) -> None:
    """Refuse adapters of another base model, as far as the model's files tell.

    Raises:
        BadSpecError: see `executors.lora.lora_adapters.check_base`.
        ModelLoadError: the model's files are damaged.
    """
    tensors = _stored_tensors(source) if adapters else {}
    for adapter in adapters:
        check_base(adapter, tensors, model_name)


def _stored_tensors(source: WeightsSource) -> Mapping[str, TensorFacts]:
    """Empty for a hub name, and for GGUF, which names its tensors in another way."""
    return read_headers(Path(source.location)) if source.stamp and not source.gguf_file else {}


class RuntimeAdapters:
    """The adapters that one loaded model has at hand. The model stays the same object all the time.

    Args:
        model: gets PEFT's layers with its first adapter, and keeps them; while they are off, it computes as before.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._wrapped: Any = None  # peft.PeftModel, once there is an adapter
        self._kept: OrderedDict[str, None] = OrderedDict()

    @property
    def kept(self) -> tuple[str, ...]:
        """Digests of the adapters in memory, the stalest first."""
        return tuple(self._kept)

    @contextmanager
    def applied(self, ready: ReadyAdapter | None) -> Iterator[None]:
        """Have an adapter act within the `with` block; None: the bare model.

        Raises:
            BadSpecError: it does not fit the model.
            MissingLibraryError: PEFT is not installed.
        """
        if ready is None:
            yield
            return
        if ready.digest not in self._kept:
            self._add(ready)
        self._kept.move_to_end(ready.digest)
        tuner = self._wrapped.base_model
        tuner.set_adapter(ready.digest, inference_mode=True)
        tuner.enable_adapter_layers()
        try:
            yield
        finally:
            tuner.disable_adapter_layers()

    def _add(self, ready: ReadyAdapter) -> None:
        import torch

        try:
            import peft
        except ImportError as error:
            raise MissingLibraryError(
                f"spec.model.adapters needs PEFT: {error}",
                hint="Install the extra on the worker: uv sync --inexact --extra inference.",
            ) from error
        while len(self._kept) >= _MOST_KEPT:
            stalest, _ = self._kept.popitem(last=False)
            self._wrapped.delete_adapter(stalest)
        try:
            unfitting = self._load(ready, peft)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            self._remove_all()
            raise
        except Exception as error:  # PEFT raises many kinds, and each is about the adapter and this model
            self._remove_all()
            raise _misfit(ready, f"{type(error).__name__}: {error}") from error
        if unfitting:
            self._remove_all()
            raise _misfit(ready, f"the model has no place for {len(unfitting)} tensors, for instance {unfitting[0]!r}")
        self._kept[ready.digest] = None

    def _load(self, ready: ReadyAdapter, peft: Any) -> list[str]:  # noqa: ANN401 - the module
        """Load an adapter; returns the names of its tensors that the model has no place for."""
        config = peft.LoraConfig.from_pretrained(str(ready.folder))
        name_targets(config, ready.named_targets)
        config.inference_mode = True
        config.init_lora_weights = True  # no effect until the weights are there, and nothing is done to the model's own
        if self._wrapped is None:
            self._wrapped = _bare_wrapper(self._model, config, ready.digest, peft)
        else:
            self._wrapped.add_adapter(ready.digest, config, autocast_adapter_dtype=False)
        weights = peft.load_peft_weights(str(ready.folder), device="cpu")
        told = peft.set_peft_model_state_dict(self._wrapped, weights, adapter_name=ready.digest)
        self._wrapped.eval()
        unexpected: list[str] = told.unexpected_keys
        return unexpected

    def _remove_all(self) -> None:
        """After a failure, which may leave an adapter half put in: none of PEFT's layers stays."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._kept.clear()
        wrapped, self._wrapped = self._wrapped, None
        if wrapped is not None:
            wrapped.unload()
        for name, layer in list(self._model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                self._model.set_submodule(name, layer.get_base_layer())


def _bare_wrapper(model: PreTrainedModel, config: object, name: str, peft: Any) -> object:  # noqa: ANN401 - the module
    wrapped: object = peft.PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
    return wrapped


def _misfit(ready: ReadyAdapter, problem: str) -> BadSpecError:
    return BadSpecError(
        f"spec.model.adapters: adapter {ready.label!r} does not fit the model: {problem}", hint=_WRONG_BASE_HINT
    )
