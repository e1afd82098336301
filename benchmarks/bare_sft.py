"""The other side of `benchmarks.sft_speed`: TRL's own script for supervised fine-tuning, without a worker around it.

It runs as its documentation says, `python -m trl.scripts.sft` with options, and prints how fast it was.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.broker_link import BenchError
from benchmarks.live_worker import ROOT

_LOG_TAIL: Final = 2000
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes:
        samples_per_sec: of the training steps alone, as Transformers counts them.
        loss: mean over all steps.
        wall_sec: of all: start, imports, loading, training, saving.
    """

    samples_per_sec: float
    loss: float
    wall_sec: float


def train_with_trl(model: Path, rows: Path, out_dir: Path, options: Mapping[str, object], within_sec: float) -> Trained:
    """Run TRL's script once.

    Args:
        model: its folder.
        rows: a folder with one data file, with the column `text`.
        out_dir: where it saves.
        options: command line options, by TRL's names.
        within_sec: it must end within so many seconds.

    Raises:
        BenchError: it failed, or did not say how fast it was.
    """
    given = {"model_name_or_path": model, "dataset_name": rows, "output_dir": out_dir, **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trl.scripts.sft", *words],
            cwd=ROOT, env={**os.environ, **_OFFLINE}, capture_output=True, text=True, timeout=within_sec, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"TRL's script took more than {within_sec:.0f} s") from error
    seconds = time.perf_counter() - started
    if done.returncode:
        raise BenchError(f"TRL's script ended with status {done.returncode}: {done.stderr[-_LOG_TAIL:]}")
    return Trained(_said(done.stdout, "train_samples_per_second"), _said(done.stdout, "train_loss"), seconds)


def _said(output: str, name: str) -> float:
    found = re.findall(rf"'{name}': '?([0-9.eE+-]+)", output)
    if not found:
        raise BenchError(f"TRL's script did not say {name}: {output[-_LOG_TAIL:]}")
    return float(found[-1])
