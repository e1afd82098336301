"""The frozen copy of an adapter that is trained further: TRL compares with it as the reference."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

_TRAINED: Final = "default"
_REFERENCE: Final = "ref"


def save_without_reference(model: Any) -> None:  # noqa: ANN401 - any model, a peft.PeftModel among them
    """Have the trained adapter alone saved, in checkpoints and at the end.

    A run that goes on from a checkpoint makes the same copy anew, from the adapter that it began with.

    Args:
        model: a trainer's model; one without such a copy stays as it is.
    """
    if _REFERENCE in getattr(model, "peft_config", {}):
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=[_TRAINED])
