"""LoRA adapters of a task: what engines need to find, check and combine them. Merging is in `lora_merging`."""

from __future__ import annotations

from executors.lora.lora_base_check import check_base
from executors.lora.lora_combining import ReadyAdapter, ready_adapter
from executors.lora.lora_files import (
    Adapter,
    AdapterEngine,
    AdapterSet,
    check_rank,
    combined_rank,
    find_adapters,
    identity,
    label_of,
    name_targets,
)

__all__ = [
    "Adapter",
    "AdapterEngine",
    "AdapterSet",
    "ReadyAdapter",
    "check_base",
    "check_rank",
    "combined_rank",
    "find_adapters",
    "identity",
    "label_of",
    "name_targets",
    "ready_adapter",
]
