"""The least that answers the same prompts with vLLM: its own `vllm.LLM`, without a worker around it.

`python -m benchmarks.bare_vllm REQUEST`: reads a `Request` as JSON, starts the engine, then answers all prompts once
for each line on stdin and prints seconds and the number of generated tokens. Tokenising and decoding are in the time,
as in a task. Ends with stdin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """What to do.

    Attributes:
        arguments: for `vllm.LLM`.
        prompts: texts to continue, greedily.
        new_tokens: for each prompt at most.
    """

    arguments: dict[str, bool | int | float | str]
    prompts: list[str]
    new_tokens: int


def main(request: Request) -> None:
    """Answer a line on stdin with a line on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM and its processes log to stdout
    from transformers import AutoTokenizer, GenerationConfig
    from vllm import LLM, SamplingParams

    model = request.arguments["model"]
    ends = GenerationConfig.from_pretrained(model).eos_token_id
    own_end = AutoTokenizer.from_pretrained(model).eos_token_id
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request.new_tokens,
        stop_token_ids=sorted({*(ends if isinstance(ends, list) else [ends]), own_end} - {None}),
    )
    llm = LLM(**request.arguments)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        outputs = llm.generate(request.prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(f"{seconds} {tokens}", file=answers, flush=True)


if __name__ == "__main__":
    main(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
