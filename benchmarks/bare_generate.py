"""The least that answers the same prompts: Transformers' own `generate`, without a worker around it.

`python -m benchmarks.bare_generate GGUF TOKENS`: loads the model, then answers all prompts once for each line on
stdin and prints seconds and the number of generated tokens. Tokenising and decoding are in the time, as in a task.
The batches are those of the executor on a CPU: eight rows, longest first, left padding, greedy.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.inference_prompts import PROMPTS

_ROWS = 8


def main(file: Path, new_tokens: int) -> None:
    """Answer a line on stdin with a line on stdout, until stdin ends."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="auto").eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = GenerationConfig()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        rows = sorted(PROMPTS, key=lambda text: -len(tokenizer(text)["input_ids"]))
        made = 0
        for first in range(0, len(rows), _ROWS):
            batch = tokenizer(rows[first : first + _ROWS], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = model.generate(**batch, generation_config=config)
            fresh = out[:, batch["input_ids"].shape[1] :]
            tokenizer.batch_decode(fresh, skip_special_tokens=True)
            for row in fresh.tolist():
                end = next((place + 1 for place, token in enumerate(row) if token in config.eos_token_id), len(row))
                made += end
        print(f"{time.perf_counter() - started} {made}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
