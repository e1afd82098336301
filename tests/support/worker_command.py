"""Runs `flowmesh-worker` as a person does."""

from __future__ import annotations

import subprocess
import sys

from daemon_process import REPO


def command(*words: str, broker: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "worker.commands.command_line", *words, "--broker", broker]
    return subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
