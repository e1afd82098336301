"""SmolLM2-135M-Instruct as an ordinary model folder: the package has it as a GGUF file, which vLLM does not load."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
from pathlib import Path

from model_files import bundled_model


def smollm_folder(cache: Path) -> Path:
    """The model in bfloat16, made once and kept for later test runs.

    Args:
        cache: an existing folder that outlives test runs.
    """
    file = bundled_model()
    state = file.stat()
    facts = f"{file.name} {state.st_size} {state.st_mtime_ns} {importlib.metadata.version('transformers')}"
    folder = cache / f"smollm-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    unfinished = Path(tempfile.mkdtemp(prefix=".smollm-", dir=cache))
    try:
        _convert(file, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another test run has made it meanwhile.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are no longer quantised once they are loaded.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
