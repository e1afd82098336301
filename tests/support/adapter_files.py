"""LoRA adapters for tests, made with PEFT for a model on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def make_adapter(
    model_folder: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    scale_of_b: float = 0.5,
    rslora: bool = False,
    **config: object,
) -> Path:
    """Save an adapter whose A and B are random, so that it changes what the model says.

    Args:
        model_folder: the base model.
        folder: where to save it.
        rank: r.
        alpha: lora_alpha.
        seed: the same seed gives the same weights.
        targets: the names of the modules it changes.
        scale_of_b: standard deviation of B; 0 is an adapter without effect.
        rslora: use_rslora.
        config: further keys of PEFT's LoraConfig.
    """
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    wanted: Mapping[str, object] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "use_rslora": rslora,
        "task_type": "CAUSAL_LM",
        **config,
    }
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**wanted))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                weight.normal_(0, 0.2, generator=generator)
            elif "lora_B" in name or "lora_embedding_B" in name:
                weight.normal_(0, scale_of_b, generator=generator)
    wrapped.save_pretrained(str(folder))
    return folder
